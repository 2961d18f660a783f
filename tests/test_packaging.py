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
# A module may import from its own layer or a lower one.
LAYERS = (
    {"errors", "version", "progress", "memory"},
    {"grid", "safety", "console", "recipe"},
    {"checkpoint"},
    {"models", "data"},
    {"formats"},
    {"quantization", "qalora"},
    {"verify", "inspection", "evaluation", "model_card"},
    {"pipeline"},
    {"cli"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Found by name at import time or when called, not a dependency of the layer.
ALLOWED = {("grid", "safety")}
TORCH_FREE = (
    "qalora_export",
    "qalora_export.grid",
    "qalora_export.safety",
    "qalora_export.recipe",
    "qalora_export.checkpoint.canonical",
    "qalora_export.formats.gguf.export",
    "qalora_export.formats.gguf.read",
    "qalora_export.formats.onnx.read",
    "qalora_export.verify.metrics",
    "qalora_runtimes.launch",
    "qalora_runtimes.protocol",
)


def _packages(folder: str) -> set[str]:
    return {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / folder).rglob("__init__.py")}


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = _packages("qalora_export") | {n.replace("runtimes", "qalora_runtimes", 1) for n in _packages("runtimes")}
    assert set(listed) == found


def _imports(path: Path) -> set[str]:
    """First component below qalora_export of everything a module imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("qalora_export.")}
    return found


def test_imports_go_one_way() -> None:
    wrong = []
    for path in (ROOT / "qalora_export").rglob("*.py"):
        parts = path.relative_to(ROOT / "qalora_export").with_suffix("").parts
        if parts[0] == "__init__":
            continue
        for target in _imports(path):
            if RANK[target] > RANK[parts[0]] and (parts[0], target) not in ALLOWED:
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong


def _modules() -> dict[str, Path]:
    """Dotted name -> file of every module of ours, packages by their own name."""
    found = {}
    for path in (ROOT / "qalora_export").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _edges(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules that a module imports at its top level, also for its types alone (under TYPE_CHECKING)."""
    waiting, found = list(ast.parse(path.read_text(encoding="utf-8")).body), set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            base = ".".join(package.split(".")[: 1 - node.level or None]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            found |= {inner if (inner := f"{source}.{alias.name}") in modules else source for alias in node.names}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return {target for target in found if target in modules and target != name}


def test_no_modules_import_each_other() -> None:
    """Nowhere, however long the way round; imports for types alone count, imports inside functions do not."""
    modules = _modules()
    lazy_face = {"qalora_export"}  # its TYPE_CHECKING imports name what it fetches on first use
    edges = {
        name: set() if name in lazy_face else _edges(name, path, modules) - lazy_face for name, path in modules.items()
    }
    TopologicalSorter(edges).prepare()  # raises CycleError, which names the modules


# Inside verify/, as its docstring draws it. A module may import from its own part or an earlier one.
VERIFY = (
    {"metrics", "rule"},
    {"probes"},
    {"runtimes"},
    {"reference"},
    {"session"},
    {"gates"},
    {"bisect"},
    {"report"},
    {"stage"},
)
VERIFY_RANK = {name: rank for rank, names in enumerate(VERIFY) for name in names}


def test_the_parts_of_verify_import_one_way() -> None:
    folder, wrong = ROOT / "qalora_export" / "verify", []
    for path in folder.rglob("*.py"):
        part = path.relative_to(folder).with_suffix("").parts[0]
        if part == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) and node.module else ""
            targets = [module] if module != "qalora_export.verify" else [f"{module}.{a.name}" for a in node.names]
            for target in targets:
                if target.startswith("qalora_export.verify.") and VERIFY_RANK[target.split(".")[2]] > VERIFY_RANK[part]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {target}")
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
