"""What the documents show is run: the code of EXTENDING.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qalora_export
from qalora_export.models.families.family import Family
from qalora_export.verify.rule import Entry

EXTENDING = Path(qalora_export.__file__).parent / "EXTENDING.md"
BLOCKS = re.findall(r"```python\n(.*?)```", EXTENDING.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_the_examples_of_extending_run(code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, str(EXTENDING), "exec"), names)
    if "GATE" not in names:
        assert isinstance(names["MINE"], Family)
        return

    class Target:
        name = "a runtime"

    entry = names["example"](Target)  # type: ignore[operator]
    assert isinstance(entry, Entry)
    assert entry.status == "pass"


def test_files_that_the_documents_name_exist() -> None:
    root = EXTENDING.parent
    for document in ("EXTENDING.md", "DESIGN.md"):
        for name in re.findall(r"`((?:tests/|runtimes/)?[a-z_/]+\.py)`", (root / document).read_text(encoding="utf-8")):
            places = (root / name, root.parent / name, root / "models/families" / name)
            places += tuple(root.parent.glob(f"tests/**/{name}")) + tuple(root.glob(f"**/{name}"))
            assert any(place.is_file() for place in places), f"{document}: {name}"
