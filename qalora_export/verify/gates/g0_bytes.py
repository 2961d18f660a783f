"""Gate G0: the written file itself, read back by an independent reader, before any logits.

Every code, scale, offset and other value, every fact that steers the numbers, every link of the provenance chain, the
merge that the checkpoint claims to be; and that the files are the same ones when the last gate has run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import PARTS, CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import as_float32
from qalora_export.checkpoint.provenance import Link, artifact_links
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.contents import DERIVED
from qalora_export.grid import Differences, GroupAffine, difference, differing
from qalora_export.models.families import family_of
from qalora_export.verify.gates.registry import measures
from qalora_export.verify.identity import Identities, changes
from qalora_export.verify.reference.merge_check import MergeCheck
from qalora_export.verify.rule import Entry, Gate, Limit, checked
from qalora_export.verify.runtimes.facts import differing_facts
from qalora_export.verify.runtimes.record import Contents
from qalora_export.verify.session import Target

SHOWN = 12

GATE = Gate(
    id="G0",
    title="bytes",
    what="the written file, read back by an independent reader, against the checkpoint",
    row="values that differ in the file",
    limits=(
        Limit("differing_values", 0, "values", "the export moves bytes; nothing is rounded"),
        Limit("differing_facts", 0, "facts", "a right tensor under a wrong epsilon or RoPE base is a wrong model"),
        Limit("broken_links", 0, "links", "a hash that does not match is another file than the one that was made"),
        Limit("wrong_merged_values", 0, "values", "a right export of a wrong merge is not the trained model"),
        Limit("changed_files", 0, "files", "gates that saw different files prove nothing about either"),
    ),
)
AT_THE_END = GATE.limit("changed_files")


@measures(GATE)
def file_bytes(target: Target) -> Entry:
    session, runtime = target.session, target.runtime
    links = artifact_links(target.artifact, session.checkpoint.path)
    session.links += [link for link in links if link not in session.links]
    contents = runtime.read_back(target.artifact)
    return bytes_entry(
        runtime.name,
        session.checkpoint,
        contents,
        expected=runtime.expected(session.checkpoint, session.reference.frequencies),
        found=runtime.found(target.artifact, contents),
        links=[*session.chain, *links],
        merge=session.merge,
    )


def bytes_entry(
    runtime: str,
    checkpoint: CanonicalCheckpoint,
    contents: Contents,
    *,
    expected: Mapping[str, Any],
    found: Mapping[str, Any],
    links: Iterable[Link],
    merge: MergeCheck | None = None,
) -> Entry:
    """Every code, scale, offset and other value, every fact, every link of the provenance chain.

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
    return GATE.judge(
        runtime,
        measured,
        limits=[limit for limit in GATE.limits if limit is not AT_THE_END],
        detail=f"{compared} values in {len(checkpoint.modules)} quantized and {len(checkpoint.plain_names())} "
        f"other tensors, {len(expected)} facts compared; {merge.describe()}",
        where=_first_of((f"{name}: {count}" for name, count in tensors.items()), facts, broken, unmerged),
        figures=measured | {"compared_values": compared, "tensors": tensors},
    )


def still_the_same(entry: Entry, target: Target, now: Identities) -> Entry:
    """The entry when the last gate has run: every file is the one that the first gate saw. now: of Target.roots."""
    before = {path: identity for path, identity in target.session.files.items() if _below(path, target.roots)}
    found = changes(before, {path: identity for path, identity in now.items() if _below(path, target.roots)})
    return entry.with_check(checked(AT_THE_END, {AT_THE_END.figure: len(found)}), found[:SHOWN])


def _below(path: Path, roots: list[Path]) -> bool:
    return any(path == root or root in path.parents for root in roots)


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
        tensor = contents.carried(name, checkpoint.tensor(name))
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
    tied = family_of(checkpoint.config).ties_head(checkpoint.config) and "lm_head.weight" not in contents.others
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
