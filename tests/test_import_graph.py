"""Who may import whom: no cycle between any two modules, and only the edges of one table between subpackages.

Every import counts, also those inside functions, those for type checkers only, and names of modules in strings (the
table of verbs).
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "qalora_export"
NAME = "qalora_export"
# Subpackage or module -> what it may import beside itself. From numbers through bytes to words.
# Subpackage or module of the first level -> what it may import beside itself: words from bytes, bytes from numbers.
NUMBERS = {"errors", "grid"}
BYTES = {*NUMBERS, "checkpoint", "progress", "recipe", "safety", "version"}
ALLOWED = {
    "errors": set[str](),
    "version": set[str](),
    "progress": set[str](),
    "grid": {"errors"},
    "safety": {"errors"},
    "recipe": {"errors"},
    "console": {"errors", "progress"},
    "checkpoint": BYTES - {"recipe", "progress"},
    "data": {"errors", "progress", "safety"},
    "models": {"errors", "checkpoint", "safety"},
    "formats": {*BYTES, "models"},
    "quantization": {*BYTES, "data", "models"},
    "qalora": {*BYTES, "data", "formats", "models"},
    "inspection": {*BYTES, "formats"},
    "evaluation": {*BYTES, "data", "models"},
    "verify": {*BYTES, "data", "formats", "models", "qalora"},
    "model_card": {*BYTES},
    "pipeline": {*BYTES, "evaluation", "formats", "model_card", "qalora", "quantization", "verify"},
    "cli": {*BYTES, "console", "evaluation", "formats", "inspection", "pipeline", "qalora", "quantization", "verify"},
}


def modules() -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join((NAME, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """Our own modules that a file names, in any way."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != NAME:  # NAME: its logger
            found.add(node.value)
    return found & known


def graph() -> dict[str, set[str]]:
    files = modules()
    return {name: imports(path, set(files)) - {name} for name, path in files.items()}


def part(module: str) -> str:
    """What a module belongs to at the first level below the package; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def test_no_two_modules_import_each_other_in_any_way() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_a_cycle_is_found() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()


def test_subpackages_import_what_the_table_allows() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in sorted(targets)
        if part(module) not in ("", part(target)) and part(target) not in ALLOWED[part(module)]
    ]
    assert not wrong


def test_the_table_goes_one_way_and_names_everything() -> None:
    assert set(TopologicalSorter(ALLOWED).static_order()) == set(ALLOWED)
    assert set(ALLOWED) == {part(module) for module in modules()} - {""}
