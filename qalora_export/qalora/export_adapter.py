"""A trained adapter folder → llama.cpp LoRA file, over a base that is exported once."""

from __future__ import annotations

from pathlib import Path

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import parent_of, require_intact
from qalora_export.checkpoint.output import claim_output
from qalora_export.errors import InputError
from qalora_export.formats.gguf.lora import AdapterReport, LowRank, write_adapter
from qalora_export.qalora.adapter_files import ModuleShape, read_adapter


def export_gguf_adapter(
    base: Path, adapter: Path, out: Path, *, convention: str = "auto", force: bool = False
) -> AdapterReport:
    """Write the adapter of folder `adapter`, trained over `base`, as a LoRA GGUF.

    Raises InputError as qalora.adapter_files.read_adapter does: another base, a plain LoRA, an undeclared convention;
    and for one that moves scales.
    """
    with claim_output(out, force=force, inputs=(base, adapter)):
        require_intact(base, "the base")
        return _export(base, adapter, out, convention=convention, force=force)


def _export(base: Path, adapter: Path, out: Path, *, convention: str, force: bool) -> AdapterReport:
    model = CanonicalCheckpoint(base)
    shapes = {}
    for module, (_, group_size) in model.modules.items():
        rows, groups = model.entry(f"{module}.scale").shape
        shapes[module] = ModuleShape(rows, groups * group_size, group_size)
    found = read_adapter(adapter, shapes, convention=convention, base=base)
    if found.trains_scales:
        raise InputError(
            "an adapter that moves scales is no LoRA of llama.cpp",
            where=adapter,
            why="what it changes in a weight depends on the weight's code, and is of no low rank",
            fix="merge, and export the merged checkpoint",
        )
    modules = {name: LowRank(m.a.numpy(), m.b.numpy(), m.scaling) for name, m in found.modules.items()}
    return write_adapter(base, modules, out, parent=parent_of(adapter, "adapter"), force=force)
