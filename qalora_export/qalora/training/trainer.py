"""Transformers' Trainer for a frozen packed base: checkpoints hold the adapter alone, validation weighs every token.

Everything else (loop, accumulation, DDP, schedule, resume) is the Trainer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from qalora_export.data.samples import IGNORED
from qalora_export.data.sequence_packing import Row, collate
from qalora_export.errors import InputError
from qalora_export.progress import track
from qalora_export.qalora.training import folder as training_folder
from qalora_export.qalora.training.sharding import fill, save_optimizer, whole
from qalora_export.safety import could_not_write


class RowDataset(Dataset[Row]):
    """Rows by index; the collator makes batches of them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trainable tensors by full name, whole, on the CPU; under FSDP every process must ask."""
    return {n: whole(p.detach()).cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def load_adapter_state(model: nn.Module, file: Path) -> None:
    """Copy saved adapter tensors into the model. Raises InputError when names or shapes differ."""
    saved = load_file(file)
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
        raise InputError(
            "the checkpoint holds a different adapter", where=file, fix="pass --no-resume to start again from step 0"
        )
    for name, parameter in own.items():
        fill(parameter, saved[name])


@torch.no_grad()
def learned_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, int]:
    """Mean loss in nats over the learned tokens of a batch, and how many they are."""
    return float(model(**batch).loss), int((batch["labels"][:, 1:] != IGNORED).sum())


class AdapterTrainer(Trainer):
    """Trains the parameters that require gradients; `args.output_dir` is the training folder."""

    model: Any
    eval_dataset: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Adapter tensors as safetensors; the packed base is neither gathered nor copied nor pickled."""
        state = adapter_state(self.model)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / training_folder.ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter_state(self.model, Path(resume_from_checkpoint) / training_folder.ADAPTER)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer's, but under FSDP it would save the whole base as well."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.accelerator, self.optimizer, self.model, Path(output_dir))
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write, commit, and only then delete what is no longer needed: the last and the best are kept."""
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        path = training_folder.checkpoint(folder, step)
        try:
            with could_not_write(folder):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                training_folder.mark_complete(path)
        except BaseException:
            if self.args.should_save:
                training_folder.remove_incomplete(path)
            raise
        if self.args.should_save:
            training_folder.keep_only(folder, {step, self.state.best_global_step or step})
        self.accelerator.wait_for_everyone()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over every learned token of the validation set, whatever the batch size or number of processes.

        (The Trainer's own averages batches, so that short ones weigh more.) Batches go round the processes.
        """
        rows, size = (self.eval_dataset if eval_dataset is None else eval_dataset), self.args.eval_batch_size
        batches = [range(begin, min(begin + size, len(rows))) for begin in range(0, len(rows), size)]
        total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of tokens
        training, processes = self.model.training, self.args.world_size
        self.model.eval()
        for first in track(range(0, len(batches), processes), "validation, batches"):
            mine = first + self.args.process_index
            # A process without a batch in the last turn takes part all the same: FSDP gathers with everyone.
            batch = self._prepare_inputs(collate([rows[i] for i in batches[min(mine, len(batches) - 1)]]))
            loss, learned = learned_loss(self.model, batch)
            if mine < len(batches):
                total += torch.tensor([loss * learned, learned], dtype=torch.float64)
        self.model.train(training)
        total = self.accelerator.reduce(total.to(self.args.device), reduction="sum").cpu()
        metrics = {f"{metric_key_prefix}_loss": float(total[0] / total[1])}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        try:
            return super().create_optimizer(model)
        except (ImportError, ValueError, RuntimeError) as error:
            raise InputError(
                f"cannot use the optimizer {self.args.optim!s}",
                why=str(error),
                fix="install the package it needs, or take adamw_torch",
            ) from error
