"""ONNX Runtime GenAI: `python -m qalora_runtimes.genai`."""
