"""The train stage: canonical base + data → QA-LoRA adapter, on Transformers' Trainer (one process or many).

    data → samples → rows → Trainer (adapter only) → best checkpoint → adapter folder

Beside the adapter stands `<out>.training/` with the checkpoints of an unfinished run and the record of a finished one.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_export.checkpoint.manifest import require_intact
from qalora_export.checkpoint.output import claim_output, refuse_place
from qalora_export.memory import peak_rss_bytes
from qalora_export.qalora.targets import left_alone
from qalora_export.qalora.training import folder as training_folder
from qalora_export.qalora.training.loop import kept_step, make_trainer, run_to_end, step_of
from qalora_export.qalora.training.plan import TrainPlan, plan
from qalora_export.qalora.training.processes import is_main, shards, world_size
from qalora_export.recipe import TrainSettings
from qalora_export.safety import StrPath, exclusive, local_path, sha256_file

if TYPE_CHECKING:
    from qalora_export.data.samples import Account
    from qalora_export.qalora.training.callbacks import StepClock
    from qalora_export.qalora.training.trainer import AdapterTrainer

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a run did. Losses are nats per learned token; curves are (optimizer step, loss).

    tokens_per_second counts tokens that are not padding, all processes together, in the optimizer steps of this call
    (None when nothing was left to train), which took `seconds`. data: what became of the records of each file.
    peak_memory_bytes is rank 0's: GPU allocations, or the process's peak RSS. untrained: modules that targets match and
    that were left alone.
    """

    adapter: str
    record: str
    steps: int
    kept_step: int
    initial_loss: float | None
    best_loss: float | None
    final_train_loss: float
    train_curve: Curve
    validation_curve: Curve
    trainable_parameters: int
    samples: int
    data: dict[str, Account]
    tokens_per_epoch: int
    resumed_from: int
    tokens_per_second: float | None
    seconds: float
    peak_memory_bytes: int
    device: str
    processes: int
    untrained: tuple[str, ...]
    settings: dict[str, Any]


def train(
    base: StrPath, out: StrPath, settings: TrainSettings, *, force: bool = False, resume: bool = True
) -> TrainReport:
    """Train an adapter over the canonical checkpoint `base` and save it as `out`.

    The adapter with the lowest validation loss is kept; without validation data, the last. A killed run goes on from
    its last checkpoint when called again with the same base, data and settings (`resume=False` starts again). Under
    torchrun or accelerate every process calls this; rank 0 writes. Raises InputError for bad data or settings, an
    existing output, a run that changed since it was interrupted, and a loss that is not finite.
    """
    base, out = local_path(base), local_path(out)
    inputs = (base, settings.data, settings.validation)
    with contextlib.ExitStack() as stack:
        if is_main():
            stack.enter_context(claim_output(out, force=force, inputs=inputs))  # and so has a name
        folder = training_folder.folder_for(out)
        if is_main():
            refuse_place(folder, inputs)
            stack.enter_context(exclusive(folder))
            require_intact(base, "the base")
        return _train(base, out, folder, settings, force=force, resume=resume)


def _train(base: Path, out: Path, folder: Path, settings: TrainSettings, *, force: bool, resume: bool) -> TrainReport:
    from qalora_export.qalora.training.arguments import arguments
    from qalora_export.qalora.training.memory import check_fits
    from qalora_export.qalora.training.sharding import gather_adapter, prepare

    made = plan(base, settings)
    args = arguments(folder, settings, made.steps, evaluate=bool(made.validation), fresh=True)
    check_fits(made.memory)  # of the GPU that belongs to this process
    with args.main_process_first(local=False):
        if is_main():
            training_folder.prepare(folder, fingerprint(base, settings), resume=resume, force=force)
    last = training_folder.last_checkpoint(folder)
    args.eval_on_start = bool(made.validation) and last is None
    trainer, clock = _trainer(base, settings, made, args, folder)
    prepare(trainer.accelerator)
    run_to_end(trainer, last)
    gather_adapter(trainer.model)
    report = _report(trainer, clock, made, settings, out, resumed_from=step_of(last))
    if is_main():
        _write(trainer, report, base, out, settings, force=force)
    trainer.accelerator.wait_for_everyone()
    return report


def fingerprint(base: Path, settings: TrainSettings) -> dict[str, Any]:
    """Everything that decides the resulting numbers; a checkpoint is only continued under an equal one."""
    from qalora_export.checkpoint.manifest import parent_of
    from qalora_export.version import __version__

    content = settings.model_dump(mode="json")
    for name in ("data", "validation"):
        content[name] = sha256_file(Path(content[name])) if content[name] else None
    return {
        "settings": content,
        "base": parent_of(base, "base").sha256,
        "processes": world_size(),
        "shards": shards(),
        "version": __version__,
    }


def _trainer(
    base: Path, settings: TrainSettings, made: TrainPlan, args: Any, folder: Path
) -> tuple[AdapterTrainer, StepClock]:
    from transformers.utils import logging as hf_logging

    from qalora_export.models.loading import load_model
    from qalora_export.qalora.attach import attach, compile_layers

    hf_logging.disable_progress_bar()  # every process would draw one; ours follows
    model = load_model(base, dtype=made.dtype)
    attach(model, settings, made.untrained)
    if settings.compile:
        compile_layers(model)
    callbacks = [_tensorboard(folder)] if is_main() else []
    return make_trainer(model, args, made.train, made.validation, callbacks=callbacks)


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))


def _report(
    trainer: AdapterTrainer, clock: StepClock, made: TrainPlan, settings: TrainSettings, out: Path, *, resumed_from: int
) -> TrainReport:
    import torch

    history = trainer.state.log_history
    losses, validation = _curve(history, "loss"), _curve(history, "eval_loss")
    seen = made.tokens * clock.steps / made.steps.per_epoch
    return TrainReport(
        adapter=out.name,
        record=training_folder.folder_for(out).name,
        steps=trainer.state.global_step,
        kept_step=kept_step(trainer),
        initial_loss=validation[0][1] if validation else None,
        best_loss=trainer.state.best_metric,
        final_train_loss=losses[-1][1],
        train_curve=losses,
        validation_curve=validation,
        trainable_parameters=made.memory.trainable_parameters,
        samples=made.samples,
        data=made.accounts,
        tokens_per_epoch=made.tokens,
        resumed_from=resumed_from,
        tokens_per_second=seen / clock.seconds if clock.steps else None,
        seconds=clock.seconds,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss_bytes(),
        device=_device_name(),
        processes=world_size(),
        untrained=left_alone(settings.targets, made.untrained),
        settings=settings.model_dump(mode="json"),
    )


def _curve(history: list[dict[str, float]], name: str) -> Curve:
    return tuple((int(row["step"]), row[name]) for row in history if name in row)


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def _write(
    trainer: AdapterTrainer, report: TrainReport, base: Path, out: Path, settings: TrainSettings, *, force: bool
) -> None:
    """The record first, then the adapter (the commit mark of the stage), then the checkpoints go."""
    from qalora_export.qalora.adapter_files import save_adapter
    from qalora_export.qalora.training.plots import plot_losses

    folder = training_folder.folder_for(out)
    training_folder.write_lines(folder / "metrics.jsonl", trainer.state.log_history)
    training_folder.write_json(folder / "report.json", asdict(report))
    plot_losses(folder, report.train_curve, report.validation_curve, best_step=report.kept_step)
    save_adapter(trainer.accelerator.unwrap_model(trainer.model), out, base=base, settings=settings, force=force)
    training_folder.keep_only(folder, ())
