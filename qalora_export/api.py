"""Every stage as one Python function, named as on the command line."""

from qalora_export.evaluate import evaluate
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.pipeline import run
from qalora_export.qalora.merge import merge
from qalora_export.qalora.train import train
from qalora_export.quantize.stage import quantize
from qalora_export.verify.stage import verify_parity

__all__ = ["evaluate", "export_gguf", "export_onnx", "merge", "quantize", "run", "train", "verify_parity"]
