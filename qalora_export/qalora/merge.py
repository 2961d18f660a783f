"""Merge: write offset_eff (DESIGN.md, "QA-LoRA"), and scale_eff where scales were trained. Codes stay, and the merged
model is the trained one.

The result is checked before it appears under its name: the written files are read back and compared value by value
with the base, and the logits of base + adapter are compared with those of the written checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import STEPS, CanonicalCheckpoint, parts_of
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.manifest import parent_of, require_intact
from qalora_export.checkpoint.output import claim_output
from qalora_export.errors import InputError, ParityError
from qalora_export.formats.contents import FolderContents, compare
from qalora_export.grid import GroupAffine, Levels, SymmetricLevels, differing, pack_codes
from qalora_export.models.loading import load_model
from qalora_export.progress import status, track
from qalora_export.qalora.adapter_files import Adapter, ModuleAdapter, ModuleShape, load_adapter, read_adapter
from qalora_export.qalora.function import effective_offset, with_offsets_moved
from qalora_export.qalora.scales import centre_and_spread, effective
from qalora_export.safety import StrPath, atomic_directory, local_path

PROBE_SEQUENCES, PROBE_LENGTH = 4, 32


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What merging changed, counted in the written files. logits_*: None when the comparison was switched off.

    adapted: modules with an adapter, of `modules`. offsets: how many there are; changed_offsets: how many moved.
    scales_trained: the adapter moves scales, of which changed_scales moved; otherwise none may.
    logits_compared: values compared; logits_differing: values whose bits differ.
    """

    modules: int
    adapted: int
    convention: str
    changed_codes: int
    changed_scales: int
    offsets: int
    changed_offsets: int
    changed_other_tensors: int
    logits_compared: int | None
    logits_differing: int | None
    scales_trained: bool = False


def merge(
    base: StrPath,
    adapter: StrPath,
    out: StrPath,
    *,
    convention: str = "auto",
    force: bool = False,
    compare_logits: bool = True,
) -> MergeReport:
    """Write `base` with the adapter's offset_eff to `out`, one module in memory at a time.

    Raises InputError for an adapter that has no lossless form over this base (see read_adapter), a base whose files
    differ from its manifest, or an offset_eff that float16 cannot hold (tensor and group named); ParityError when the
    written checkpoint is not base + adapter bit for bit. Nothing appears under `out` unless every check passed.
    """
    base, adapter, out = local_path(base), local_path(adapter), local_path(out)
    with claim_output(out, force=force, inputs=(base, adapter)):
        return _merge(base, adapter, out, convention=convention, force=force, compare_logits=compare_logits)


def _merge(base: Path, adapter: Path, out: Path, *, convention: str, force: bool, compare_logits: bool) -> MergeReport:
    checkpoint = CanonicalCheckpoint(base)
    require_intact(base, "the base")
    read = read_adapter(adapter, _shapes(checkpoint), convention=convention, base=base)
    with atomic_directory(out, force=force) as partial:
        staged = partial / out.name
        _write(checkpoint, read, staged, parents=(base, adapter))
        found = compare(FolderContents(checkpoint), FolderContents(CanonicalCheckpoint(staged)), progress="read back")
        compared = unequal = None
        if compare_logits:
            with status("comparing the logits of base + adapter and merged"):
                compared, unequal = _compare_logits(base, adapter, staged, convention)
        report = MergeReport(
            len(checkpoint.modules),
            len(read.modules),
            read.convention,
            found.changes.codes,
            found.changes.scale,
            _offsets(checkpoint),
            found.changes.offset,
            len(found.tensors) + len(found.only_left) + len(found.only_right),
            compared,
            unequal,
            read.trains_scales,
        )
        _require_lossless(report, out)
        for path in staged.iterdir():
            path.rename(partial / path.name)
        staged.rmdir()
    return report


def merged(matrix: GroupAffine, adapter: ModuleAdapter, *, where: str) -> GroupAffine:
    """The matrix with offset_eff, and with scale_eff where scales were trained, by the functions training uses.

    Raises InputError when float16 cannot hold them.
    """
    levels = matrix.levels
    if isinstance(levels, SymmetricLevels):
        raise InputError(
            f"an adapter cannot move the offsets of grid {levels.grid.name}",
            where=where,
            why="they are −2^(bits−1)·scale",
            fix="merge with the base that the adapter was trained on",
        )
    if adapter.scales is None and levels is None:
        return GroupAffine(matrix.codes, matrix.scale, merged_offset(matrix, adapter, where=where), matrix.bits)
    parts = parts_of(matrix.grid)[1:]
    held = [torch.from_numpy(np.array(getattr(matrix if levels is None else levels, part))) for part in parts]
    moved = dict(zip(parts, _moved(matrix, held, adapter), strict=True))
    for part, values in moved.items():
        if bad := np.argwhere(~np.isfinite(values)).tolist():
            row, column = bad[0]
            at = f"{where}.{part}: row {row}, {'super-block' if part in STEPS else 'group'} {column}"
            raise _beyond_fp16(len(bad), values.size, at, "", part.removesuffix("_step"))
    if levels is None:
        return GroupAffine(matrix.codes, moved["scale"], moved["offset"], matrix.bits)
    return GroupAffine.on_levels(matrix.codes, Levels(levels.grid, **moved))


