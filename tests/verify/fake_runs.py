"""verify_parity on real artifacts with stand-in runtimes: what its tests have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qalora_export.recipe import VerifySettings
from qalora_export.verify.gates.registry import all_gates
from qalora_export.verify.report.parity_report import ParityReport
from qalora_export.verify.stage import verify_parity
from tests.verify.exports import Exported
from tests.verify.fakes import FakeRuntimes

SETTINGS = VerifySettings(threads=1)
ALL = ("llama.cpp", "onnxruntime", "onnxruntime-genai")
GATES = list(all_gates())
NEED_RUNS = ("G2", "G3", "G4", "G5", "G6")  # what a runtime answered, without which they are not run
MODES = ("prefill", "decode", "text", "behaviour")


def verify(
    exported: Exported, out: Path, fake: Callable[..., Any], runtimes: tuple[str, ...] = ("llama.cpp",)
) -> ParityReport:
    settings = SETTINGS.model_copy(update={"runtimes": runtimes})
    artifacts = {"gguf": exported.gguf, "onnx": exported.onnx}
    taps = FakeRuntimes(exported.checkpoint).taps
    return verify_parity(exported.checkpoint, out, settings, **artifacts, launch=fake, taps=taps, bisect=False)


def statuses(report: ParityReport, runtime: str = "llama.cpp") -> dict[str, str]:
    return {entry.gate: entry.status for entry in report.entries if entry.runtime == runtime}
