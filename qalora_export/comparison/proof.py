"""A deployable row is exported to both formats and proven; the table says what the gates said."""

from __future__ import annotations

from pathlib import Path

from qalora_export.comparison.bench import Bench
from qalora_export.comparison.method import Made
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.verify.stage import verify_parity


def gates_of(bench: Bench, made: Made, folder: Path) -> str | None:
    """ "21/21" when every gate passed, else how many did and the first that did not; None without exact exports.

    What was merged elsewhere than by `merge` has no adapter folder: the chain of its parents is then not asked for.
    """
    if made.checkpoint is None:
        return None
    recipe, gguf, onnx = bench.recipe, folder / "model.gguf", folder / "onnx"
    export_gguf(made.checkpoint, gguf, recipe.export.gguf)
    export_onnx(made.checkpoint, onnx, recipe.export.onnx)
    settings = recipe.verify.model_copy(update={"without_parents": made.base is None})
    report = verify_parity(
        made.checkpoint, folder / "report", settings, gguf=gguf, onnx=onnx, base=made.base, original=None
    )
    passed = [entry for entry in report.entries if entry.status == "pass"]
    others = [entry for entry in report.entries if entry.status != "pass"]
    text = f"{len(passed)}/{len(report.entries)}"
    return text if not others else f"{text}: {others[0].gate} {others[0].runtime} {others[0].status}"
