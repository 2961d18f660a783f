"""llama.cpp: `python -m qalora_runtimes.llama_cpp`."""
