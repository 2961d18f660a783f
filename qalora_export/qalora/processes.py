"""Which of the processes that torchrun or accelerate started this is; alone when neither did."""

import os

from qalora_export.errors import InputError

# How accelerate tells its processes to shard the model.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}  # fmt: skip


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Rank 0 of all machines: the one that writes and talks."""
    return int(os.environ.get("RANK", "0")) == 0


def refuse_sharding() -> None:
    """Raise InputError when accelerate was configured to shard the model; accelerate itself ignores that on CPUs.

    FSDP and ZeRO divide parameters, their gradients and optimizer states. Here the packed weights are buffers, which
    they replicate; what is left is the adapter with its state, and embeddings and norms, a few percent of a large
    model: the memory of DDP, with an exchange of the embeddings in every step on top.
    """
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise InputError(f"{name} has nothing to divide here", where=f"environment variable {variable}",
                             why="packed weights are buffers, which it replicates; the rest is the small adapter",
                             fix="use data parallel: torchrun, or accelerate launch --multi_gpu")  # fmt: skip
