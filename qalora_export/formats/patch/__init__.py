"""Patches: what two artifacts of one base differ in (qalora_runtimes.patches says how it is written)."""
