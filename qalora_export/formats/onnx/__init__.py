"""ONNX: the exact split form on mobius-onnx graphs. numbers ↔ blocks, graph, rewrite, writer, validator, read-back."""
