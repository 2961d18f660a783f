"""Shared fixtures. Session-scoped folders are read-only by agreement: a test that changes one copies it first."""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if shutil.which("nvidia-smi") is None:  # before anything imports Triton: the kernels' tests run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))  # tests use samples/ and each other

import pytest

from qalora_export.verify.store import FOLDER
from tests.models import make_tiny_canonical, make_tiny_model
from tests.verify.exports import Exported, export_both

ROOT = Path(__file__).parent.parent
# Triton exists for Linux only.
LINUX_ONLY = ["qalora/test_kernels*.py", "benchmarks_smoke/test_training.py"]
collect_ignore_glob = [] if sys.platform == "linux" else LINUX_ONLY


@pytest.fixture(scope="session", autouse=True)
def _kept_answers(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> None:
    """verify-parity's store: one for all workers of this test run, and none of the user's."""
    os.environ[FOLDER] = str(shared_folder(tmp_path_factory, worker_id) / "kept")


def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A temporary folder that all workers of this test run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random Llama, hidden 128, vocabulary 512, fp16, untied lm_head."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_canonical(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_model in canonical form, 4 bits, g 32, asymmetric."""
    return make_tiny_canonical(tmp_path_factory.mktemp("tiny") / "base.qalora", tiny_model)


@pytest.fixture(scope="session")
def exported(tiny_canonical: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """GGUF and ONNX artifacts of the tiny checkpoint, made once; a test that damages one copies it first."""
    return export_both(tiny_canonical, tmp_path_factory.mktemp("exported"))
