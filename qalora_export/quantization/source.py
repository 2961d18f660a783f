"""What a model is made from: a folder, a hub id or a GGUF file, opened as one model folder; is it quantized already?"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.canonical import QUANT_METHOD
from qalora_export.checkpoint.manifest import Parent, parent_of
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.weight_files import AUTOGPTQ_CONFIG
from qalora_export.errors import InputError
from qalora_export.models.multimodal import TextPart, wrapped_family
from qalora_export.models.sources import Located, locate
from qalora_export.models.spare_tokens import WithoutSpareTokens, spare_tokens
from qalora_export.quantization.gguf_source import GgufModel, gguf_model
from qalora_export.safety import StrPath, inside, read_json, scratch_folder

logger = logging.getLogger(__name__)

AUTO_ROUND = "auto-round"
# AutoRound's packings that are GPTQ's, and how each stores zero points (auto_round_extension/torch/qlinear_torch*.py).
AUTO_ROUND_PACKINGS = {"auto_round:auto_gptq": "gptq", "auto_round": "gptq_v2"}
UNQUANTIZED = "start from the unquantized model"
ADVICE = {
    QUANT_METHOD: "it is canonical already: go on with `qalora-export train` or `qalora-export export`",
    "awq": f"AWQ checkpoints cannot be imported; {UNQUANTIZED}",
    "bitsandbytes": f"bitsandbytes codes are not affine groups; {UNQUANTIZED}",
}


@dataclass(frozen=True, slots=True)
class Source:
    """folder: the model. parent: it, as the manifest names it. recorded: for the manifest's settings. notes: for the
    report.
    """

    folder: ModelFolder
    parent: Parent
    recorded: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def open_source(model: StrPath, out: Path, *, revision: str | None, dequantize: bool) -> Iterator[Source]:
    """Find a model by path or hub id and open it for the time of the block; what needs scratch space lies beside `out`.

    Raises InputError when there is none, UnsafeInputError when its files lie.
    """
    located = locate(model, revision)
    for note in located.notes:
        logger.info(note)
    parent, recorded = parent_of(located.path, "source"), {}
    if located.commit is not None:
        parent = Parent(parent.role, f"{located.hub_id}@{located.commit}", parent.sha256)
        recorded = {"source": {"hub_id": located.hub_id, "revision": located.commit}}
    with open_folder(located, scratch_folder(out), dequantize=dequantize) as folder:
        yield Source(folder, parent, recorded, notes_of(folder))


@contextlib.contextmanager
def open_folder(located: Located, scratch: AbstractContextManager[Path], *, dequantize: bool) -> Iterator[ModelFolder]:
    """A model that was found, as a model folder for the time of the block. scratch: an empty one, for a GGUF file, the
    language model of a multimodal checkpoint, or a tokenizer that must be restated.
    """
    if located.path.is_file():
        with scratch as empty, gguf_model(located.path, empty, dequantize=dequantize) as folder:
            yield folder
        return
    whole = ModelFolder(located.path)
    family, spare = wrapped_family(whole), spare_tokens(whole)
    if family is None and not spare:
        yield whole
        return
    with scratch as empty:
        yield WithoutSpareTokens(whole, spare, empty) if family is None else TextPart(whole, family, empty)


def notes_of(folder: ModelFolder) -> tuple[str, ...]:
    """What a user must know about how the source is read."""
    return folder.notes() if isinstance(folder, GgufModel | TextPart | WithoutSpareTokens) else ()


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
    if method == AUTO_ROUND:
        return _auto_round(config, folder.path)
    raise InputError(
        f"the model is quantized already ({method})",
        where=folder.path,
        why="quantizing twice loses what the first time kept",
        fix=ADVICE.get(method, UNQUANTIZED),
    )


def _auto_round(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """The config of an AutoRound checkpoint as GPTQ's. Raises InputError for a packing that is not GPTQ's."""
    packing = config.get("packing_format")
    version = AUTO_ROUND_PACKINGS.get(packing) if isinstance(packing, str) else None
    if version is None or config.get("data_type", "int") != "int" or (config.get("act_bits") or 16) < 16:
        raise InputError(
            f"cannot read this packing of AutoRound ({str(packing)[:80]}, {str(config.get('data_type', 'int'))[:80]})",
            where=where,
            why=f"supported: integers in {' and '.join(AUTO_ROUND_PACKINGS)}, weights only",
            fix="save it again with format='auto_gptq' or 'auto_round:auto_gptq', or start from the unquantized model",
        )
    return {"checkpoint_format": version} | config
