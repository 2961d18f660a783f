"""What the asked methods need beside this package, looked for before anything is trained."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qalora_runtimes.launch import available

from qalora_export.comparison.method import Method
from qalora_export.errors import InputError, QaloraError, RuntimeUnavailableError, together
from qalora_export.recipe import Recipe
from qalora_export.verify.runtimes.record import all_runtimes

CALIBRATION, PEFT, BITSANDBYTES, SCIPY, LLAMA_CPP = "calibration", "peft", "bitsandbytes", "scipy", "llama.cpp"
PACKAGES = {PEFT: "LoRA", BITSANDBYTES: "NF4", SCIPY: "integer programming"}


def require(recipe: Recipe, methods: Collection[Method]) -> None:
    """Raises InputError for data that is missing, RuntimeUnavailableError for packages; all that is missing at once."""
    asked = dict[str, list[str]]()
    for method in methods:
        for need in method.needs:
            asked.setdefault(need, []).append(method.id)
    if recipe.compare.speed and any(method.artifact for method in methods):
        asked.setdefault(LLAMA_CPP, []).append("[compare] speed")
    if recipe.compare.prove and any(method.artifact for method in methods):
        gates = (recipe.verify.runtimes or all_runtimes()) if any(method.exact for method in methods) else ()
        for runtime in dict.fromkeys((LLAMA_CPP, *gates)):
            asked.setdefault(runtime, []).append("[compare] prove")
    missing = [error for need, who in asked.items() if (error := _missing(need, recipe, ", ".join(who))) is not None]
    if missing:
        raise together(missing)


def imported(package: str) -> Any:
    """A package of the [compare] extra. Raises RuntimeUnavailableError, also for one that does not load here."""
    try:
        return importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeUnavailableError(
            f"{package} is needed",
            where=PACKAGES[package],
            why=str(error),
            fix="pip install 'qalora-export[compare]', or leave these methods out of [compare] methods",
        ) from error


def _missing(need: str, recipe: Recipe, who: str) -> QaloraError | None:
    """who: the methods and settings that ask for it."""
    try:
        if need == CALIBRATION:
            _require_text(recipe.quantize.calibration)
        elif need in PACKAGES:
            imported(need)
        else:
            _require_runtime(need)
    except QaloraError as error:
        return type(error)(error.what, where=f"{error.where}: {who}", why=error.why, fix=error.fix)
    return None


def _require_runtime(name: str) -> None:
    found = next(runtime for runtime in available() if runtime.name == name)
    if found.version is None:
        raise RuntimeUnavailableError(
            f"{name} is needed",
            where=found.package,
            why="it is not installed",
            fix="pip install 'qalora-export[runtimes]', or leave out what asks for it: [compare] methods, prove, speed",
        )


def _require_text(file: str | None) -> None:
    if file is None or not Path(file).is_file():
        raise InputError(
            "GPTQ needs calibration text",
            where="[quantize] calibration",
            why="none is named" if file is None else f"there is no file {file}",
            fix="name a plain text or JSONL file, or leave these methods out of [compare] methods",
        )
