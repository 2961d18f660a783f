"""ONNX Runtime: `python -m qalora_runtimes.onnxruntime_` (trailing underscore: the package itself is onnxruntime)."""

from qalora_runtimes.records import Runner

NAME = "onnxruntime"
RUNNER = Runner(
    module="qalora_runtimes.onnxruntime_",
    package="onnxruntime",
    artifact="ONNX folder",
    taps="qalora_runtimes.onnxruntime_.taps",
)
