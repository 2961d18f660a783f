"""`qalora-export evaluate MODEL --data test.jsonl`"""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qalora_export.console import console, next_command


class Match(StrEnum):
    """EvaluateSettings.match"""

    EXACT = "exact"
    REGEX = "regex"


def command(
    model: Annotated[Path, typer.Argument(help="Model folder (plain or canonical), GGUF file or ONNX folder.")],
    data: Annotated[Path | None, typer.Option(help="Chat JSONL whose last turn is the expected answer.")] = None,
    text: Annotated[Path | None, typer.Option(help="Instead: perplexity of running text, .txt or JSONL.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the score as JSON.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N samples, or windows of the text.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
    match: Annotated[
        Match, typer.Option(help="regex: the expected answer is a regular expression to find in the answer.")
    ] = Match.EXACT,
    runtime: Annotated[
        str | None, typer.Option(help="Of a file: llama.cpp, onnxruntime (default of a folder) or onnxruntime-genai.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
) -> None:
    """Task score by greedy answers, or perplexity of text; of an exported artifact through its own runtime.

    A GGUF file is asked in llama.cpp and an ONNX folder in ONNX Runtime, by their own tokenizer, template and end
    tokens; a model folder in PyTorch.

    [bold]Examples[/bold]

      qalora-export evaluate build/demo/merged.qalora --data samples/devices/test.jsonl

      qalora-export evaluate build/demo/model.gguf --data samples/devices/test.jsonl --limit 50

      qalora-export evaluate build/demo/onnx --text samples/base/model/calibration.txt --limit 8
    """
    from qalora_export.errors import InputError
    from qalora_export.recipe import EvaluateSettings
    from qalora_export.scores.stage import evaluate, perplexity

    if (data is None) == (text is None):
        raise InputError(
            "give one of --data and --text",
            why="--data scores answers, --text predicts running text",
            fix="for both, run this twice",
        )
    if text is not None:
        found = perplexity(model, text, out, limit=limit, runtime=runtime, force=force)
        console.print(
            f"{found.runtime}: {found.nats_per_token:.4f} nats per token, perplexity {found.perplexity:.3f} "
            f"({found.tokens} tokens in {found.windows} windows)"
        )
    else:
        settings = EvaluateSettings(data=str(data), limit=limit, max_new_tokens=max_new_tokens, match=match.value)
        score = evaluate(model, settings, out, runtime=runtime, force=force)
        how = "exact match" if match is Match.EXACT else "regular expression found"
        console.print(f"{score.runtime}: {how} {score.exact}/{score.total} = {score.accuracy:.1%}")
        for miss in score.misses:
            console.print(f"  {miss.prompt!r}: expected {miss.expected!r}, got {miss.answer!r}")
    next_command(shlex.join(["qalora-export", *_next(model)]))


def _next(model: Path) -> list[str]:
    from qalora_export.scores.running import format_of

    if format_of(model) is not None:
        return ["inspect", str(model)]
    from qalora_export.checkpoint.canonical import QUANT_METHOD
    from qalora_export.checkpoint.model_folder import ModelFolder

    quantization = ModelFolder(model).config.get("quantization_config") or {}
    if quantization.get("quant_method") == QUANT_METHOD:
        return ["export", "gguf", str(model), "--out", str(model.with_suffix(".gguf"))]
    return ["quantize", str(model), "--calibration", "text.txt", "--out", "base.qalora"]
