"""The loop itself, for any model whose trainable parameters are an adapter: made, run to its end, best step kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_export.progress import task
from qalora_export.qalora.training import folder as training_folder
from qalora_export.qalora.training.processes import is_main

if TYPE_CHECKING:
    from qalora_export.data.sequence_packing import Row
    from qalora_export.qalora.training.callbacks import StepClock
    from qalora_export.qalora.training.trainer import AdapterTrainer


def make_trainer(
    model: Any, args: Any, train: Sequence[Row], validation: Sequence[Row], *, callbacks: Sequence[Any] = ()
) -> tuple[AdapterTrainer, StepClock]:
    """A trainer of what requires gradients in `model`; it stops at a loss that is not finite (InputError)."""
    from transformers import PrinterCallback

    from qalora_export.data.sequence_packing import collate
    from qalora_export.qalora.training.callbacks import StepClock, StopAtNonFinite
    from qalora_export.qalora.training.trainer import AdapterTrainer, RowDataset

    model.config.use_cache = False  # with a KV cache Transformers would not tell packed samples apart
    clock = StepClock()
    trainer = AdapterTrainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=RowDataset(train),
        eval_dataset=RowDataset(validation) if validation else None,
        callbacks=[StopAtNonFinite(), clock, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def run_to_end(trainer: AdapterTrainer, last: Path | None) -> None:
    """Train to the end, from the checkpoint `last` if given, and leave the adapter to keep in the model."""
    from transformers import TrainerState

    from qalora_export.qalora.training.callbacks import Progress
    from qalora_export.qalora.training.trainer import load_adapter_state

    state = TrainerState.load_from_json(str(last / "trainer_state.json")) if last else None
    if state is not None and state.global_step >= trainer.args.max_steps:
        trainer.state = state  # killed between the last step and saving the adapter
    else:
        with task("training", trainer.args.max_steps, step_of(last)) as shown:
            if is_main():
                trainer.add_callback(Progress(shown))
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    kept = training_folder.checkpoint(Path(str(trainer.args.output_dir)), kept_step(trainer))
    load_adapter_state(trainer.model, kept / training_folder.ADAPTER)


def kept_step(trainer: AdapterTrainer) -> int:
    """The step with the lowest validation loss; without validation data, the last."""
    return trainer.state.best_global_step or trainer.state.global_step


def step_of(path: Path | None) -> int:
    """The optimizer step of a checkpoint folder, 0 for none."""
    return int(path.name.rpartition("-")[2]) if path else 0
