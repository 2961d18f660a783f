"""What documents and code say of each other is true: citations, paths, the example of the README."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.documents import ROOT, blocks, headings

DESIGN = ROOT / "qalora_export" / "DESIGN.md"
CITATION = re.compile(r'DESIGN\.md, "([^"]+)"')
DOCUMENTS = (
    ROOT / "README.md",
    DESIGN,
    ROOT / "qalora_export/EXTENDING.md",
    ROOT / "qalora_export/CHANGELOG.md",
    ROOT / ".github/CONTRIBUTING.md",
)
# A path in backquotes, as far as it has a folder and no placeholder.
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*)`")
TO_WRITE = "tests/verify/gates/test_g90_size.py"  # which EXTENDING.md asks for
TOPS = {"qalora_export", "runtimes", "tests", "samples", ".ci", ".github"}


def test_code_cites_sections_that_exist() -> None:
    known, cited = set(headings(DESIGN)), set[str]()
    for folder in ("qalora_export", "runtimes", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            cited |= set(CITATION.findall(text)) if path != Path(__file__) else set()
            assert "design §" not in text.lower() or path == Path(__file__), path
    assert cited
    assert cited <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_documents_exist(document: Path) -> None:
    """Relative to the repository, or, inside the package's own documents, to the package."""
    missing = []
    for name in PATH.findall(document.read_text(encoding="utf-8")):
        top, package = name.split("/")[0], ROOT / "qalora_export"
        if name == TO_WRITE:
            continue
        inside = document.parent == package and (package / top).is_dir()
        if (top in TOPS or inside) and not ((package if inside else ROOT) / name).exists():
            missing.append(name)
    assert not missing


def test_the_example_of_the_readme_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As it stands, with the sample's folders in place of the reader's; verification has tests of its own."""
    turns = [{"role": "user", "content": "on"}, {"role": "assistant", "content": "done"}]
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    (tmp_path / "my-model").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    asked = list[dict[str, object]]()

    class Report:
        passed = True

    def verified(*_: object, **options: object) -> Report:
        asked.append(options)
        return Report()

    monkeypatch.setattr("qalora_export.verify.stage.verify_parity", verified)
    monkeypatch.setitem(__import__("qalora_export").__dict__, "verify_parity", verified)
    (example,) = [block for block in blocks(ROOT / "README.md") if "import qalora_export" in block.code]
    exec(compile(example.code, "README.md", "exec"), {})
    assert asked == [{"gguf": "model.gguf", "onnx": "onnx"}]
    assert (tmp_path / "merged.qalora" / "manifest.json").is_file()
    assert capfd.readouterr() == ("", "")
