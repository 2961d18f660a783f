"""Two fine-tunes of one base, exported both ways, and the patches between them."""

from pathlib import Path

import pytest

from qalora_export.formats.patch.export import export_patch
from tests.conftest import MadeOnce
from tests.formats.patch.artifacts import KINDS, export_all, moved


@pytest.fixture(scope="session")
def pair(tiny_canonical: Path, made_once: MadeOnce) -> Path:
    """one/ and two/, each with model.gguf and onnx/; gguf.patch and onnx.patch go from one to two. Read-only."""

    def make(at: Path) -> None:
        for seed, name in enumerate(("one", "two")):
            export_all(moved(tiny_canonical, at / f"{name}.qalora", seed), at / name)
        for artifact, kind in KINDS.items():
            export_patch(at / "one" / artifact, at / "two" / artifact, at / f"{kind}.patch")

    return made_once("patches", make)
