"""What happens beside the training loop: a progress bar, the stop at a loss that is no number, time per step."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qalora_export.console import console
from qalora_export.errors import InputError


class StopAtNonFinite(TrainerCallback):
    """Stops before the step is saved. The logged loss is averaged over processes, so all of them stop together."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                what = {"loss": "the loss", "grad_norm": "the gradient", "eval_loss": "the validation loss"}[name]
                raise InputError(
                    f"{what} is not finite ({value}) at step {state.global_step} of {state.max_steps}",
                    why="training has diverged; the checkpoints before this step are kept",
                    fix="pass a smaller --learning-rate or --precision fp32 together with --no-resume",
                )


class StepClock(TrainerCallback):
    """Seconds spent in optimizer steps, without evaluation and saving."""

    def __init__(self) -> None:
        self.seconds, self.steps, self._begin = 0.0, 0, 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._begin
        self.steps += 1


class ProgressBar(TrainerCallback):
    """Steps, latest losses, elapsed time and ETA on the console (rank 0 only)."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )
        self._latest: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step, losses="")
        self._progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self._latest |= {name: value for name, value in (logs or {}).items() if name in ("loss", "eval_loss")}
        shown = "  ".join(f"{name.replace('eval_', 'validation ')} {value:.4f}" for name, value in self._latest.items())
        self._progress.update(self._task, completed=state.global_step, losses=shown)

    def close(self) -> None:
        self._progress.stop()
