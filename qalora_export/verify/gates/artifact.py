"""Gates G0 (bytes) and G1 (weights): the written file itself, before any logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import PARTS, CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import as_float32
from qalora_export.checkpoint.provenance import Link
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.grid import Differences, GroupAffine, difference, differing
from qalora_export.verify.gates.merge_check import MergeCheck
from qalora_export.verify.gates.rule import Entry, judge
from qalora_export.verify.runtimes.facts import differing_facts

SHOWN = 12
# A buffer of old checkpoints that follows from config.json; the RoPE facts check what it stood for.
DERIVED = ".rotary_emb.inv_freq"


class Contents(Protocol):
    """An artifact read back by an independent reader, in the checkpoint's vocabulary (formats.*.readback).

    modules: module -> (bits, group_size). others: names of tensors that are not quantized. offset_is_implied: modules
    whose offset is not stored but follows from the scale, so that -0 and +0 cannot be told apart.
    """

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def others(self) -> list[str]: ...
    @property
    def offset_is_implied(self) -> frozenset[str]: ...
    def group_affine(self, module: str) -> GroupAffine: ...
    def tensor(self, name: str) -> NDArray[Any]: ...


def bytes_gate(
    runtime: str,
    checkpoint: CanonicalCheckpoint,
    contents: Contents,
    *,
    expected: Mapping[str, Any],
    found: Mapping[str, Any],
    links: Iterable[Link],
    merge: MergeCheck | None = None,
) -> Entry:
    """G0: every code, scale, offset and other value, every fact, every link of the provenance chain.

    merge: whether the checkpoint itself is its base plus its adapter.
    """
    merge = merge or MergeCheck(note="not a merged checkpoint")
    tensors, compared = tensor_differences(checkpoint, contents)
    facts = differing_facts(expected, found)
    broken = [f"{link.child} → {link.parent or link.role}: {link.note}" for link in links if link.state == "broken"]
    unmerged = [f"{name}: {count}" for name, count in merge.wrong.items()]
    measured = {
        "differing_values": sum(tensors.values()),
        "differing_facts": len(facts),
        "broken_links": len(broken),
        "wrong_merged_values": sum(merge.wrong.values()),
    }
    return judge(
        "G0",
        runtime,
        measured,
        detail=f"{compared} values in {len(checkpoint.modules)} quantized and {len(checkpoint.plain_names())} "
        f"other tensors, {len(expected)} facts compared; {merge.describe()}",
        where=_first_of((f"{name}: {count}" for name, count in tensors.items()), facts, broken, unmerged),
        figures=measured | {"compared_values": compared, "tensors": tensors},
    )


def _first_of(*kinds: Iterable[str]) -> list[str]:
    """Findings of every kind, at most SHOWN of each: one kind never hides another."""
    return [finding for kind in kinds for finding in list(kind)[:SHOWN]]


def tensor_differences(checkpoint: CanonicalCheckpoint, contents: Contents) -> tuple[dict[str, int], int]:
    """(differing values by "tensor part", values compared). A missing or surplus tensor counts with all its values."""
    wrong: dict[str, int] = {}
    compared = 0
    for module in checkpoint.modules:
        matrix = checkpoint.group_affine(module)
        compared += matrix.codes.size + matrix.scale.size + matrix.offset.size
        found = _matrix(contents, module)
        if isinstance(found, str):
            wrong[f"{module} ({found})"] = matrix.codes.size + 2 * matrix.scale.size
            continue
        counts = _matrix_difference(matrix, found, module in contents.offset_is_implied)
        wrong |= {f"{module}.{part}": count for part in PARTS if (count := getattr(counts, part))}
    plain = _expected_plain(checkpoint, contents)
    for name in plain:
        tensor = checkpoint.tensor(name)
        compared += tensor.size
        if count := _plain_difference(tensor, contents.tensor(name) if name in contents.others else None):
            wrong[name] = count
    surplus = {*(set(contents.modules) - set(checkpoint.modules)), *(set(contents.others) - set(plain))}
    return wrong | {
        f"{name} (quantized or stored otherwise than in the checkpoint)": 1 for name in sorted(surplus)
    }, compared


def _expected_plain(checkpoint: CanonicalCheckpoint, contents: Contents) -> list[str]:
    """Tensors the artifact must hold. A tied lm_head may be left out: the embedding is the same tensor."""
    names = [name for name in checkpoint.plain_names() if not name.endswith(DERIVED)]
    tied = bool(checkpoint.config.get("tie_word_embeddings")) and "lm_head.weight" not in contents.others
    return [name for name in names if not (tied and name == "lm_head.weight")]


def _matrix(contents: Contents, module: str) -> GroupAffine | str:
    """The matrix in the artifact, or why there is none (absent; NaN in a scale; codes that do not fit …)."""
    if module not in contents.modules:
        return "not in the artifact as a quantized matrix"
    try:
        return contents.group_affine(module)
    except (InputError, UnsafeInputError) as error:
        return f"unreadable: {error.what}"


def _matrix_difference(want: GroupAffine, got: GroupAffine, offset_is_implied: bool) -> Differences:
    if not offset_is_implied:
        return difference(want, got)
    zero = np.float16(0)  # x + 0 turns -0 into +0 and leaves every other value alone
    return Differences(
        differing(want.codes, got.codes),
        differing(want.scale, got.scale),
        differing(want.offset + zero, got.offset + zero),
    )


def _plain_difference(want: NDArray[Any], got: NDArray[Any] | None) -> int:
    """Formats may hold a narrower source in float32 (norms in GGUF): exact, so the widened values are compared."""
    if got is None:
        return max(1, want.size)
    if got.dtype == np.float32 and want.dtype != np.float32:
        return differing(as_float32(want), got)
    return differing(np.asarray(want), np.asarray(got))


def weights_gate(
    runtime: str, checkpoint: CanonicalCheckpoint, dequantized: Iterable[tuple[str, NDArray[np.float32]]], *, by: str
) -> Entry:
    """G1: each matrix as the runtime's own dequantizer gives it, against s·q + m in float32. by: which dequantizer."""
    worst, where, seen = 0.0, list[str](), set[str]()
    for module, matrix in dequantized:
        if module not in checkpoint.modules:
            continue  # a surplus matrix is gate G0's finding
        seen.add(module)
        ulp, count = ulp_distance(checkpoint.group_affine(module).dequantize(), matrix)
        worst = max(worst, ulp)
        if count:
            where.append(f"{module}: {count} weights, up to {ulp:.0f} ulp")
    missing = sorted(set(checkpoint.modules) - seen)
    where += [f"{module}: not dequantized" for module in missing]
    return judge(
        "G1",
        runtime,
        {"ulp_max": worst, "missing_matrices": len(missing)},
        detail=f"{len(seen)} of {len(checkpoint.modules)} matrices by {by}",
        where=where[:SHOWN],
        figures={"matrices": len(seen), "dequantizer": by},
    )


def ulp_distance(want: NDArray[np.float32], got: NDArray[np.float32]) -> tuple[float, int]:
    """(largest distance in units of the last place, count of values that differ); infinite for NaN or other shapes."""
    if want.shape != got.shape or got.dtype != np.float32:
        return float("inf"), max(want.size, got.size)
    distance = np.abs(_ordered(want) - _ordered(got))
    nan = np.isnan(want) | np.isnan(got)
    count = int(np.count_nonzero((distance > 0) | nan))
    return (float("inf") if nan.any() else float(distance.max(initial=0))), count


def _ordered(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """float32 bit patterns as integers in numeric order; -0 and +0 are the same integer."""
    bits = np.ascontiguousarray(values).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
