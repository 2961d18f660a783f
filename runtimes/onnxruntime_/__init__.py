"""ONNX Runtime: `python -m qalora_runtimes.onnxruntime_` (trailing underscore: the package itself is onnxruntime)."""
