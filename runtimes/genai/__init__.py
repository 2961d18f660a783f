"""ONNX Runtime GenAI: `python -m qalora_runtimes.genai`."""

from qalora_runtimes.records import Runner

NAME = "onnxruntime-genai"
RUNNER = Runner(module="qalora_runtimes.genai", package="onnxruntime-genai", artifact="ONNX folder")