def _moved(matrix: GroupAffine, held: list[torch.Tensor], adapter: ModuleAdapter) -> list[NDArray[Any]]:
    """held, the numbers of a matrix beside its codes, as the adapter moves them."""
    if adapter.scales is not None:
        middle = centre_and_spread(
            torch.from_numpy(pack_codes(matrix.codes, matrix.bits)), matrix.bits, matrix.scale.shape[1]
        )
        pair = adapter.a, adapter.b
        moved = effective(held, pair, adapter.scales, adapter.scaling, middle, matrix.grid.name)
    else:
        moved = with_offsets_moved(adapter.a, adapter.b, adapter.scaling, matrix.grid.name, *held)
    return [part.numpy() for part in moved]


def merged_offset(matrix: GroupAffine, adapter: ModuleAdapter, *, where: str) -> NDArray[np.float16]:
    """offset_eff (out, in/g) by the function training uses. Raises InputError when float16 cannot hold it."""
    offset = effective_offset(torch.from_numpy(np.array(matrix.offset)), adapter.a, adapter.b, adapter.scaling).numpy()
    if bad := np.argwhere(~np.isfinite(offset)).tolist():
        row, group = bad[0]
        base = f"base offset {float(matrix.offset[row, group])}, "
        raise _beyond_fp16(len(bad), offset.size, f"{where}.offset: row {row}, group {group}", base)
    return offset


def _beyond_fp16(count: int, total: int, where: str, base: str, name: str = "offset") -> InputError:
    return InputError(
        f"the merged {name} does not fit in float16 ({count} of {total})",
        where=where,
        why=f"{base}float16 ends at 65504",
        fix="the adapter has diverged, or its convention is wrong: lower the learning rate, or pass --convention",
    )


def _shapes(checkpoint: CanonicalCheckpoint) -> dict[str, ModuleShape]:
    shapes = {}
    for name, (_, group) in checkpoint.modules.items():
        rows, groups = checkpoint.entry(f"{name}.scale").shape
        shapes[name] = ModuleShape(rows, groups * group, group)
    return shapes


def _offsets(checkpoint: CanonicalCheckpoint) -> int:
    """How many numbers make up the offsets: float16 ones, or levels and steps."""
    parts = [(name, part) for name, grid in checkpoint.grids.items() for part in parts_of(grid) if "offset" in part]
    return sum(int(np.prod(checkpoint.entry(f"{name}.{part}").shape)) for name, part in parts)


def _write(checkpoint: CanonicalCheckpoint, adapter: Adapter, target: Path, *, parents: tuple[Path, Path]) -> None:
    base, adapter_folder = parents
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    lineage = [parent_of(base, "base"), parent_of(adapter_folder, "adapter")]
    with CanonicalWriter(
        target,
        config,
        checkpoint.companions(),
        kind="merged",
        parents=lineage,
        settings={"convention": adapter.convention, **({"scales": True} if adapter.trains_scales else {})},
    ) as writer:
        writer.add_rest_of(checkpoint)
        for name in track(checkpoint.modules, "merge", len(checkpoint.modules)):
            matrix = checkpoint.group_affine(name)
            if name in adapter.modules:
                matrix = merged(matrix, adapter.modules[name], where=name)
            writer.add_quantized(name, matrix)


def _require_lossless(report: MergeReport, out: Path) -> None:
    for what in ("changed_codes", "changed_scales", "changed_other_tensors", "logits_differing"):
        if what == "changed_scales" and report.scales_trained:
            continue
        if count := getattr(report, what):
            raise ParityError(
                f"merging was not lossless: {what.replace('_', ' ')} = {count}",
                where=out,
                why="the written checkpoint must be base + adapter bit for bit; nothing was kept",
                fix="report this: it is a bug or a failing disk or memory",
            )


def _compare_logits(base: Path, adapter: Path, merged: Path, convention: str) -> tuple[int, int]:
    """(values compared, values whose bits differ): logits of base + adapter against the written checkpoint."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = _logits(base, device, adapter, convention)
    after = _logits(merged, device)
    return before.size, differing(before, after)


@torch.no_grad()
def _logits(folder: Path, device: str, adapter: Path | None = None, convention: str = "auto") -> NDArray[np.float32]:
    """float32 logits (sequences, positions, vocabulary) on fixed random probe ids."""
    model = load_model(folder)
    if adapter is not None:
        load_adapter(model, adapter, convention=convention, base=folder)
    for parameter in model.parameters():
        # A mapped tensor lies at whatever alignment its file gives it, and BLAS may round by alignment.
        parameter.data = parameter.data.clone()
    model.to(device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = np.random.default_rng(0).integers(0, vocabulary, (PROBE_SEQUENCES, PROBE_LENGTH))
    logits: NDArray[np.float32] = (
        model(input_ids=torch.from_numpy(ids).to(device), use_cache=False).logits.float().cpu().numpy()
    )
    return logits
