"""Shared fixtures. Session-scoped folders are read-only by agreement: a test that changes one copies it first."""

import gc
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if shutil.which("nvidia-smi") is None:  # before anything imports Triton: the kernels' tests run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))  # tests use samples/ and each other

import hypothesis
import pytest
from filelock import FileLock

from qalora_export.preflight import machine
from qalora_export.verify.store import FOLDER
from tests.models import make_tiny_canonical, make_tiny_model
from tests.survival.driven import Driver
from tests.verify.exports import Exported, export_both
from tests.warm_runners import USERS, WarmRunners

# An example may take any time: on a busy desk 200 ms are over before it has been asked for.
hypothesis.settings.register_profile("desk", deadline=None)
hypothesis.settings.load_profile("desk")

ROOT = Path(__file__).parent.parent
# Triton exists for Linux only.
LINUX_ONLY = ["qalora/test_kernels*.py", "benchmarks_smoke/test_training.py"]
collect_ignore_glob = [] if sys.platform == "linux" else LINUX_ONLY


# What starts runtimes or processes, trains, or runs a whole line, and so takes most of the time; marker `thorough`.
THOROUGH = (
    "benchmarks_smoke/",
    "cli/",
    "comparison/test_stage.py",
    "faults/",
    "formats/gguf/test_llama_cpp.py",
    "formats/onnx/test_parity.py",
    "models/families/test_parity.py",
    "models/test_sources.py",
    "models/test_tokenizers.py",
    "preflight/test_examine.py",
    "qalora/test_registration.py",
    "qalora/training/",
    "runtimes/",
    "survival/",
    "test_extending.py",
    "test_mixed_groups.py",
    "test_mixed_line.py",
    "test_output_modes.py",
    "test_pipeline.py",
    "test_progress_of_stages.py",
    "test_public_face.py",
    "test_super_block_line.py",
    "test_wheels.py",
    "verify/bisect/",
    "verify/foreign/",
    "verify/gates/test_g6_behaviour.py",
    "verify/kernels/test_products.py",
    "verify/runtimes/test_onnx_dequantize.py",
    "verify/test_files_of_a_run.py",
    "verify/test_stage.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix().startswith(THOROUGH):
            item.add_marker("thorough")


def pytest_collection() -> None:
    """What is imported stays, so nobody looks for garbage in it; a fork that did would copy all of it."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _kept_answers(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> None:
    """verify-parity's store: one for all workers of this test run, and none of the user's."""
    os.environ[FOLDER] = str(shared_folder(tmp_path_factory, worker_id) / "kept")


machine.PRODUCT_SECONDS = 0.01  # how fast this machine is, no test asks


PLOTS = {
    "qalora_export.qalora.training.plots": ("plot_losses",),
    "qalora_export.verify.report.plots": ("error_by_position", "kl_histogram", "agreement"),
}
NO_PICTURE = "data:image/png;base64,"


@pytest.fixture(autouse=True)
def _pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's pictures are a third of a small run: they are drawn where a test is about them (marker `pictures`)."""
    if request.node.get_closest_marker("pictures") is None:
        for module, names in PLOTS.items():
            for name in names if module in sys.modules else ():
                monkeypatch.setattr(sys.modules[module], name, lambda *_, **__: NO_PICTURE)


def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A temporary folder that all workers of this test run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> MadeOnce:
    """made_once(name, make): a folder that `make` has filled, once for all workers of this test run; read-only."""
    root = shared_folder(tmp_path_factory, worker_id)

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = root / f"shared-{name}", root / f"shared-{name}.made"
        with FileLock(root / f"shared-{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a worker that failed has left
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny_model(made_once: MadeOnce) -> Path:
    """A 2-layer random Llama, hidden 128, vocabulary 512, fp16, untied lm_head."""
    return made_once("tiny", lambda folder: make_tiny_model(folder / "model")) / "model"


@pytest.fixture(scope="session")
def tiny_canonical(tiny_model: Path, made_once: MadeOnce) -> Path:
    """tiny_model in canonical form, 4 bits, g 32, asymmetric."""
    return made_once("base", lambda folder: make_tiny_canonical(folder / "base.qalora", tiny_model)) / "base.qalora"


@pytest.fixture(scope="session")
def exported(tiny_canonical: Path, made_once: MadeOnce) -> Exported:
    """GGUF and ONNX artifacts of the tiny checkpoint, made once; a test that damages one copies it first."""
    folder = made_once("exported", lambda folder: export_both(tiny_canonical, folder))
    return Exported(tiny_canonical, folder / "model.gguf", folder / "onnx")


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """Starts the command line again and again; its imports are paid once."""
    with Driver(tmp_path_factory.mktemp("logs")) as process:
        yield process


@pytest.fixture(scope="session")
def _runners() -> Iterator[WarmRunners]:
    warm = WarmRunners()
    yield warm
    warm.close()


@pytest.fixture
def warm_runners(_runners: WarmRunners, monkeypatch: pytest.MonkeyPatch) -> WarmRunners:
    """Runners start by a fork of a process that has imported their runtime."""
    for name in USERS:
        monkeypatch.setattr(importlib.import_module(f"qalora_runtimes.{name}"), "run_module", _runners)
    _runners.prepare = None
    return _runners
