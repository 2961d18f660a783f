"""An embedding on a grid of super-blocks is read back as its blocks; values are made only where those differ.

The model's padding token has a row of zeros, in which a sign of zero would be a difference.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.formats.contents import EMBEDDING, FolderContents, compare
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.read import GgufContents, read_back
from qalora_export.quantization.rules import parse_rule
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import QuantizeSettings
from tests.models import make_tiny_model


@pytest.fixture(scope="module", params=["q4_k", "q6_k", "q8_0", "q4_0"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    path = tmp_path_factory.mktemp(request.param)
    make_tiny_model(path / "model", num_hidden_layers=1, hidden_size=256)
    rules = (parse_rule(f"model.embed_tokens=grid:{request.param}"),)
    quantize(path / "model", path / "base", QuantizeSettings(method="rtn", rules=rules))
    assert export_gguf(path / "base", path / "m.gguf").differing == 0
    return request.param, path / "base", path / "m.gguf"


def test_equal_blocks_are_equal_without_their_values(
    exported: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, base, gguf = exported
    made, dequantized = list[str](), GgufContents.dequantized

    def watched(self: GgufContents, name: str, rows: slice = slice(None)) -> NDArray[np.float32]:
        made.append(name)
        return dequantized(self, name, rows)

    monkeypatch.setattr(GgufContents, "dequantized", watched)
    assert compare(FolderContents(CanonicalCheckpoint(base)), read_back(gguf)).total == 0
    assert bool(made) == (grid in ("q8_0", "q4_0"))  # whose blocks do not store the offset


@pytest.mark.parametrize("at", range(0, 144, 13))
def test_any_changed_byte_of_a_block_is_found(at: int, exported: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, base, gguf = exported
    damaged = Path(shutil.copyfile(gguf, tmp_path / "m.gguf"))
    begin = GgufFile(gguf).tensors["token_embd.weight"].info.begin
    with damaged.open("r+b") as file:
        file.seek(begin + at)
        byte = file.read(1)
        file.seek(begin + at)
        file.write(bytes([byte[0] ^ 0x10]))
    found = compare(FolderContents(CanonicalCheckpoint(base)), read_back(damaged))
    assert set(found.findings()) == {EMBEDDING}
