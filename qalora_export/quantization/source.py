"""Is a model folder quantized already, and by what?"""

from __future__ import annotations

from typing import Any

from qalora_export.checkpoint.canonical import QUANT_METHOD
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError
from qalora_export.safety import inside, read_json

AUTOGPTQ_CONFIG = "quantize_config.json"  # AutoGPTQ before 0.5 wrote it here only
UNQUANTIZED = "start from the unquantized model"
ADVICE = {
    QUANT_METHOD: "it is canonical already: go on with `qalora-export train` or `qalora-export export`",
    "awq": f"AWQ checkpoints cannot be imported; {UNQUANTIZED}",
    "bitsandbytes": f"bitsandbytes codes are not affine groups; {UNQUANTIZED}",
}


def gptq_config(folder: ModelFolder) -> dict[str, Any] | None:
    """The quantization config of a checkpoint in GPTQ format, or None for a model that is not quantized.

    Raises InputError for every other kind of quantized checkpoint.
    """
    config = folder.config.get("quantization_config")
    if config is None and any(name.endswith(".qweight") for name in folder.names()):
        if not (folder.path / AUTOGPTQ_CONFIG).exists():
            raise InputError(
                "the folder holds packed weights but says nowhere how",
                where=folder.path,
                why=f"neither config.json nor {AUTOGPTQ_CONFIG} has a quantization config",
                fix="add it",
            )
        config = {"quant_method": "gptq"} | read_json(inside(folder.path, AUTOGPTQ_CONFIG))
    if config is None:
        return None
    method = str(config.get("quant_method")) if isinstance(config, dict) else "unknown"
    if method == "gptq":
        return dict(config)
    raise InputError(
        f"the model is quantized already ({method})",
        where=folder.path,
        why="quantizing twice loses what the first time kept",
        fix=ADVICE.get(method, UNQUANTIZED),
    )
