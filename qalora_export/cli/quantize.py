"""qalora-export quantize"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import typer
from rich.table import Table

from qalora_export.grid import AFFINE16
from qalora_export.recipe import GridName, Preset, QuantizeSettings

if TYPE_CHECKING:
    from qalora_export.quantization.report import ModuleReport, QuantizeReport

D = QuantizeSettings()  # one source of defaults: the recipe's
GRID, GPTQ = "Grid", "GPTQ"


def command(
    model: str = typer.Argument(
        ..., help="Transformers folder (fp16, bf16 or fp32, or in GPTQ format), .gguf file, or hub id (owner/name)."
    ),
    out: Path = typer.Option(..., "--out", help="Folder for the canonical checkpoint."),
    method: str | None = typer.Option(
        None,
        metavar="gptq|mse|rtn",
        help="gptq needs calibration text; without data, mse: the grid of least squared error in every group, rtn: "
        f"from the least to the largest weight. \\[default: {D.method}]",
    ),
    bits: int | None = typer.Option(
        None, metavar="2|3|4|5|8", help=f"Bits per code. \\[default: {D.bits}]", rich_help_panel=GRID
    ),
    group_size: int | None = typer.Option(
        None,
        metavar="32|64|128",
        help=f"In-features that share scale and offset. \\[default: {D.group_size}]",
        rich_help_panel=GRID,
    ),
    grid: str | None = typer.Option(
        None,
        metavar="|".join(get_args(GridName)),
        help="affine16: float16 scale and offset of every group; q4_k, q5_k, q2_k: those of GGUF Q4_K, Q5_K and "
        "Q2_K, 4.5, 5.5, 2.625 bits per weight, for in-features that 256 divides; q6_k, q8_0, q4_0: symmetric, for "
        f"what is not trained. \\[default: {D.grid}]",
        rich_help_panel=GRID,
    ),
    preset: str | None = typer.Option(
        None,
        metavar="|".join(get_args(Preset)),
        help="A mix of grids: q4_k, with q5_k in v_proj and down_proj where llama.cpp's Q4_K_M has more bits, and "
        "lm_head and embedding in blocks. Rules beat it.",
        rich_help_panel=GRID,
    ),
    strict_groups: bool | None = typer.Option(
        None,
        "--strict-groups/--fit-groups",
        help="Refuse in-features that the group size does not divide, or (default) take the next smaller size that "
        "does, else leave the module in 16 bits.",
        rich_help_panel=GRID,
    ),
    sym: bool | None = typer.Option(
        None,
        "--sym/--asym",
        help="sym: offset is −2^(bits−1) · scale, as GGUF Q4_0 has it. \\[default: asym]",
        rich_help_panel=GRID,
    ),
    rule: list[str] = typer.Option(
        [],
        "--rule",
        help="'pattern=skip' or 'pattern=bits:3,group:64,sym:true,grid:affine16' on module names; may be repeated, "
        "the first that matches wins.",
        rich_help_panel=GRID,
    ),
    calibration: Path | None = typer.Option(
        None, help='Plain text, or JSONL with "text" or "messages" a line.', rich_help_panel=GPTQ
    ),
    calibration_samples: int | None = typer.Option(
        None, help=f"Sequences of calibration text. \\[default: {D.calibration_samples}]", rich_help_panel=GPTQ
    ),
    sequence_length: int | None = typer.Option(
        None, help=f"Tokens in each of them. \\[default: {D.sequence_length}]", rich_help_panel=GPTQ
    ),
    damp: float | None = typer.Option(
        None, help=f"Damping, a share of the Hessian's mean diagonal. \\[default: {D.damp}]", rich_help_panel=GPTQ
    ),
    block_size: int | None = typer.Option(
        None, help=f"Columns between lazy updates: speed only. \\[default: {D.block_size}]", rich_help_panel=GPTQ
    ),
    sweeps: int | None = typer.Option(
        None, help=f"Passes that choose grid and codes anew; 0: none. \\[default: {D.sweeps}]", rich_help_panel=GPTQ
    ),
    seed: int | None = typer.Option(
        None, help=f"Chooses the calibration sequences. \\[default: {D.seed}]", rich_help_panel=GPTQ
    ),
    checkpoint_format: str | None = typer.Option(
        None, metavar="gptq|gptq_v2", help="How a GPTQ checkpoint stores zero points, when it does not say rightly."
    ),
    dequantize: bool | None = typer.Option(
        None, "--dequantize", help="GGUF: take other K-quants and types without a canonical form as float, anew."
    ),
    revision: str | None = typer.Option(None, help="Branch, tag or commit of a hub model."),
    recipe: Path | None = typer.Option(None, help="Take settings from the quantize table of a recipe; flags beat it."),
    force: bool = typer.Option(False, "--force", help="Replace the output if it exists."),
) -> None:
    """Quantize a model into a canonical checkpoint: codes, scale and offset.

    One decoder layer is in memory at a time, on the GPU when there is one. Embeddings, norms, biases and lm_head stay
    as they are, bit for bit, unless a preset or a rule names one. A checkpoint in GPTQ format and a GGUF file in Q4_K,
    Q5_K, Q6_K, Q2_K, Q4_1, Q4_0, Q5_0, Q5_1 or Q8_0 are imported with their own codes; nothing is quantized again.

    [bold]Examples[/bold]

    GPTQ, 4 bits, groups of 32, with text of the kind the model will read:

      qalora-export quantize my-model --out base.qalora --calibration text.txt

    3 bits, but 4 for the down projections:

      qalora-export quantize my-model --out base.qalora --calibration chats.jsonl --bits 3 --rule '*.down_proj=bits:4'

    The sizes of llama.cpp's Q4_K_M:

      qalora-export quantize my-model --out base.qalora --calibration text.txt --preset q4_k_m

    8 bits for the embedding, which no wildcard reaches:

      qalora-export quantize my-model --out base.qalora --method rtn --rule 'model.embed_tokens=grid:q8_0'

    The first layer untouched, no data at hand:

      qalora-export quantize my-model --out base.qalora --method rtn --rule 'model.layers.0.*=skip'

    A GPTQ checkpoint whose config does not say how zero points are stored:

      qalora-export quantize my-model-gptq --out base.qalora --checkpoint-format gptq

    A GGUF file, to fine-tune it; a model of the hub:

      qalora-export quantize model.Q4_1.gguf --out base.qalora

      qalora-export quantize HuggingFaceTB/SmolLM2-135M-Instruct --out base.qalora --method rtn
    """
    given = {name: value for name, value in locals().items() if name in QuantizeSettings.model_fields}
    from qalora_export.console import next_command
    from qalora_export.quantization.rules import parse_rule
    from qalora_export.quantization.stage import quantize
    from qalora_export.recipe_file import load_recipe, validated

    values: dict[str, Any] = load_recipe(recipe).quantize.model_dump(mode="json", exclude_none=True) if recipe else {}
    values |= {name: value for name, value in given.items() if value is not None}
    if rule:
        values["rules"] = [parse_rule(text).model_dump(mode="json", exclude_none=True) for text in rule]
    settings = validated(QuantizeSettings, values, where="quantize options")
    report = quantize(model, out, settings, force=force, revision=revision)
    print_report(report)
    next_command(shlex.join(["qalora-export", "train", str(out), "--data", "train.jsonl", "--out", "adapter"]))


WORST = 5  # modules named on the terminal; all of them are in the report file


def _kinds(report: QuantizeReport) -> Table:
    """One row for every kind of module that was treated alike."""
    kinds: dict[tuple[str, str, int], list[ModuleReport]] = {}
    for module in report.modules:
        grid = "" if module.grid == AFFINE16.name else f" {module.grid}"
        bits = f"{module.bits}{' sym' if module.sym else ''}{grid}"
        kinds.setdefault((module.kind, bits, module.group_size), []).append(module)
    table = Table("kind", title=f"quantized ({report.method})", title_justify="left")
    for heading in ("count", "bits", "group", "weight error\nmean", "\nworst", "output error\nmean", "\nworst"):
        table.add_column(heading, justify="right")
    for (kind, bits, group), modules in kinds.items():
        weight = [module.relative_error for module in modules]
        output = [module.output_error for module in modules if module.output_error is not None]
        table.add_row(kind, str(len(modules)), bits, str(group), *_mean_and_worst(weight), *_mean_and_worst(output))
    return table


def _mean_and_worst(errors: list[float]) -> tuple[str, str]:
    return (f"{sum(errors) / len(errors):.2g}", f"{max(errors):.2g}") if errors else ("", "")


def _worst(report: QuantizeReport) -> Table:
    """The few modules that lost most: of their output where calibration text tells, else of their weights."""
    worst = sorted(report.modules, key=lambda m: (m.output_error or 0.0, m.relative_error), reverse=True)[:WORST]
    table = Table(title=f"the worst {len(worst)} of {len(report.modules)}", title_justify="left")
    table.add_column("module", overflow="fold")
    for heading in ("shape", "weight error", "output error"):
        table.add_column(heading, justify="right")
    for module in worst:
        output = "" if module.output_error is None else f"{module.output_error:.2g}"
        table.add_row(module.name, f"{module.shape[0]}×{module.shape[1]}", f"{module.relative_error:.2g}", output)
    return table


def print_report(report: QuantizeReport) -> None:
    """Errors by kind of module, the worst few, what it took, and where all of it is."""
    from qalora_export.console import console
    from qalora_export.quantization.report import REPORT

    console.print(_kinds(report))
    console.print(_worst(report))
    console.print(
        f"{len(report.modules)} matrices of {report.weights:,} weights, {report.bits_per_weight:.2f} bits per weight, "
        f"{report.changed:,} weights changed; {report.kept} other tensors kept bit for bit"
    )
    memory = f"{report.peak_rss_bytes / 2**30:.2f} GiB"
    if report.peak_cuda_bytes is not None:
        memory += f", {report.peak_cuda_bytes / 2**30:.2f} GiB on the GPU"
    text = f", {report.calibration_tokens:,} calibration tokens" if report.calibration_tokens else ""
    console.print(f"{report.seconds:.1f} s, peak memory {memory}{text}")
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(f"checkpoint: {report.out}   every module: {report.out / REPORT}")
