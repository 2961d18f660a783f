"""A deployable row is exported to both formats, proven, and asked the task in llama.cpp, for the table to say so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qalora_export.comparison.bench import Bench
from qalora_export.comparison.method import Made
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.scores.running import Running
from qalora_export.verify.stage import verify_parity


@dataclass(frozen=True, slots=True)
class Proof:
    """gates: "21/21" when every gate passed, else how many did and the first that did not; None without exact exports.
    answered: questions that llama.cpp answers exactly on the deployed GGUF file.
    """

    gates: str | None
    answered: int


def proof_of(bench: Bench, made: Made, folder: Path) -> Proof | None:
    """None for what is deployed neither as a canonical checkpoint's exports nor as a GGUF file."""
    if made.gguf is not None:
        return Proof(None, _answered(bench, made.gguf, folder))
    if made.checkpoint is None:
        return None
    gguf = folder / "model.gguf"
    export_gguf(made.checkpoint, gguf, bench.recipe.export.gguf)
    return Proof(_gates(bench, made, made.checkpoint, gguf, folder), _answered(bench, gguf, folder))


def _answered(bench: Bench, gguf: Path, folder: Path) -> int:
    settings = bench.evaluation
    running = Running(gguf, folder / "running", threads=bench.recipe.verify.threads)
    answers = running.answers([ids for ids, _ in bench.asked], settings.max_new_tokens)
    return bench.right(answers)


def _gates(bench: Bench, made: Made, checkpoint: Path, gguf: Path, folder: Path) -> str:
    """What was merged elsewhere than by `merge` has no adapter folder: the chain of its parents is not asked for."""
    recipe, onnx = bench.recipe, folder / "onnx"
    export_onnx(checkpoint, onnx, recipe.export.onnx)
    settings = recipe.verify.model_copy(update={"without_parents": made.base is None})
    report = verify_parity(checkpoint, folder / "report", settings, gguf=gguf, onnx=onnx, base=made.base, original=None)
    passed = [entry for entry in report.entries if entry.status == "pass"]
    others = [entry for entry in report.entries if entry.status != "pass"]
    text = f"{len(passed)}/{len(report.entries)}"
    return text if not others else f"{text}: {others[0].gate} {others[0].runtime} {others[0].status}"
