"""The language model inside a checkpoint that also sees (Gemma 3 from 4B on, Mistral Small 3.1), as a folder.

Its tensors lie below `language_model.model.` and `language_model.lm_head` (Transformers 4), or below
`model.language_model.` and `lm_head` (5); its config.json is `text_config` of the whole one, filled with the defaults
of the class, for published configs leave out even the number of heads. On text alone the whole model computes the same
function. Everything else (vision tower, projector) is left out, and counted.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError, UnsafeInputError, refused_by
from qalora_export.models.families import FAMILIES, Family

HEAD = "lm_head.weight"
PREFIXES = {"language_model.": "", "model.language_model.": "model."}  # of a tensor's name -> what stands there instead
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def wrapped_family(folder: ModelFolder) -> Family | None:
    """The family of the language model inside a multimodal checkpoint; None for any other model."""
    named = folder.config.get("architectures")
    names = set(map(str, named)) if isinstance(named, list) else set[str]()
    return next((family for family in FAMILIES if names & set(family.wrappers)), None)


class TextPart(ModelFolder):
    """`path` is a folder of ours with config.json and the tokenizer's files, as Transformers wants them; tensors are
    read where they lie, under the names of the language model alone.
    """

    def __init__(self, whole: ModelFolder, family: Family, scratch: Path) -> None:
        """scratch: an empty folder, which must outlive this object. Raises InputError for a config without a language
        model, or one that is quantized, UnsafeInputError for two tensors of one name.
        """
        if whole.config.get("quantization_config") is not None:
            raise InputError(
                "a multimodal checkpoint that is quantized already cannot be imported",
                where=whole.path,
                why="its packed weights are named below the whole model",
                fix="start from the unquantized model",
            )
        self.path, self._where = scratch, {}
        left = Counter[str]()
        for name in whole.names():
            own = _own_name(name)
            if own is None:
                left[_part(name)] += 1
            elif own in self._where:
                raise UnsafeInputError(
                    "two tensors are the same one of the language model", where=f"{whole.path}: {own}"
                )
            else:
                self._where[own] = whole.located(name)
        if not self._where:
            raise InputError("no tensor of a language model here", where=whole.path, why=f"looked for {[*PREFIXES]}")
        self.left_out = dict(left)
        self.config = _text_config(whole, family) | {"tie_word_embeddings": HEAD not in self._where}
        (scratch / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        for path in whole.companions():
            shutil.copyfile(path, scratch / path.name)

    def notes(self) -> tuple[str, ...]:
        """What a user must know."""
        parts = ", ".join(f"{part} ({count} tensors)" for part, count in self.left_out.items())
        return (f"only the language model is taken, for text; left out: {parts or 'nothing'}",)


def _own_name(name: str) -> str | None:
    """A tensor's name in the language model alone; None for what is not part of it."""
    for prefix, instead in PREFIXES.items():
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return name if name == HEAD else None


def _part(name: str) -> str:
    return name.removeprefix("model.").partition(".")[0]


def _text_config(whole: ModelFolder, family: Family) -> dict[str, Any]:
    from transformers import AutoConfig

    where = whole.path / "config.json"
    if not isinstance(whole.config.get("text_config"), dict):
        raise InputError("no text_config", where=where, why="it describes the language model", fix="fetch it again")
    with refused_by("Transformers", where=where, doing="read the config"):
        config = AutoConfig.from_pretrained(str(whole.path), local_files_only=True, trust_remote_code=False)
        text: dict[str, Any] = config.text_config.to_dict()
    ids = {key: whole.config[key] for key in TOKEN_IDS if whole.config.get(key) is not None}
    return text | ids | {"architectures": [family.architectures[0]]}
