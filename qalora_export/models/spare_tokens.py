"""Tokens without a row in the embedding: Gemma 3 1B's tokenizer has <image_soft_token> of its larger siblings.

No model can read them: Transformers would index beyond the embedding, and llama.cpp's converter leaves them out too. So
the checkpoint's tokenizer goes without them, and says so; a text that spells one is text. Only tokens that nothing
needs are left out: what begins or ends a text, or stands in the chat template, stays, and is refused where it matters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.weight_files import AUTOGPTQ_CONFIG
from qalora_export.models.tokenizers import FILE, SETTINGS
from qalora_export.safety import inside, read_json

TEMPLATE = "chat_template.jinja"
RESTATED = (FILE, SETTINGS, "special_tokens_map.json", "added_tokens.json")  # name tokens
NEEDED = ("bos_token", "eos_token", "unk_token")


def spare_tokens(folder: ModelFolder) -> list[str]:
    """Added tokens of tokenizer.json beyond the embedding that nothing needs; none where one of them is needed."""
    rows, path = folder.config.get("vocab_size"), folder.path / FILE
    if type(rows) is not int or not path.is_file():
        return []
    raw = read_json(inside(folder.path, FILE))
    added = raw.get("added_tokens") if isinstance(raw, dict) else None
    items = [item for item in added or [] if isinstance(item, dict) and isinstance(item.get("content"), str)]
    found = [item["content"] for item in items if type(item.get("id")) is int and item["id"] >= rows]
    needed = _needed(folder.path)
    return [] if any(text in needed for text in found) else found


def _needed(folder: Path) -> str:
    """The texts of NEEDED tokens and the chat template, in one."""
    settings = read_json(inside(folder, SETTINGS)) if (folder / SETTINGS).is_file() else {}
    settings = settings if isinstance(settings, dict) else {}
    parts = [settings.get("chat_template"), *(settings.get(name) for name in NEEDED)]
    if (folder / TEMPLATE).is_file():
        parts.append(inside(folder, TEMPLATE).read_text(encoding="utf-8", errors="replace"))
    return json.dumps(parts, ensure_ascii=False)


class WithoutSpareTokens(ModelFolder):
    """A folder whose tokenizer lacks those tokens. `path` is a folder of ours; tensors are read in their place."""

    def __init__(self, whole: ModelFolder, spare: list[str], scratch: Path) -> None:
        """scratch: an empty folder, which must outlive this object."""
        self.path, self.config, self.spare = scratch, whole.config, spare
        self._where = {name: whole.located(name) for name in whole.names()}
        for path in (*whole.companions(), whole.path / "config.json", whole.path / AUTOGPTQ_CONFIG):
            if path.name in RESTATED:
                text = json.dumps(_without(read_json(path), set(spare)), ensure_ascii=False, indent=2)
                (scratch / path.name).write_text(text + "\n", encoding="utf-8")
            elif path.is_file():
                shutil.copyfile(path, scratch / path.name)

    def notes(self) -> tuple[str, ...]:
        """What a user must know."""
        named = ", ".join(self.spare[:5]) + (", …" if len(self.spare) > 5 else "")
        return (f"left out of the tokenizer, because the model has no row for them: {named} ({len(self.spare)})",)


def _without(value: Any, texts: set[str]) -> Any:
    """A JSON value without the items and entries that are one of these tokens: its text, or a table with it."""
    if isinstance(value, Mapping):
        return {
            key: _without(item, texts) for key, item in value.items() if key not in texts and not _is_one(item, texts)
        }
    if isinstance(value, list):
        return [_without(item, texts) for item in value if not _is_one(item, texts)]
    return value


def _is_one(value: Any, texts: set[str]) -> bool:
    text = value.get("content") if isinstance(value, Mapping) else value
    return isinstance(text, str) and text in texts
