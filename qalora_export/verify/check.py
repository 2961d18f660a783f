"""The checks of verify-parity without its work: artifacts, runtimes, probe set."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from packaging.requirements import Requirement
from qalora_runtimes.launch import RUNNERS

from qalora_export.checkpoint.forecast import Forecast
from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.models.loading import load_tokenizer
from qalora_export.recipe import VerifySettings
from qalora_export.verify.probes.probe_set import make_probes
from qalora_export.verify.runtimes.record import all_runtimes

OURS = "qalora-export"
IMPORT_SECONDS = 120
LOGITS_KEPT = 4  # arrays of log-probabilities at one time, at most: prefill and decode of two paths


@dataclass(frozen=True, slots=True)
class VerifyForecast:
    """sequences, positions: of the probe set. workspace: bytes that verify-parity writes for a while."""

    sequences: int
    positions: int
    workspace: int


def wanted_runtimes(settings: VerifySettings, formats: set[str]) -> list[str]:
    """The runtimes that will be verified. formats: what will be exported ("gguf", "onnx").

    Raises InputError for a runtime whose artifact the recipe does not export.
    """
    records = all_runtimes()
    if settings.runtimes is None:
        return [name for name, record in records.items() if record.format in formats]
    for name in settings.runtimes:
        if records[name].format not in formats:
            raise InputError(
                f"{name} is requested but the recipe exports no {records[name].format}",
                where="verify.runtimes",
                fix=f"add [export.{records[name].format}], or leave the runtime out",
            )
    return list(settings.runtimes)


def check_runtime(name: str) -> None:
    """Raise RuntimeUnavailableError for a runtime that is not installed or cannot be imported."""
    if (problem := import_problem(name)) is not None:
        package = RUNNERS[name].package
        raise RuntimeUnavailableError(
            f"the runtime {name} cannot be used here",
            where=f"{package} in {sys.prefix}",
            why=problem,
            fix=f"pip install --force-reinstall {package}, or leave it out of [verify] runtimes",
        )


def untried_version(name: str) -> str | None:
    """A note when the runtime's package is outside the versions that this one declares; None when it is among them, or
    nothing is declared here (a source tree that was never installed).
    """
    package = RUNNERS[name].package
    try:
        version, declared = importlib.metadata.version(package), importlib.metadata.requires(OURS) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = next((want for want in map(Requirement, declared) if want.name == package), None)
    if found is None or found.specifier.contains(version, prereleases=True):
        return None
    return f"{package} {version} is installed; qalora-export is tested with {package}{found.specifier}"


def check_probes(
    forecast: Forecast, settings: VerifySettings, runtimes: list[str], artifacts: Mapping[str, int]
) -> VerifyForecast:
    """The probe set of these settings. artifacts: format -> bytes of what the exports before it will write.

    Raises InputError for unusable prompts.
    """
    formats = {all_runtimes()[name].format for name in runtimes}
    probes = make_probes(load_tokenizer(forecast.path), dict(forecast.config), settings, formats=formats)
    # The float32 twin for llama.cpp's exact path; copies of the ONNX folder for that of others; log-probabilities.
    twin = 4 * forecast.parameters if "llama.cpp" in runtimes else 0
    logprobs = probes.ids.size * int(forecast.config["vocab_size"]) * 4
    workspace = twin + sum(artifacts.values()) + LOGITS_KEPT * logprobs
    return VerifyForecast(len(probes.lengths), int(probes.ids.size), workspace)


@cache
def import_problem(runtime: str) -> str | None:
    """Why a runtime's package cannot be imported, in a process of its own; None when it can."""
    name = RUNNERS[runtime].package.replace("-", "_")
    command = [sys.executable, "-P", "-c", f"import {name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"import {name} gave no answer within {IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1][:300] if lines else f"import {name} ended with {done.returncode}"
