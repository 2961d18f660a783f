"""The package list in pyproject.toml is complete, imports go one way, and torch stays out of where it must not be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAME = "qalora_export"
# Subpackage or module of the first level -> what it may import beside itself: words from bytes, bytes from numbers.
NUMBERS = {"errors", "grid"}
BYTES = {*NUMBERS, "checkpoint", "memory", "progress", "recipe", "recipe_file", "safety", "version"}
ALLOWED = {
    "errors": set[str](),
    "memory": set[str](),
    "progress": set[str](),
    "version": set[str](),
    "grid": {"errors"},
    "safety": {"errors"},
    "recipe": {"errors", "safety"},
    "recipe_file": {"errors", "recipe", "safety"},
    "console": {"errors", "progress"},
    "checkpoint": {*NUMBERS, "progress", "safety", "version"},
    "data": {"errors", "progress", "safety"},
    "models": {"errors", "checkpoint", "progress", "recipe", "safety"},
    "formats": {*BYTES, "models"},
    "quantization": {*BYTES, "data", "formats", "models"},
    "qalora": {*BYTES, "data", "formats", "models"},
    "inspection": {*BYTES, "formats"},
    "evaluation": {*BYTES, "data", "models"},
    "verify": {*BYTES, "data", "evaluation", "formats", "installed", "models", "qalora", "quantization"},
    "scores": {*BYTES, "data", "evaluation", "formats", "models", "verify"},
    "comparison": {
        *(
            *BYTES,
            "data",
            "evaluation",
            "formats",
            "models",
            "qalora",
            "quantization",
            "scores",
            "stage_keys",
            "verify",
        ),
    },
    "model_card": {*BYTES, "evaluation", "verify"},
    "installed": {"safety"},
    "stage_keys": {"errors", "checkpoint", "installed", "safety"},
    "preflight": {*BYTES, "data", "evaluation", "formats", "models", "qalora", "quantization", "verify"},
    "stages": {"recipe", "checkpoint", "evaluation", "formats", "models", "qalora", "quantization", "verify"},
    "pipeline": {*BYTES, "model_card", "preflight", "qalora", "stage_keys", "stages", "verify"},
    "cli": {
        *BYTES,
        "comparison",
        "console",
        "evaluation",
        "formats",
        "inspection",
        "pipeline",
        "qalora",
        "quantization",
        "scores",
        "stages",
        "verify",
    },
}
# Inside verify/, as its docstring draws it: a module may import from its own part or an earlier one.
VERIFY = (
    "metrics",
    "rule",
    "identity",
    "store",
    "probes",
    "kernels",
    "runtimes",
    "check",
    "reference",
    "session",
    "target",
    "gates",
    "bisect",
    "report",
    "foreign",
    "device",
    "stage",
)
TORCH_FREE = (
    "qalora_export",
    "qalora_export.grid",
    "qalora_export.safety",
    "qalora_export.recipe_file",
    "qalora_export.checkpoint.canonical",
    "qalora_export.formats.gguf.export",
    "qalora_export.formats.gguf.read",
    "qalora_export.formats.onnx.read",
    "qalora_export.verify.metrics",
    "qalora_runtimes.answering",
    "qalora_runtimes.launch",
    "qalora_runtimes.patching",
    "qalora_runtimes.protocol",
)


def _packages(folder: str) -> set[str]:
    return {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / folder).rglob("__init__.py")}


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = _packages("qalora_export") | {n.replace("runtimes", "qalora_runtimes", 1) for n in _packages("runtimes")}
    assert set(listed) == found


def _modules() -> dict[str, Path]:
    """Dotted name -> file of every module of ours, packages by their own name."""
    found = {}
    for path in (ROOT / NAME).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, known: set[str]) -> set[str]:
    """Our own modules that a file imports: at its top, inside functions, for types alone, or by name in a string."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            named = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {inner if inner in known else str(node.module) for inner in named.values()}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != NAME:  # NAME: its logger
            found.add(node.value)
    return found & known


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Every module and what it imports."""
    modules = _modules()
    return {name: _imports(path, set(modules)) - {name} for name, path in modules.items()}


def _part(module: str, level: int = 1) -> str:
    """The name of a module at a level below the package; "" for what lies above."""
    return ".".join(module.split(".")[level : level + 1])


def test_no_modules_import_each_other(graph: dict[str, set[str]]) -> None:
    """Nowhere, however long the way round, and whenever it happens."""
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_subpackages_import_what_the_table_allows(graph: dict[str, set[str]]) -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if _part(module) and _part(target) not in {*ALLOWED[_part(module)], _part(module)}
    ]
    assert not wrong


def test_the_table_goes_one_way_and_names_everything(graph: dict[str, set[str]]) -> None:
    TopologicalSorter({part: others - {part} for part, others in ALLOWED.items()}).prepare()
    assert set(ALLOWED) == {_part(module) for module in graph} - {""}


def test_the_parts_of_verify_import_one_way(graph: dict[str, set[str]]) -> None:
    rank = {name: number for number, name in enumerate(VERIFY)}
    inside = {name: targets for name, targets in graph.items() if _part(name) == "verify" and _part(name, 2)}
    wrong = [
        f"{module} imports {target}"
        for module, targets in inside.items()
        for target in targets
        if target in inside and rank[_part(target, 2)] > rank[_part(module, 2)]
    ]
    assert {_part(name, 2) for name in inside} == set(VERIFY)
    assert not wrong


def test_no_runtime_is_loaded_into_our_own_process() -> None:
    """A kernel that crashes must end a process of its own (qalora_runtimes.launch)."""
    runtimes = {"onnxruntime", "onnxruntime_genai", "xllamacpp", "llama_cpp"}
    for path in (ROOT / "qalora_export").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        assert not runtimes & {name.split(".")[0] for name in names}, path


def test_runtimes_import_nothing_of_ours() -> None:
    for path in (ROOT / "runtimes").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "qalora_export" not in text.replace("qalora_export.verify", ""), path
        assert "import torch" not in text, path


def test_markup_stands_only_in_templates_of_styled() -> None:
    """The consoles read no markup in plain strings: a path may be called [/b]. Style comes from console.styled."""
    wrong = []
    for path in (ROOT / "qalora_export").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        allowed = {id(part) for call in calls if _name(call.func) == "styled" for part in ast.walk(call)}
        prints = [call for call in calls if _name(call.func) in ("print", "add_row", "add_column", "Table", "status")]
        for part in (part for call in prints for part in ast.walk(call)):
            text = part.value if isinstance(part, ast.Constant) and id(part) not in allowed else None
            if isinstance(text, str) and re.search(r"\[(/|bold|dim|red|green|yellow)", text):
                wrong.append(f"{path.relative_to(ROOT)}:{part.lineno}")
    assert not wrong


def _name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


@pytest.mark.parametrize("module", TORCH_FREE)
def test_torch_is_not_imported(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, module
