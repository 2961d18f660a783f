"""Give a model's quantized linears trainable adapters and freeze everything else."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from fnmatch import fnmatchcase

import torch
from torch import nn

from qalora_export.errors import InputError
from qalora_export.qalora.layer import QALoraLinear
from qalora_export.qalora.targets import describe, targeted
from qalora_export.recipe import TrainSettings


def attach(model: nn.Module, settings: TrainSettings, untrained: Collection[str] = ()) -> list[str]:
    """Freeze `model`, then attach float32 adapters to the QALoraLinear modules that settings.targets match.

    Targets are shell patterns on the dotted module name ("*", "*.q_proj", "model.layers.0.*"). Every module draws
    its A from (settings.seed, its own name), so adding a target changes no other module's start and every process
    of a distributed run starts alike. untrained: modules that no pattern reaches (qalora/targets.py). Returns the
    adapted names in model order. Raises InputError when a pattern matches nothing (with what there is), nothing is left
    to train, or the pool length does not fit a module.
    """
    linears = quantized_linears(model)
    untrained = {*untrained, *(name for name, module in linears.items() if module.symmetric)}
    for pattern in settings.targets:
        if not any(fnmatchcase(name, pattern) for name in linears):
            kinds = sorted({f"*.{name.rpartition('.')[2]}" for name in linears})
            fix = "use one of these patterns" if kinds else "run `qalora-export quantize` first"
            raise InputError(
                f"no quantized module matches the target {pattern!r}",
                where="train.targets",
                why=f"quantized modules here: {', '.join(kinds) or 'none'}",
                fix=fix,
            )
    model.requires_grad_(False)
    for module in linears.values():
        module.detach_adapter()
    names = targeted(linears, settings.targets, untrained)
    if not names:
        raise InputError(
            "every module that the targets match is left alone",
            where="train.targets",
            why=describe(untrained),
            fix="give other targets, or quantize these modules on a grid with offsets",
        )
    for name in names:
        generator = torch.Generator().manual_seed(_seed(settings.seed, name))
        try:
            linears[name].attach_adapter(
                settings.rank, settings.alpha, pool=settings.pool, scales=settings.scales, generator=generator
            )
        except InputError as error:
            raise InputError(error.what, where=f"{name} (train.pool)", why=error.why, fix=error.fix) from error
    return names


def quantized_linears(model: nn.Module) -> dict[str, QALoraLinear]:
    """Every QALoraLinear of the model by its dotted name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QALoraLinear)}


def compile_layers(model: nn.Module) -> int:
    """torch.compile every decoder layer in place; returns their number.

    Layer by layer rather than whole: all layers share one compiled graph, so it is made once, and gradient
    checkpointing and FSDP, which work on layers, find them as they were.
    """
    kinds = getattr(model, "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    for layer in layers:
        layer.compile()
    return len(layers)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
