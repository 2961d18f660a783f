"""Gate G0: the written file itself, read back by an independent reader, before any logits.

Every code, scale, offset and other value; every fact that steers the numbers, by config.json and Transformers; every
entry of the artifact, known or not, and its bytes, by a fresh export; every link of the provenance chain, the merge
that the checkpoint claims to be; and that the files are the same ones when the last gate has run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.provenance import Link, artifact_links
from qalora_export.errors import InputError
from qalora_export.formats.account import Account
from qalora_export.formats.contents import Contents, FolderContents, compare
from qalora_export.verify.gates.registry import measures
from qalora_export.verify.identity import Identities, changes
from qalora_export.verify.reference.ancestry import Ancestry
from qalora_export.verify.reference.merge_check import MergeCheck
from qalora_export.verify.rule import Entry, Gate, Limit, checked
from qalora_export.verify.runtimes.facts import differing_facts
from qalora_export.verify.target import Target

SHOWN = 12

GATE = Gate(
    id="G0",
    title="bytes",
    what="the written file, read back by an independent reader, against the checkpoint",
    row="values that differ in the file",
    limits=(
        Limit("differing_values", 0, "values", "the export moves bytes; nothing is rounded"),
        Limit("differing_facts", 0, "facts", "a right tensor under a wrong epsilon or RoPE base is a wrong model"),
        Limit("unaccounted_entries", 0, "entries", "an entry that nobody expected may steer what nobody measured"),
        Limit("other_bytes", 0, "files", "the same checkpoint, options and versions give the same bytes"),
        Limit("broken_links", 0, "links", "a hash that does not match is another file than the one that was made"),
        Limit("wrong_merged_values", 0, "values", "a right export of a wrong merge is not the trained model"),
        Limit("changed_on_the_way", 0, "entries", "quantizing and merging touch no config, tokenizer or template"),
        Limit("changed_files", 0, "files", "gates that saw different files prove nothing about either"),
    ),
)
AT_THE_END = GATE.limit("changed_files")


@measures(GATE)
def file_bytes(target: Target) -> Entry:
    session, runtime = target.session, target.runtime
    links = artifact_links(target.artifact, session.checkpoint.path, hash_of=session.hashed)
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
        account=session.account(runtime, target.artifact, contents),
        line=session.ancestry,
    )


def bytes_entry(
    runtime: str,
    checkpoint: CanonicalCheckpoint,
    contents: Contents,
    *,
    expected: Mapping[str, Any],
    found: Mapping[str, Any],
    links: Iterable[Link],
    account: Account | InputError,
    merge: MergeCheck | None = None,
    line: Ancestry | None = None,
) -> Entry:
    """Every code, scale, offset and other value, every fact, every entry, every link of the provenance chain.

    account: entries and bytes against a fresh export, or why the checkpoint cannot be exported. merge: whether the
    checkpoint itself is its base plus its adapter. line: whether it kept everything else of its ancestors. The gate has
    not run where something of these could not be compared.
    """
    line = line or Ancestry()
    if isinstance(account, InputError):
        account = Account(0, (f"the checkpoint cannot be exported anew: {account}",))
    merge = merge or MergeCheck(note="not a merged checkpoint")
    compared = compare(FolderContents(checkpoint), contents)
    tensors = compared.findings()
    facts = differing_facts(expected, found)
    broken = [f"{link.child} → {link.parent or link.role}: {link.note}" for link in links if link.state == "broken"]
    unmerged = [f"{name}: {count}" for name, count in merge.wrong.items()]
    measured = {
        "differing_values": compared.total,
        "differing_facts": len(facts),
        "unaccounted_entries": len(account.differences),
        "other_bytes": 0 if account.excuse else len(account.other_bytes),
        "broken_links": len(broken),
        "wrong_merged_values": sum(merge.wrong.values()),
        "changed_on_the_way": len(line.changed),
    }
    entry = GATE.judge(
        runtime,
        measured,
        limits=[limit for limit in GATE.limits if limit is not AT_THE_END],
        detail=f"{compared.values} values in {len(checkpoint.modules)} quantized and {len(checkpoint.plain_names())} "
        f"other tensors, {len(expected)} facts compared; {account.describe()}; {merge.describe()}; {line.describe()}",
        where=_first_of(
            (f"{name}: {count}" for name, count in tensors.items()),
            facts,
            account.differences,
            () if account.excuse else (f"{name}: other bytes than a fresh export" for name in account.other_bytes),
            broken,
            unmerged,
            line.changed,
        ),
        figures=measured | {"compared_values": compared.values, "tensors": tensors},
    )
    gaps = list(line.unchecked)
    if account.unproven:
        gaps.append(f"{account.excuse}: its graph cannot be held against one that is made here; export it again")
    if entry.status == "pass" and gaps:
        shown = (*entry.where, *account.unproven[:SHOWN])
        return replace(entry, status="not run", detail=f"{'; '.join(gaps)}. Beside that: {entry.detail}", where=shown)
    return entry


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
