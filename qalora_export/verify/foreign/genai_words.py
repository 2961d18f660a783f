"""Why ONNX Runtime GenAI reads a tokenizer.json otherwise than Transformers though it is the model's, and what ends it.

GenAI has a tokenizer of its own, which takes parts of tokenizer.json (formats/onnx/genai_text). For some of them
`export onnx` writes two small files that lead it to the same ids. Whether that is what an artifact lacks is found by
trying: the same folder with those files beside its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qalora_export.formats.onnx.genai_text.files import MODULE, genai_files
from qalora_export.safety import inside, read_json
from qalora_export.verify.foreign.diagnosis import Part


def folder_with_words(folder: Path, target: Path) -> Path | None:
    """A copy of an ONNX folder with the files that its tokenizer needs in GenAI; None where it needs none, or has some.

    Raises UnsafeInputError for tables that are no JSON.
    """
    tokenizer, settings = (read_json(inside(folder, f"{name}.json")) for name in ("tokenizer", "tokenizer_config"))
    if (folder / MODULE).exists() or not isinstance(tokenizer, dict) or not isinstance(settings, dict):
        return None
    if not (files := genai_files(tokenizer, settings)):
        return None
    shutil.copytree(folder, target, symlinks=True)
    for name, content in files.items():
        (target / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return target


def explained(
    part: Part,
    folder: Path,
    scratch: Path,
    ask: Callable[[Path], dict[str, Any]],
    judge: Callable[[dict[str, Any]], Part],
) -> Part:
    """`part`, a tokenizer that is broken in GenAI though its tables are the model's, with what those files change.

    folder: the artifact. scratch: a name for the copy, which goes again. ask: GenAI's answers with a folder; judge: the
    part that answers come to. Raises what `ask` does.
    """
    if part.state != "broken" or part.figures.get("tables"):
        return part
    copy = folder_with_words(folder, scratch)
    if copy is None:
        return part
    names = " and ".join(sorted({path.name for path in copy.iterdir()} - {path.name for path in folder.iterdir()}))
    after = judge(ask(copy))
    shutil.rmtree(copy)
    before, left = part.figures["differing"], after.figures.get("differing", 0)
    if left >= before:
        return part
    sentence = (
        f"ONNX Runtime GenAI reads this tokenizer.json its own way, {before} of {part.figures.get('ids')} ids of the "
        f"probe texts differ; `qalora-export export onnx` writes {names} against that"
    )
    rest = "the ids are the model's" if after.state == "ok" else f"{left} ids differ instead of {before}"
    return replace(part, sentence=sentence, proof=f"with {names} beside the same files {rest}")
