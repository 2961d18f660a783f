"""Adapter folders: written in PEFT's layout, read from ours or from other trainers'.

    adapter_config.json, adapter_model.safetensors   PEFT's layout; PEFT with use_qalora computes the same function
    manifest.json                                    ours: parent base and, per module, pool and scaling as trained

Where scales were trained too, adapter_config.json names a type that PEFT does not know: it would leave them out.

A folder with our manifest reloads bit for bit. Any other is imported by its convention (see qalora.conventions).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qalora_export.checkpoint.manifest import has_manifest, parent_of, write_manifest
from qalora_export.checkpoint.model_folder import as_float32
from qalora_export.checkpoint.safetensors_file import map_tensor, read_header
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.qalora.adapter_manifest import as_trained, modules_of
from qalora_export.qalora.attach import quantized_linears
from qalora_export.qalora.conventions import ConventionName, peft_alpha, resolve, sum_scaling
from qalora_export.qalora.layer import QALoraLinear
from qalora_export.qalora.peft_layout import (
    CONFIG,
    PARTS,
    TENSORS,
    make_config,
    parse_config,
    shortest_targets,
    split_name,
    tensor_name,
)
from qalora_export.recipe import TrainSettings
from qalora_export.safety import atomic_directory, inside, read_json, sha256_bytes

PATH_FIELDS = ("data", "validation")


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """What an adapter must fit: out-features, in-features and group size of one quantized module."""

    out_features: int
    in_features: int
    group_size: int


@dataclass(frozen=True, slots=True)
class ModuleAdapter:
    """a float32 (r, in/pool), b float32 (out, r), and the scaling of B A for a *sum* over each pool.

    scales: such a pair for the scales, trained with the same scaling; None where they stay.
    """

    a: Tensor
    b: Tensor
    scaling: float
    scales: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A whole adapter, in our (sum) convention whatever it came from."""

    modules: dict[str, ModuleAdapter]
    convention: ConventionName

    @property
    def trains_scales(self) -> bool:
        return any(module.scales is not None for module in self.modules.values())


def save_adapter(model: nn.Module, folder: Path, *, base: Path, settings: TrainSettings, force: bool = False) -> None:
    """Write the model's adapters to `folder`, atomically, manifest last.

    base: the canonical checkpoint they were trained over (its manifest's sha256 becomes the parent). PEFT has one pool
    length per adapter: with several, A's columns are repeated to the greatest common one, which is the same function.
    Raises InputError when no module has an adapter or the output exists.
    """
    linears = {n: m for n, m in quantized_linears(model).items() if m.lora_A is not None}
    if not linears:
        raise InputError("the model has no adapter to save", where=folder, fix="attach one first")
    pool = math.gcd(*(module.pool for module in linears.values()))
    with atomic_directory(folder, force=force) as partial:
        tensors = _tensors(linears, pool)
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        config = _config(model, linears, pool, settings, base)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        table = {
            name: {"dtype": "float32", "shape": list(t.shape), "sha256": sha256_bytes(t.numpy())}
            for name, t in tensors.items()
        }
        modules = {name: {"pool": module.pool, "scaling": module.scaling} for name, module in linears.items()}
        train = settings.model_dump(mode="json")
        # Outputs hold no path of this machine, only the names.
        train |= {field: Path(train[field]).name for field in PATH_FIELDS if train[field]}
        write_manifest(
            partial,
            "adapter",
            tensors=table,
            parents=[parent_of(base, "base")],
            settings={"train": train, "adapter": {"convention": "sum", "modules": modules}},
        )


def load_adapter(model: nn.Module, folder: Path, *, convention: str = "auto", base: Path | None = None) -> list[str]:
    """Install the adapter of `folder` on the model's QALoraLinear modules; returns the adapted names.

    base: the checkpoint the model was loaded from; without it, the folder that Transformers noted on the model. Our
    own adapters are refused over any other base. Errors as in read_adapter.
    """
    if base is None and (noted := getattr(model, "name_or_path", "")):
        base = Path(noted)
    linears = quantized_linears(model)
    shapes = {name: ModuleShape(m.out_features, m.in_features, m.group_size) for name, m in linears.items()}
    adapter = read_adapter(folder, shapes, convention=convention, base=base)
    for name, module in linears.items():
        module.detach_adapter()
        if found := adapter.modules.get(name):
            module.set_adapter(found.a, found.b, found.scaling, scales=found.scales)
    return list(adapter.modules)


def read_adapter(
    folder: Path, shapes: dict[str, ModuleShape], *, convention: str = "auto", base: Path | None = None
) -> Adapter:
    """Read an adapter folder and bring it into the sum convention.

    Raises InputError for a plain LoRA, a pool length that does not fit the group size, DoRA or biases, modules the
    base has not quantized, another base, an undeclared convention, damaged or missing files.
    """
    if not folder.is_dir():
        raise InputError("adapter folder not found", where=folder, fix="give the folder with adapter_config.json")
    own = modules_of(folder, base) if has_manifest(folder) else None
    raw = read_json(inside(folder, CONFIG))
    config = parse_config(raw, where=folder / CONFIG, own=own is not None)
    name = resolve(convention, own=own is not None, use_qalora=config.pool is not None, where=folder)
    parts = _read_parts(folder, own=own is not None)
    if unknown := sorted(set(parts) - set(shapes)):
        raise InputError(
            f"the adapter targets {len(unknown)} modules that the base has not quantized",
            where=folder,
            why=f"adapter: {', '.join(unknown[:4])}; base: {', '.join(list(shapes)[:4])}",
            fix="merge with the base it was trained on",
        )
    modules, adapted = {}, [module for module in shapes if module in parts]
    declared = config.alpha_over_r(adapted) if own is None else {}
    for module in adapted:
        a, b = parts[module]["A"], parts[module]["B"]
        scales = (parts[module]["scale_A"], parts[module]["scale_B"]) if "scale_A" in parts[module] else None
        where = f"{folder}: {module}"
        pool = _pool(a, shapes[module], config.pool if own is None else None, where)
        if own is not None:
            repeat, scaling = as_trained(own, module, pool, where)
            a, pool = a[:, ::repeat].contiguous(), pool * repeat
            scales = scales and (scales[0][:, ::repeat].contiguous(), scales[1])
        else:
            rank, alpha_over_r = declared[module]
            if a.shape[0] != rank:
                raise InputError(f"adapter_config.json says rank {rank}, lora_A has {a.shape[0]}", where=where)
            scaling = sum_scaling(name, alpha_over_r, shapes[module].in_features, pool)
        for pair in ((a, b), *([scales] if scales else [])):
            _check_shapes(*pair, pool, shapes[module], where)
        modules[module] = ModuleAdapter(a, b, scaling, scales)
    return Adapter(modules, name)


