"""Whoever deploys a model is another user than who made it: all outputs have the mode of ordinary files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qalora_export.formats.gguf.export import export_gguf
from qalora_export.recipe import GgufSettings
from tests.faults.line import make_line

UMASK = 0o027  # neither what machines usually have nor what a library would choose


def test_every_output_file_has_the_mode_of_an_ordinary_new_file(tmp_path: Path) -> None:
    before = os.umask(UMASK)
    try:
        line = make_line(tmp_path)
        export_gguf(line.merged, tmp_path / "split" / "model.gguf", GgufSettings(layout="split"))
    finally:
        os.umask(before)
    outputs = [line.base, line.adapter, line.merged, line.onnx, line.gguf, tmp_path / "split"]
    files = [file for out in outputs for file in (out, *out.rglob("*")) if file.is_file()]
    files += tmp_path.glob("model.gguf.*")
    assert {".safetensors", ".gguf", ".onnx", ".onnx_data", ".json"} <= {file.suffix for file in files}
    wrong = {str(f.relative_to(tmp_path)): oct(m) for f in files if (m := mode_of(f)) != 0o666 & ~UMASK}
    assert not wrong


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
