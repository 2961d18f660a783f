"""FSDP: every device holds its share of codes, scale, offset, embeddings and adapter, and gathers layer after layer.

accelerate's engine does it (FSDP2, torch.distributed.fsdp.fully_shard: rows of each parameter are divided). It moves
bytes and rounds nothing: a layer sees the very tensors of the checkpoint. What is ours is the way in and out of the
shards, so that checkpoints and adapters are the same files with and without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from qalora_export.errors import InputError
from qalora_export.qalora.attach import quantized_linears
from qalora_export.qalora.training.processes import fsdp_wanted


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one; every process must ask for it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy `value`, whole and the same on every process, into a parameter that may be sharded."""
    if isinstance(parameter, DTensor):
        parameter.copy_(
            distribute_tensor(
                value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        )
    else:
        parameter.copy_(value)


def gather_adapter(model: nn.Module) -> None:
    """Put whole adapter tensors in the place of shards, on every process. The model can be saved then, not trained."""
    for module in quantized_linears(model).values():
        if module.lora_A is not None and module.lora_B is not None:
            a, b = whole(module.lora_A.detach()).cpu(), whole(module.lora_B.detach()).cpu()
            module.lora_A, module.lora_B = nn.Parameter(a), nn.Parameter(b)
            if (scales := module.scales) is not None:
                a, b = (whole(part.detach()).cpu() for part in scales.pair)
                scales.A, scales.B = nn.Parameter(a), nn.Parameter(b)


def prepare(accelerator: Any) -> None:
    """Make sure FSDP is on where it was asked for, gathers layer by layer and saves optimizer state as one file.

    (accelerate, told nothing, gathers the whole model at once, and saves a folder of shards with a pickled index.)
    Raises InputError when accelerate does something else than shard, as it does on CPUs.
    """
    if not fsdp_wanted():
        return
    if not accelerator.is_fsdp2:
        raise InputError(
            "FSDP was asked for, and accelerate does not shard here",
            where=str(accelerator.device),
            why=f"it took {accelerator.distributed_type.value}: it shards over several accelerators only",
            fix="start it on several GPUs, or without --use_fsdp",
        )
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # made anew for the type that follows
    plugin.set_state_dict_type("FULL_STATE_DICT")


def save_optimizer(accelerator: Any, optimizer: Any, model: nn.Module, folder: Path) -> None:
    """The state of all shards as one file, written by rank 0; every process calls this."""
    from accelerate.utils import save_fsdp_optimizer

    save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, str(folder))
