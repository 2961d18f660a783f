"""Language models to the edge without losing a bit: quantize, train QA-LoRA, merge, export, prove.

Importing this package makes `AutoModelForCausalLM.from_pretrained` understand canonical checkpoints
(`quant_method = "qalora"`). The stages are in `qalora_export.api`. torch is imported only when a stage needs it.
"""

from qalora_export.checkpoint.registration import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
