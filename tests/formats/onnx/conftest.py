"""A folder with one quantized linear, exported by the product, and a copy of it to damage."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from qalora_export.grid import GroupAffine
from tests.formats.onnx.helpers import linear_folder


@pytest.fixture(scope="session")
def one_linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("linear")
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.01, 0.1, (8, 2)).astype(np.float16)
    codes = rng.integers(0, 8, (8, 64), dtype=np.uint8)
    linear_folder(path, GroupAffine(codes, scale, (-scale * np.float16(3)).astype(np.float16), 3))
    return path / "onnx"


@pytest.fixture
def victim(one_linear: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one_linear, tmp_path / "victim"))
