"""GGUF, llama.cpp's file format: blocks ↔ grid, names, metadata, tokenizer, writer, validator, read-back."""
