"""Which of the processes that torchrun or accelerate started this is, and whether accelerate shards the model."""

import os

from qalora_export.errors import InputError

# Engines of accelerate that cannot hold packed weights, by the variable that tells its processes to use them.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
FSDP = "ACCELERATE_USE_FSDP"
LAUNCH = "accelerate launch --use_fsdp --fsdp_version 2 --mixed_precision no"


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Rank 0 of all machines: the one that writes and talks."""
    return int(os.environ.get("RANK", "0")) == 0


def fsdp_wanted() -> bool:
    """Whether accelerate was told to shard parameters, gradients and optimizer state with FSDP."""
    return _on(FSDP)


def shards() -> int:
    """Among how many devices FSDP divides the model; 1 without it."""
    return world_size() if fsdp_wanted() else 1


def check_engine() -> None:
    """Raise InputError for an engine, or a setting of FSDP, under which packed weights would not stay as they are."""
    for variable, name in REFUSED.items():
        if _on(variable):
            raise InputError(
                f"{name} cannot train packed weights",
                where=f"environment variable {variable}",
                why="it expects floating-point parameters; codes are integers",
                fix=f"use torchrun, or shard with: {LAUNCH}",
            )
    if not fsdp_wanted():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "FSDP version 1 cannot shard packed weights",
            where="environment variable FSDP_VERSION",
            why="it flattens a layer into one dtype; codes are uint8, scales float16, adapters float32",
            fix=LAUNCH,
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("", "no"):
        raise InputError(
            f"FSDP would round scales, offsets and adapter to {precision}",
            where="environment variable ACCELERATE_MIXED_PRECISION",
            why="its mixed precision casts every floating-point parameter it gathers",
            fix="pass --mixed_precision no to accelerate and --precision bf16 here",
        )


def _on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
