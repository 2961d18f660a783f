"""What happens beside the training loop: progress, the stop at a loss that is no number, time per step."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qalora_export.errors import DivergedError
from qalora_export.progress import Task


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
                raise DivergedError(
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


class Progress(TrainerCallback):
    """Steps and latest losses (rank 0 only)."""

    def __init__(self, task: Task) -> None:
        self._task, self._latest = task, dict[str, float]()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self._latest |= {name: value for name, value in (logs or {}).items() if name in ("loss", "eval_loss")}
        self._show(state.global_step)

    def _show(self, step: int) -> None:
        shown = [f"{name.replace('eval_', 'validation ')} {value:.4f}" for name, value in self._latest.items()]
        self._task.update(step, "  ".join(shown))
