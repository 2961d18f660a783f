"""`qalora-export train`: fine-tune a canonical base with QA-LoRA."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qalora_export.recipe import TrainSettings

if TYPE_CHECKING:
    from qalora_export.qalora.training.memory import MemoryEstimate
    from qalora_export.qalora.training.plan import TrainPlan
    from qalora_export.qalora.training.stage import TrainReport

D = TrainSettings()  # one source of defaults: the recipe's
DATA, ADAPTER, RUN, MACHINE = "Data", "Adapter", "Optimization", "Device and run"


def command(
    base: Path = typer.Argument(..., help="canonical checkpoint, made by `qalora-export quantize`"),
    data: Path = typer.Option(..., "--data", help="training data: JSONL or .txt", rich_help_panel=DATA),
    validation: Path | None = typer.Option(
        None, "--validation", help="held-out data: its loss chooses the adapter to keep", rich_help_panel=DATA
    ),
    out: Path = typer.Option(..., "--out", help="folder for the adapter"),
    format: str = typer.Option(D.format, "--format", metavar="auto|chat|instruction|text", rich_help_panel=DATA),
    sequence_length: int = typer.Option(
        D.sequence_length, help="longest sample in tokens; longer text is divided", rich_help_panel=DATA
    ),
    too_long: str = typer.Option(
        D.too_long,
        metavar="drop|truncate|error",
        help="longer conversations: left out and counted, cut at the end, or refused",
        rich_help_panel=DATA,
    ),
    packing: bool = typer.Option(
        D.packing, "--packing/--no-packing", help="several samples per row, none sees another", rich_help_panel=DATA
    ),
    rank: int = typer.Option(D.rank, help="rank r of the adapter", rich_help_panel=ADAPTER),
    alpha: float = typer.Option(D.alpha, help="the update is scaled by alpha / rank", rich_help_panel=ADAPTER),
    pool: int | None = typer.Option(
        D.pool, help="pool length: each module's own group size (default), or a multiple of it", rich_help_panel=ADAPTER
    ),
    scales: bool = typer.Option(
        D.scales,
        "--scales/--no-scales",
        help="QA-LoRA+: train scales too, with an adapter of this rank of their own; merges as exactly",
        rich_help_panel=ADAPTER,
    ),
    targets: list[str] = typer.Option(
        list(D.targets), help="shell pattern on module names; may be repeated", rich_help_panel=ADAPTER
    ),
    epochs: float = typer.Option(D.epochs, rich_help_panel=RUN),
    max_steps: int = typer.Option(D.max_steps, help="optimizer steps; beats --epochs when > 0", rich_help_panel=RUN),
    batch_size: int = typer.Option(D.batch_size, help="rows per step and device", rich_help_panel=RUN),
    gradient_accumulation: int = typer.Option(
        D.gradient_accumulation, help="batches per optimizer step", rich_help_panel=RUN
    ),
    learning_rate: float = typer.Option(D.learning_rate, rich_help_panel=RUN),
    warmup_ratio: float = typer.Option(D.warmup_ratio, help="share of the steps to warm up", rich_help_panel=RUN),
    schedule: str = typer.Option(D.schedule, metavar="cosine|linear|constant", rich_help_panel=RUN),
    weight_decay: float = typer.Option(D.weight_decay, rich_help_panel=RUN),
    max_grad_norm: float = typer.Option(D.max_grad_norm, help="gradients are clipped to this", rich_help_panel=RUN),
    optimizer: str = typer.Option(
        D.optimizer,
        help="Transformers' optim name, e.g. adamw_torch_fused, adamw_bnb_8bit, paged_adamw_8bit",
        rich_help_panel=RUN,
    ),
    evaluate_every: int | None = typer.Option(
        D.evaluate_every, help="steps between evaluations and checkpoints (default: ten per run)", rich_help_panel=RUN
    ),
    seed: int = typer.Option(D.seed, rich_help_panel=RUN),
    precision: str = typer.Option(
        D.precision,
        metavar="auto|fp32|bf16",
        help="auto: bf16 on a GPU that has it, else fp32",
        rich_help_panel=MACHINE,
    ),
    gradient_checkpointing: bool = typer.Option(
        D.gradient_checkpointing,
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="less memory, about a third more time",
        rich_help_panel=MACHINE,
    ),
    compile: bool = typer.Option(
        D.compile,
        "--compile/--no-compile",
        help="torch.compile the decoder layers: slow to start, for long runs",
        rich_help_panel=MACHINE,
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="estimate memory, count steps, stop", rich_help_panel=RUN),
    resume: bool = typer.Option(
        True, "--resume/--no-resume", help="go on from the last checkpoint of a killed run", rich_help_panel=MACHINE
    ),
    force: bool = typer.Option(False, "--force", help="replace an existing output or another run's checkpoints"),
) -> None:
    """Fine-tune a canonical base with QA-LoRA, so that merging loses nothing.

    Data is JSONL: chat {"messages": \\[{"role", "content"}, ...]} or {"conversations": \\[{"from", "value"}, ...]},
    instruction {"instruction", "input", "output"}, {"prompt", "completion"} or text {"text"}; or one .txt file. The
    tokenizer's own chat template is used and only the answers are learned.

    The adapter with the lowest validation loss is kept. Beside it, OUT.training/ holds metrics.jsonl, report.json,
    loss.png, loss.svg and TensorBoard logs, and the checkpoints of a run that was interrupted: the same command goes on
    from there. On several GPUs, start it with torchrun (every GPU holds the model) or with accelerate's FSDP (every GPU
    holds its share).

    [bold]Examples[/bold]

      qalora-export train base.qalora --data train.jsonl --validation val.jsonl --out adapter

      qalora-export train base.qalora --data train.jsonl --out adapter --targets '*.q_proj' --targets '*.v_proj'

      qalora-export train base.qalora --data train.jsonl --out adapter --batch-size 4 --packing --dry-run

      torchrun --nproc_per_node 4 -m qalora_export.cli train base.qalora --data train.jsonl --out adapter

      accelerate launch --use_fsdp --fsdp_version 2 --mixed_precision no --num_processes 4 -m qalora_export.cli
      train base.qalora --data train.jsonl --out adapter
    """
    values = {name: value for name, value in locals().items() if name in TrainSettings.model_fields}
    from qalora_export.console import console
    from qalora_export.qalora.training.processes import is_main
    from qalora_export.recipe_file import validated

    settings = validated(TrainSettings, values, where="train options")
    if not is_main():
        console.quiet = True  # rank 0 speaks for all
    if dry_run:
        from qalora_export.qalora.training.memory import check_fits
        from qalora_export.qalora.training.plan import plan

        made = plan(base, settings)
        _print_plan(made, settings.targets)
        check_fits(made.memory)
        console.print("it fits: run the same command without --dry-run")
        return
    from qalora_export.console import next_command
    from qalora_export.qalora.training.stage import train

    report = train(base, out, settings, force=force, resume=resume)
    _print_report(report, out)
    next_command(
        shlex.join(["qalora-export", "merge", str(base), str(out), "--out", str(out.with_name("merged.qalora"))])
    )


def _print_plan(made: TrainPlan, targets: tuple[str, ...]) -> None:
    from rich.table import Table

    from qalora_export.console import console
    from qalora_export.memory import bytes_text
    from qalora_export.qalora.targets import describe, left_alone

    memory: MemoryEstimate = made.memory
    console.print(
        f"{made.samples} samples, {made.tokens} tokens, {len(made.train)} rows; {made.steps.total} steps, "
        f"{made.steps.per_epoch} per epoch, evaluation every {made.steps.evaluate_every}"
    )
    for name, account in made.accounts.items():
        console.print(f"{name}: {account.describe()}")
    if alone := left_alone(targets, made.untrained):
        console.print(describe(alone))
    console.print(f"{memory.trainable_parameters:,} trainable parameters in {memory.adapted_modules} modules")
    table = Table("memory per device", "estimate", title=f"compute in {str(made.dtype).removeprefix('torch.')}")
    table.columns[1].justify = "right"
    for name, size in memory.rows():
        table.add_row(name, bytes_text(size))
    table.add_section()
    table.add_row("total", bytes_text(memory.total))
    console.print(table)


def _print_report(report: TrainReport, out: Path) -> None:
    from qalora_export.console import console
    from qalora_export.memory import bytes_text
    from qalora_export.qalora.targets import describe

    for name, account in report.data.items():
        if account.lines:
            console.print(f"{name}: {account.describe()}")
    if report.untrained:
        console.print(describe(report.untrained))
    if report.best_loss is not None:
        console.print(
            f"validation loss {report.initial_loss:.4f} → {report.best_loss:.4f}, kept step "
            f"{report.kept_step} of {report.steps}"
        )
    else:
        console.print(f"training loss {report.final_train_loss:.4f} after {report.steps} steps (no validation data)")
    if report.tokens_per_second is not None:
        console.print(
            f"{report.tokens_per_second:,.0f} tokens/s on {report.processes} × {report.device}, "
            f"peak memory {bytes_text(report.peak_memory_bytes)}"
        )
    console.print(f"adapter: {out}   record: {out.with_name(report.record)}")
