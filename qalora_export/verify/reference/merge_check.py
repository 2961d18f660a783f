"""Is a merged checkpoint its base plus its adapter? Offsets, and scales where they were trained, are recomputed apart
from training and merging (reference/recomputed.py); codes and everything else must be those of the base.

A checkpoint merged with another convention (sum for mean), alpha or rank is a consistent file with right hashes that
exports and runs without a flaw; only base and adapter can tell that it is not the trained model. Both are found
through the manifest, beside the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.canonical import CanonicalCheckpoint, parts_of
from qalora_export.checkpoint.manifest import MANIFEST, read_manifest
from qalora_export.checkpoint.provenance import parent_folder
from qalora_export.errors import QaloraError
from qalora_export.grid import differing
from qalora_export.qalora.adapter_files import Adapter, ModuleAdapter, ModuleShape, read_adapter
from qalora_export.verify.reference.recomputed import wrong_numbers

MOVED = ("offset", "offset_step")  # parts of a matrix that merging writes
WITH_SCALES = (*MOVED, "scale", "scale_step")  # where scales were trained


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """wrong: differing values by tensor. adapted: modules recomputed with an adapter. note: why nothing was checked.

    missing: what was not here, so that the merge or a part of it is unproven.
    """

    wrong: dict[str, int] = field(default_factory=dict)
    adapted: int = 0
    note: str = ""
    missing: str = ""

    def describe(self) -> str:
        return self.note or f"merge recomputed from base and adapter in {self.adapted} modules"


def merge_check(
    checkpoint: CanonicalCheckpoint, *, base: Path | None = None, adapter: Path | None = None
) -> MergeCheck:
    """Compare a merged checkpoint with base and adapter; one module in memory at a time.

    base, adapter: stand for those that the manifest names. Without the adapter, everything but offsets is compared with
    the base. A checkpoint that is no merge has no findings; an adapter that does not fit its base is one.
    """
    manifest = read_manifest(checkpoint.path) if (checkpoint.path / MANIFEST).is_file() else {}
    if manifest.get("kind") != "merged":
        return MergeCheck(note="not a merged checkpoint")
    base = base or parent_folder(checkpoint.path, "base")
    adapter = adapter or parent_folder(checkpoint.path, "adapter")
    if base is None:
        also = "" if adapter else " nor its adapter (--adapter)"
        missing = f"the base of this merge is not here (--base gives it){also}"
        return MergeCheck(note=f"merge not recomputed: {missing}", missing=missing)
    before = CanonicalCheckpoint(base)
    if adapter is None:
        missing = "the adapter of this merge is not here (--adapter gives it)"
        moved = WITH_SCALES if _settings(manifest).get("scales") is True else MOVED
        what = "offsets and scales" if moved is WITH_SCALES else "offsets"
        note = f"{what} not recomputed, everything else compared with the base: {missing}"
        return MergeCheck(_differences(before, checkpoint, None, moved), note=note, missing=missing)
    convention = str(_settings(manifest).get("convention", "auto"))
    try:
        read = read_adapter(adapter, _shapes(before), convention=_asked(adapter, convention), base=base)
    except QaloraError as error:
        return MergeCheck({f"{adapter.name} over {base.name} ({error.what})": 1})
    return MergeCheck(_differences(before, checkpoint, read), len(read.modules))


def _settings(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    found = manifest.get("settings")
    return found if isinstance(found, dict) else {}


def _differences(
    before: CanonicalCheckpoint, merged: CanonicalCheckpoint, adapter: Adapter | None, unknown: tuple[str, ...] = ()
) -> dict[str, int]:
    """adapter: None where it is not here, so that nothing can be said of the parts that are `unknown`."""
    wrong: dict[str, int] = {}
    one, other = ({(m, *c.modules[m], c.grids[m].name) for m in c.modules} for c in (before, merged))
    for module, *_ in sorted(one ^ other):
        wrong[f"{module} (quantized otherwise in base and merged checkpoint)"] = 1
    if before.embeddings != merged.embeddings:
        wrong["embeddings (stored otherwise in base and merged checkpoint)"] = 1
    for module in before.modules:
        if (module, *before.modules[module], before.grids[module].name) in other:
            own = None if adapter is None else adapter.modules.get(module)
            moved = unknown if adapter is None else () if own is None else MOVED if own.scales is None else WITH_SCALES
            parts = tuple(part for part in parts_of(before.grids[module]) if part not in moved)
            wrong |= _module_differences(before, merged, module, own, parts)
    for name in {*before.plain_names(), *merged.plain_names()}:
        if name not in before or name not in merged or differing(before.tensor(name), merged.tensor(name)):
            wrong[f"{name} (other than in the base)"] = 1
    return wrong


def _module_differences(
    before: CanonicalCheckpoint,
    merged: CanonicalCheckpoint,
    module: str,
    adapter: ModuleAdapter | None,
    same: tuple[str, ...],
) -> dict[str, int]:
    """same: parts that merging leaves as they are."""
    wrong = {}
    for part in same:
        count = differing(before.tensor(f"{module}.{part}"), merged.tensor(f"{module}.{part}"))
        if count:
            wrong[f"{module}.{part} (other than in the base)"] = count
    if adapter is not None:
        one, other = before.packed(module), merged.packed(module)
        for part, count in wrong_numbers(one, other, adapter).items():
            if count:
                wrong[f"{module}.{part} (not base + adapter)"] = count
    return wrong


def _asked(adapter: Path, convention: str) -> str:
    """What to ask read_adapter for: an adapter with its own manifest settles the convention itself."""
    return "auto" if (adapter / MANIFEST).is_file() else convention


def _shapes(checkpoint: CanonicalCheckpoint) -> dict[str, ModuleShape]:
    shapes = {}
    for name, (_, group) in checkpoint.modules.items():
        rows, groups = checkpoint.entry(f"{name}.scale").shape
        shapes[name] = ModuleShape(rows, groups * group, group)
    return shapes
