"""One file per gate; gates/registry.py finds them. Which file is which gate: qalora_export/verify/__init__.py."""