def _tensors(linears: dict[str, QALoraLinear], pool: int) -> dict[str, Tensor]:
    result = {}
    for name, module in linears.items():
        assert module.lora_A is not None and module.lora_B is not None
        pairs = {"": (module.lora_A, module.lora_B)} | ({} if module.scales is None else {"scale_": module.scales.pair})
        for kind, (a, b) in pairs.items():
            wide = a.detach().float().cpu().repeat_interleave(module.pool // pool, dim=1)  # (r, in/pool)
            result[tensor_name(name, f"{kind}A")] = wide.contiguous()
            result[tensor_name(name, f"{kind}B")] = b.detach().float().cpu().contiguous()  # (out, r)
    return result


def _config(
    model: nn.Module, linears: dict[str, QALoraLinear], pool: int, settings: TrainSettings, base: Path
) -> dict[str, Any]:
    ranks = {name: m.lora_A.shape[0] for name, m in linears.items() if m.lora_A is not None}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    return make_config(
        rank=rank,
        alpha=settings.alpha,
        pool=pool,
        base_name=base.name,
        scales=any(module.scales is not None for module in linears.values()),
        ranks={name: r for name, r in ranks.items() if r != rank},
        alphas={n: peft_alpha(m.scaling, ranks[n], m.in_features, pool) for n, m in linears.items()},
        targets=shortest_targets(list(linears), [name for name, _ in model.named_modules()]),
    )


def _read_parts(folder: Path, *, own: bool) -> dict[str, dict[str, Tensor]]:
    """module -> PARTS in float32 from adapter_model.safetensors; those of scales in our own adapters alone."""
    if not (folder / TENSORS).exists() and list(folder.glob("*.bin")):
        raise InputError(
            "the adapter is a pickle file",
            where=folder,
            why="unpickling runs code from the file",
            fix="convert it to safetensors where you trust it (PEFT: save_pretrained)",
        )
    path = inside(folder, TENSORS)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, entry in read_header(path).items():
        module, part = split_name(name, where=path)
        values = as_float32(map_tensor(path, entry))
        if part in parts.setdefault(module, {}):
            raise UnsafeInputError("two tensors claim the same place", where=f"{path}: {name}")
        if values.ndim != 2 or not values.size or not np.isfinite(values).all():
            raise InputError(
                "an adapter tensor is no finite matrix",
                where=f"{path}: {name}",
                why=f"shape {values.shape}",
                fix="repair or retrain the adapter",
            )
        parts[module][part] = torch.from_numpy(np.array(values))
    if incomplete := [module for module, found in parts.items() if set(found) not in PARTS]:
        raise InputError("lora_A or lora_B is missing", where=f"{path}: {incomplete[0]}")
    if not parts:
        raise InputError("the adapter holds no tensors", where=path)
    if not own and any(len(found) > 2 for found in parts.values()):
        raise InputError(
            "the adapter moves scales and has no manifest",
            where=path,
            why="only ours do, and their manifest tells with which scaling",
            fix="give the whole folder that `qalora-export train --scales` wrote",
        )
    return parts


def _pool(a: Tensor, shape: ModuleShape, declared: int | None, where: str) -> int:
    """In-features per column of A. Refuses what has no lossless form."""
    width = a.shape[1]
    if width == shape.in_features:
        raise InputError(
            "this is a plain LoRA adapter",
            where=where,
            why="its update varies inside a quantization group, so no offset can hold it: merging would change codes",
            fix="train with QA-LoRA (`qalora-export train`)",
        )
    if shape.in_features % width or (declared is not None and shape.in_features != width * declared):
        raise InputError(
            f"lora_A has {width} columns for {shape.in_features} in-features",
            where=where,
            why=f"qalora_group_size is {declared}" if declared else "they do not divide",
        )
    return shape.in_features // width


def _check_shapes(a: Tensor, b: Tensor, pool: int, shape: ModuleShape, where: str) -> None:
    if pool % shape.group_size:
        raise InputError(
            f"trained with pooling {pool} over a base with group size {shape.group_size}: cannot merge",
            where=where,
            why="the update must be constant inside a quantization group",
            fix=f"train with a pool of {shape.group_size} or a multiple, or quantize the base with a "
            f"group size that divides {pool}",
        )
    if b.shape != (shape.out_features, a.shape[0]) or a.shape[1] * pool != shape.in_features:
        raise InputError(
            f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit a matrix of "
            f"{shape.out_features} × {shape.in_features}",
            where=where,
        )
