"""Faults of a merge or an exporter: (line, empty folder) -> a line that the wrong stage made."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.formats.gguf import export as gguf_export
from qalora_export.models.families.family import Family
from qalora_export.qalora import merge as merging
from qalora_export.qalora.adapter_files import Adapter
from tests.faults.line import GROUP, RANK, Line, exported, merged_wrongly, reseal
from tests.faults.plants import Plant, without_a_rule
from tests.models import make_tiny_canonical, make_tiny_model, round_to_nearest
from tests.qalora.adapters import own_adapter


def no_permutation() -> object:
    """A family table without the permutation, for exporter and read-back alike: gate G0 cannot see it."""
    return patch.object(Family, "permuted_heads", lambda *_: None)


def exported_without_permutation(line: Line, folder: Path) -> Line:
    with no_permutation():
        return exported(line, folder, "gguf")


def scaled(factor: float, kind: str) -> Plant:
    """A merge that reads every adapter with its scaling off by a factor."""

    def change(adapter: Adapter) -> Adapter:
        modules = {name: replace(m, scaling=m.scaling * factor) for name, m in adapter.modules.items()}
        return Adapter(modules, adapter.convention)

    return lambda line, folder: merged_wrongly(line, folder, kind, change)


def mean_pool(kind: str) -> Plant:
    return scaled(1.0 / GROUP, kind)


def double_alpha(kind: str) -> Plant:
    return scaled(2.0, kind)


def half_rank(kind: str) -> Plant:
    """alpha / (r / 2), and only the first half of the rank's columns used."""

    def change(adapter: Adapter) -> Adapter:
        modules = {
            name: replace(m, a=m.a[: RANK // 2], b=m.b[:, : RANK // 2].contiguous(), scaling=m.scaling * 2)
            for name, m in adapter.modules.items()
        }
        return Adapter(modules, adapter.convention)

    return lambda line, folder: merged_wrongly(line, folder, kind, change)


def foreign_adapter(kind: str) -> Plant:
    """An adapter trained over another base of the same shape, merged by a merge that forgot to ask."""

    def plant(line: Line, folder: Path) -> Line:
        other = folder / "other"
        make_tiny_model(other / "model", seed=1)
        strange = make_tiny_canonical(other / "base.qalora", other / "model")
        own_adapter(strange, other / "adapter")
        shutil.copytree(line.base, folder / line.base.name)
        shutil.copytree(other / "adapter", folder / "adapter")
        line = replace(line, base=folder / line.base.name, adapter=folder / "adapter", merged=folder / "merged")
        right = merging.read_adapter
        with patch.object(merging, "read_adapter", lambda *a, **k: right(*a, **k | {"base": None})):
            merging.merge(line.base, line.adapter, line.merged, compare_logits=False)
        return exported(line, folder, kind)

    return plant


def quantized_head(kind: str) -> Plant:
    """An exporter that quantizes lm_head on its own account; the manifest names the right checkpoint."""

    def plant(line: Line, folder: Path) -> Line:
        source = CanonicalCheckpoint(line.merged)
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        with CanonicalWriter(folder / line.merged.name, config, source.companions(), kind="merged") as out:
            for module in source.modules:
                out.add_quantized(module, source.group_affine(module))
            for name in source.plain_names():
                if name == "lm_head.weight":
                    out.add_quantized("lm_head", round_to_nearest(np.asarray(source.tensor(name)), 4, GROUP))
                else:
                    out.add(name, np.asarray(source.tensor(name)))
        made = exported(replace(line, merged=folder / line.merged.name), folder, kind)
        line = replace(made, merged=line.merged)
        reseal(line, kind, checkpoint=line.merged)
        return line

    return plant


def lost_merge_gguf(line: Line, folder: Path) -> Line:
    right = gguf_export.tokenizer_entries

    def entries(*args: object, **options: object) -> list:
        found = right(*args, **options)
        rules = next(e for e in found if e.key == "tokenizer.ggml.merges")
        return [replace(e, value=without_a_rule(rules.value)) if e is rules else e for e in found]

    with patch.object(gguf_export, "tokenizer_entries", entries):
        return exported(line, folder, "gguf")
