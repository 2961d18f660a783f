"""Is a merged checkpoint its base plus its adapter? Recomputed apart from training and merging, in numpy float64.

    offset_eff = fp16( m + scaling · B A )          codes, scale and everything else as in the base
    scale_eff  = fp16( s + scaling · B_s A_s / σ )  where scales were trained, and offset_eff less c · (scale_eff − s)

On a grid of super-blocks: step = fp16(step · largest now / largest of the base), levels next to it.

A checkpoint merged with another convention (sum for mean), alpha or rank is a consistent file with right hashes that
exports and runs without a flaw; only base and adapter can tell that it is not the trained model. Both are found
through the manifest, beside the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint, parts_of
from qalora_export.checkpoint.manifest import MANIFEST, read_manifest
from qalora_export.checkpoint.provenance import parent_folder
from qalora_export.errors import QaloraError
from qalora_export.grid import AFFINE16, Levels, differing, unpack_codes
from qalora_export.qalora.adapter_files import Adapter, ModuleAdapter, ModuleShape, read_adapter

# float64 sums of the product may be ordered otherwise, and torch rounds to float16 through float32: the exact value
# may lie this far, relative to the terms that were added, on the other side of a rounding boundary.
FLOAT32_STEP = 2.0**-23
MOVED = ("offset", "offset_step")  # parts of a matrix that merging writes
WITH_SCALES = (*MOVED, "scale")  # where scales were trained


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
        a, b = adapter.a.numpy(), adapter.b.numpy()
        one, other = before.packed(module), merged.packed(module)
        if isinstance(one.levels, Levels) and isinstance(other.levels, Levels):
            count = wrong_levels(one.levels, other.levels, a, b, adapter.scaling)
        elif before.grids[module] is AFFINE16 and adapter.scales is not None:
            scale_a, scale_b = (part.numpy() for part in adapter.scales)
            middle = middle_of(unpack_codes(one.codes, one.bits).reshape(*one.scale.shape, -1))
            if count := wrong_scales(one.scale, other.scale, scale_a, scale_b, adapter.scaling, middle[1]):
                wrong[f"{module}.scale (not base + adapter)"] = count
            turned = middle[0] * (other.scale.astype(np.float64) - one.scale)
            count = wrong_offsets(one.offset, other.offset, a, b, adapter.scaling, turned)
        elif before.grids[module] is AFFINE16:
            count = wrong_offsets(one.offset, other.offset, a, b, adapter.scaling)
        else:
            count = one.offset.size  # a symmetric grid, whose offsets nothing moves
        if count:
            wrong[f"{module}.offset (not base + adapter)"] = count
    return wrong


def wrong_levels(base: Levels, merged: Levels, a: NDArray[np.float32], b: NDArray[np.float32], scaling: float) -> int:
    """Steps and levels of offsets that are not those of base + scaling · b a; a (r, in/pool), b (out, r)."""
    grid, steps = base.grid, base.offset_step.astype(np.float64)
    blocks = (*steps.shape, grid.groups)
    before = base.offset.reshape(blocks) * steps[..., None]
    delta, terms = _moved(a, b, scaling, base.offset.shape[1])
    wanted, slack = before - delta.reshape(blocks), FLOAT32_STEP * (before + terms.reshape(blocks))
    largest, most = before.max(axis=-1), slack.max(axis=-1)
    first = np.where(largest > 0, steps / np.where(largest > 0, largest, 1), 1 / grid.top)  # per largest offset

    def step_of(shift: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(over="ignore"):
            step: NDArray[np.float16] = ((wanted.max(axis=-1) + shift).clip(0) * first).astype(np.float16)
        return step.astype(np.float64)

    step = merged.offset_step.astype(np.float64)
    wrong = int(np.count_nonzero(~((step_of(-most) <= step) & (step <= step_of(most)))))
    wide = np.where(step > 0, step, np.inf)[..., None]
    low, high = (np.rint((wanted + side * slack) / wide).clip(0, grid.top) for side in (-1, 1))
    level = merged.offset.reshape(blocks)
    return wrong + int(np.count_nonzero(~((low <= level) & (level <= high))))


def _moved(
    a: NDArray[np.float32], b: NDArray[np.float32], scaling: float, groups: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(scaling · b a, the sum of the sizes of its terms), each float64 (out, groups)."""
    repeat = groups // a.shape[1]
    product = scaling * (b.astype(np.float64) @ a.astype(np.float64))
    terms = abs(scaling) * (np.abs(b).astype(np.float64) @ np.abs(a).astype(np.float64))
    return np.repeat(product, repeat, axis=1), np.repeat(terms, repeat, axis=1)


def middle_of(codes: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean, standard deviation but 1 at least) of the codes of each group, (out, in/g), rounded to float32.

    codes: (out, in/g, g).
    """
    spread = codes.std(axis=-1, dtype=np.float64).clip(min=1.0)
    found = (codes.mean(axis=-1, dtype=np.float64), spread)
    return found[0].astype(np.float32).astype(np.float64), found[1].astype(np.float32).astype(np.float64)


def wrong_scales(
    base: NDArray[np.float16],
    merged: NDArray[np.float16],
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    scaling: float,
    spread: NDArray[np.float64],
) -> int:
    """Scales, (out, in/g), that are not float16(base + scaling · b a / spread)."""
    product, terms = (part / spread for part in _moved(a, b, scaling, base.shape[1]))
    return _beyond(base.astype(np.float64) + product, np.abs(base).astype(np.float64) + terms, merged)


def wrong_offsets(
    base: NDArray[np.float16],
    merged: NDArray[np.float16],
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    scaling: float,
    turned: NDArray[np.float64] | float = 0.0,
) -> int:
    """Offsets, (out, in/g), that are not float16(base + scaling · b a − turned); a (r, in/pool), b (out, r).

    turned: what a scale that turned about the middle of its group takes from the offset.
    """
    product, terms = _moved(a, b, scaling, base.shape[1])
    sizes = np.abs(base).astype(np.float64) + terms + np.abs(turned)
    return _beyond(base.astype(np.float64) + product - turned, sizes, merged)


def _beyond(exact: NDArray[np.float64], terms: NDArray[np.float64], merged: NDArray[np.float16]) -> int:
    """How many of `merged` no rounding of `exact` explains. terms: sizes of what was added."""
    slack = FLOAT32_STEP * terms
    with np.errstate(over="ignore"):
        low, high = (exact - slack).astype(np.float16), (exact + slack).astype(np.float16)
    return int(np.count_nonzero(~((low <= merged) & (merged <= high))))


def _asked(adapter: Path, convention: str) -> str:
    """What to ask read_adapter for: an adapter with its own manifest settles the convention itself."""
    return "auto" if (adapter / MANIFEST).is_file() else convention


def _shapes(checkpoint: CanonicalCheckpoint) -> dict[str, ModuleShape]:
    shapes = {}
    for name, (_, group) in checkpoint.modules.items():
        rows, groups = checkpoint.entry(f"{name}.scale").shape
        shapes[name] = ModuleShape(rows, groups * group, group)
    return shapes
