"""What is installed: metadata of both distributions, one version, and runners that need numpy alone."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import qalora_runtimes

import qalora_export

ROOT = Path(__file__).parent.parent
# Only the standard library, numpy and the wheel itself can be imported after this.
NUMPY_ONLY = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {"numpy", "qalora_runtimes", *sys.stdlib_module_names}:
            raise ModuleNotFoundError(f"{name} is not on this device", name=name)

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, WHEEL)
import runpy
sys.argv = ["qalora_runtimes", *WORDS]
runpy.run_module("qalora_runtimes", run_name="__main__")
"""


def project(folder: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))


def test_one_version() -> None:
    assert qalora_runtimes.__version__ == qalora_export.__version__
    assert project(".")["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "qalora_export.version.__version__"}
    assert "version" not in project(".")["project"]
    assert "version" not in project("runtimes")["project"]


def test_a_released_version_has_its_entry_in_the_changelog() -> None:
    changelog = (ROOT / "qalora_export/CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {qalora_export.__version__}" in changelog


def test_both_distributions_list_the_same_runner_packages() -> None:
    ours = project(".")["tool"]["setuptools"]["packages"]
    runners = project("runtimes")["tool"]["setuptools"]["packages"]
    assert set(runners) == {name for name in ours if name.startswith("qalora_runtimes")}


def test_the_runners_depend_on_numpy_and_at_most_one_runtime() -> None:
    metadata = project("runtimes")["project"]
    assert [name.partition(">")[0] for name in metadata["dependencies"]] == ["numpy"]
    assert all(len(extra) == 1 for extra in metadata["optional-dependencies"].values())


def test_extras_of_both_distributions_ask_for_the_same_runtimes() -> None:
    alone = project("runtimes")["project"]["optional-dependencies"]
    assert sorted(asked for extra in alone.values() for asked in extra) == sorted(
        project(".")["project"]["optional-dependencies"]["runtimes"]
    )


@pytest.mark.parametrize("folder", [".", "runtimes"])
def test_metadata_for_an_index(folder: str) -> None:
    metadata = project(folder)["project"]
    assert metadata["license"] == "Apache-2.0"
    assert {"description", "keywords", "classifiers", "requires-python"} <= set(metadata)
    assert not [c for c in metadata["classifiers"] if c.startswith("License ::")], "PEP 639: the expression says it"


def test_documents_are_installed_with_the_package() -> None:
    assert "*.md" in project(".")["tool"]["setuptools"]["package-data"]["qalora_export"]
    found = {path.name for path in (ROOT / "qalora_export").glob("*.md")}
    assert found >= {"DESIGN.md", "EXTENDING.md", "CHANGELOG.md"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel of runtimes/, built from a copy; the build leaves files beside its sources."""
    version = tuple(map(int, importlib.metadata.version("setuptools").split(".")[:1]))
    if version < (77,):
        pytest.skip("building needs setuptools 77 (make test installs it)")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "runtimes", folder / "runtimes", ignore=shutil.ignore_patterns("__pycache__", "build"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", "out"]
    done = subprocess.run([*command, "./runtimes"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "out").glob("*.whl")
    assert built.name == f"qalora_runtimes-{qalora_export.__version__}-py3-none-any.whl"
    zipfile.ZipFile(built).extractall(folder / "unpacked")
    return folder / "unpacked"


def on_a_device(wheel: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = f"WHEEL, WORDS = {str(wheel)!r}, {words!r}\n{NUMPY_ONLY}"
    return subprocess.run([sys.executable, "-c", code], cwd=wheel, capture_output=True, text=True, timeout=120)


def test_the_wheel_runs_with_numpy_alone(wheel: Path) -> None:
    listed = on_a_device(wheel)
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["llama.cpp", "onnxruntime", "onnxruntime-genai"]
    for runtime in ("llama.cpp", "onnxruntime", "onnxruntime-genai"):
        assert "--fingerprint" in on_a_device(wheel, runtime, "--help").stdout


def test_every_module_is_in_the_wheel(wheel: Path) -> None:
    sources = {p.relative_to(ROOT / "runtimes").as_posix() for p in (ROOT / "runtimes").rglob("*.py")}
    packed = {p.relative_to(wheel / "qalora_runtimes").as_posix() for p in (wheel / "qalora_runtimes").rglob("*.py")}
    assert packed == {name for name in sources if not name.startswith("build/")}


def test_a_runtime_without_its_package_is_exit_code_3(tmp_path: Path) -> None:
    """Through the front door, where the runtime's package cannot be imported."""
    from qalora_runtimes.protocol import make_job, write_job

    write_job(tmp_path / "job.npz", make_job([[1, 2]]))
    (tmp_path / "model.onnx").write_bytes(b"")
    words = ("onnxruntime", "--model", ".", "--job", "job.npz", "--out", "o.npz", "--fingerprint", "f.json")
    package = tmp_path / "packages"
    package.mkdir()
    (package / "qalora_runtimes").symlink_to(ROOT / "runtimes")
    code = f"WHEEL, WORDS = {str(package)!r}, {words!r}\n{NUMPY_ONLY}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "onnxruntime" in done.stderr
