"""EXTENDING.md cannot rot: what it quotes is in the files, what it adds works in a copy of the package, alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, blocks, headings
from tests.verify.exports import Exported

DOCUMENT = ROOT / "qalora_export" / "EXTENDING.md"
FAMILY = "qalora_export/models/families/qwen2.py"
VERIFIED = """
import sys
from pathlib import Path
from qalora_export.recipe import VerifySettings
from qalora_export.verify.stage import verify_parity
from tests.verify.fakes import FakeRuntimes

checkpoint, gguf, out = map(Path, sys.argv[1:])
settings = VerifySettings(runtimes=("llama.cpp", "uniform"), threads=1)
report = verify_parity(checkpoint, out, settings, gguf=gguf, launch=FakeRuntimes(checkpoint), taps=None, bisect=False)
print(*(f"{entry.gate}:{entry.runtime}:{entry.status}" for entry in report.entries))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Package and runners with the document's new files in them."""
    root = tmp_path_factory.mktemp("extended")
    for folder in ("qalora_export", "runtimes"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "build"))
    (root / "qalora_runtimes").symlink_to("runtimes")
    for block in blocks(DOCUMENT):
        if block.place and not (ROOT / block.place).exists():
            path = root / block.place
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.code, encoding="utf-8")
    return root


def run(copy: Path, code: str, *arguments: object) -> str:
    """Run in the copy; tests come from here, what they import of ours from there."""
    path = os.pathsep.join([str(copy), str(ROOT)])
    words = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_a_section_for_everything_that_registers_itself() -> None:
    assert headings(DOCUMENT) == [
        "Extending",
        "A model family",
        "A GGUF block type",
        "A runtime",
        "A gate",
        "A method of the comparison",
    ]


@pytest.mark.parametrize("place", sorted({b.place for b in blocks(DOCUMENT) if b.place and (ROOT / b.place).exists()}))
def test_quoted_code_is_in_its_file(place: str) -> None:
    text = (ROOT / place).read_text(encoding="utf-8")
    for block in blocks(DOCUMENT):
        assert block.place != place or block.code in text


def test_new_files_are_formatted_like_ours(copy: Path) -> None:
    new = [str(copy / b.place) for b in blocks(DOCUMENT) if b.place and not (ROOT / b.place).exists()]
    assert new
    configuration = ["--config", str(ROOT / "pyproject.toml")]
    for words in (["check", "--ignore", "I001,ARG", *configuration], ["format", "--check", *configuration]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words, *new], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_its_checks_pass_where_its_files_are(copy: Path) -> None:
    run(copy, "\n".join(block.code for block in blocks(DOCUMENT) if block.place is None))


def test_the_file_of_a_family_is_all_that_admits_it(copy: Path, tmp_path: Path) -> None:
    code = "from qalora_export.models.families import supported_architectures as s; print('Qwen2ForCausalLM' in s())"
    assert run(copy, code).strip() == "True"
    without = tmp_path / "without"
    shutil.copytree(copy / "qalora_export", without / "qalora_export")
    (without / FAMILY).unlink()
    assert run(without, code).strip() == "False"


def test_the_tests_of_the_gates_hold_with_one_more(copy: Path) -> None:
    """Those that list all gates take the registry's list; whoever adds one edits none of them."""
    where = [str(ROOT / "tests" / "verify" / name) for name in ("test_rule.py", "report/test_parity_report.py")]
    code = "import sys, qalora_export, qalora_runtimes, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    run(copy, code, "-q", "-x", "-n0", "-p", "no:cacheprovider", *where)


def test_the_added_gate_and_runtime_are_verified_like_the_others(
    copy: Path, exported: Exported, tmp_path: Path
) -> None:
    shown = run(copy, VERIFIED, exported.checkpoint, exported.gguf, tmp_path / "report").split()
    for runtime in ("llama.cpp", "uniform"):
        assert f"G90:{runtime}:pass" in shown
        assert f"G2:{runtime}:pass" in shown
    assert "G90 size" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
