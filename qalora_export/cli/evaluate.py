"""`qalora-export evaluate MODEL --data test.jsonl`"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from qalora_export.console import console, next_command


def command(
    model: Annotated[Path, typer.Argument(help="Model folder, plain or canonical.")],
    data: Annotated[Path, typer.Option(help="Chat JSONL whose last turn is the expected answer.")],
    out: Annotated[Path | None, typer.Option(help="Write the score as JSON.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N samples.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
) -> None:
    """Task score: greedy answers, exact match with the expected text.

    [bold]Examples[/bold]

      qalora-export evaluate build/demo/merged.qalora --data samples/devices/test.jsonl
    """
    from qalora_export.evaluation import evaluate
    from qalora_export.recipe import EvaluateSettings

    settings = EvaluateSettings(data=str(data), limit=limit, max_new_tokens=max_new_tokens)
    score = evaluate(model, settings, out, force=force)
    console.print(f"exact match {score.exact}/{score.total} = {score.accuracy:.1%}")
    for miss in score.misses:
        console.print(f"  {miss.prompt!r}: expected {miss.expected!r}, got {miss.answer!r}")
    next_command(shlex.join(["qalora-export", *_next(model)]))


def _next(model: Path) -> list[str]:
    from qalora_export.checkpoint.canonical import QUANT_METHOD
    from qalora_export.checkpoint.model_folder import ModelFolder

    quantization = ModelFolder(model).config.get("quantization_config") or {}
    if quantization.get("quant_method") == QUANT_METHOD:
        return ["export", "gguf", str(model), "--out", str(model.with_suffix(".gguf"))]
    return ["quantize", str(model), "--calibration", "text.txt", "--out", "base.qalora"]
