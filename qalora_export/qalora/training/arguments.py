"""Settings → what Transformers' Trainer is built from: device, precision, steps, arguments, optimizer name."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from qalora_export.errors import InputError, RuntimeUnavailableError, did_you_mean
from qalora_export.qalora.training.processes import fsdp_wanted, world_size
from qalora_export.recipe import TrainSettings

EVALUATIONS_PER_RUN = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Optimizer names that Transformers takes from bitsandbytes.
BITSANDBYTES = {
    "adamw_bnb_8bit",
    "adamw_8bit",
    "ademamix",
    "ademamix_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Steps:
    """Counts of optimizer steps, the same formula as the Trainer's."""

    per_epoch: int
    total: int
    evaluate_every: int
    warmup: int

    @classmethod
    def of(cls, rows: int, settings: TrainSettings) -> Steps:
        batches = math.ceil(math.ceil(rows / settings.batch_size) / world_size())
        per_epoch = math.ceil(batches / settings.gradient_accumulation)
        total = settings.max_steps if settings.max_steps > 0 else math.ceil(settings.epochs * per_epoch)
        every = settings.evaluate_every or math.ceil(total / EVALUATIONS_PER_RUN)
        return cls(per_epoch, total, every, math.ceil(total * settings.warmup_ratio))


# Optimizers that treat every value alike, so that they do the same to a shard as to the whole tensor.
SHARDABLE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")


def compute_dtype(precision: str) -> torch.dtype:
    """float32 or bfloat16, in which activations and the dequantized matrices are held; adapters stay float32.

    "auto" is bf16 on a GPU with bf16 units and fp32 otherwise. Raises RuntimeUnavailableError when bf16 is asked of a
    GPU that has none.
    """
    cuda = torch.cuda.is_available()
    native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and cuda and not native:
        raise RuntimeUnavailableError(
            "this GPU has no bf16 units", where=torch.cuda.get_device_name(), fix="pass --precision fp32"
        )
    return DTYPES["bf16" if native and precision == "auto" else "fp32" if precision == "auto" else precision]


def check_optimizer(name: str) -> None:
    """Raise InputError for a name Transformers does not know or FSDP cannot shard, RuntimeUnavailableError for an
    absent bitsandbytes."""
    known = [str(item.value) for item in OptimizerNames]
    if name not in known:
        raise InputError(f"unknown optimizer {name!r}", where="optimizer", fix=did_you_mean(name, known))
    if fsdp_wanted() and name not in SHARDABLE:
        raise InputError(
            f"the optimizer {name} does not work on the shards of FSDP",
            where="optimizer",
            why="its state is kept in blocks or for whole matrices",
            fix=f"take {SHARDABLE[0]}; also: " + ", ".join(SHARDABLE[1:]),
        )
    if name in BITSANDBYTES:
        try:
            import bitsandbytes  # type: ignore[import-not-found,unused-ignore] # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            fix = "pip install 'qalora-export[cuda]', or take adamw_torch"
            raise RuntimeUnavailableError(
                f"the optimizer {name} needs bitsandbytes", why=str(error), fix=fix
            ) from error


def arguments(folder: Path, settings: TrainSettings, steps: Steps, *, evaluate: bool, fresh: bool) -> TrainingArguments:
    """TrainingArguments for a run whose checkpoints go into `folder`.

    Every step is logged (the loss curve, and the stop at NaN); a checkpoint is written at every evaluation, so the best
    one is always on disk. No mixed precision of the Trainer's: the model is loaded in the compute dtype and the adapter
    stays float32.
    """
    cuda = torch.cuda.is_available()
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        checkpointing: settings.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if settings.gradient_checkpointing else None,
        "num_train_epochs": settings.epochs,
        "max_steps": steps.total,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        "warmup_steps": steps.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": settings.optimizer,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": steps.evaluate_every,
        "eval_on_start": evaluate and fresh,
        "save_strategy": "steps",
        "save_steps": steps.evaluate_every,
        "metric_for_best_model": "eval_loss" if evaluate else None,
        "greater_is_better": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # the Trainer would replace NaN by an average; we stop
        "report_to": "none",  # TensorBoard is added by hand, with its own folder
        "disable_tqdm": True,
        "log_level": "error",
        "log_level_replica": "error",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "use_cpu": not cuda,
        "ddp_backend": "gloo" if world_size() > 1 and not cuda else None,
        "ddp_broadcast_buffers": False,  # the packed base is frozen: equal everywhere from the start
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": cuda,
    }
    args = TrainingArguments(**options)
    _ = args.device  # starts the process group under torchrun
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs mean DDP by torchrun, never torch.nn.DataParallel
    return args
