"""Verifying on another machine: questions packed here, answered there (qalora_runtimes.answering), judged here."""
