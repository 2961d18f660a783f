"""Every metadata entry and tensor of a GGUF file against those of a fresh export of the checkpoint, made in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.differences import ABSENT, clip, explain, same
from qalora_export.checkpoint.manifest import made_with, sidecar_path
from qalora_export.formats.account import Account, other_tools
from qalora_export.formats.gguf.export import gguf_tools, model_entries
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.metadata import Entry
from qalora_export.formats.gguf.split import adapter_entries, plan_remainders
from qalora_export.formats.gguf.tensor_table import ROPE_FREQUENCIES, TensorPlan, plan_model
from qalora_export.formats.gguf.tokenizer.byte_level import TEXT_DIFFERENCES
from qalora_export.formats.gguf.validate import ALIGNMENT, ARRAY, Field, TensorInfo, parse_header
from qalora_export.formats.gguf.writer import header_of, stream_gguf
from qalora_export.formats.streaming import HashSink
from qalora_export.models.families import family_of
from qalora_export.safety import HashFile, sha256_file

VERSION = "qalora.version"
FIRST = 16  # items of a list that are shown
LAYOUTS = ("q4_1", "split")
ALLOWED = 1e-6  # relative: the divisors of rope_freqs.weight come from this machine's powers, rounded to float32


def account_gguf(
    checkpoint: CanonicalCheckpoint, path: Path, adapter: Path | None = None, *, hash_of: HashFile = sha256_file
) -> Account:
    """adapter: the offset adapter of layout "split", where it is there. Values of weights are compared elsewhere.

    Raises InputError for a checkpoint that cannot be exported, UnsafeInputError for a file that lies about itself.
    """
    file = GgufFile(path)
    layout, name = file.metadata.get("qalora.layout"), file.metadata.get("general.name")
    options: dict[str, Any] = {"layout": layout if layout in LAYOUTS else LAYOUTS[0]}
    options |= {"name": name} if isinstance(name, str) else {}
    options |= {"text differences": "allowed"} if TEXT_DIFFERENCES in file.fields else {}
    files = [(path, file, _model(checkpoint, options))]
    found = list[str]()
    if options["layout"] == "split":
        files += _adapter(checkpoint, adapter, found)
    harmless, other = list[str](), list[str]()
    excuse = other_tools(made_with(sidecar_path(path)), gguf_tools())
    entries = 0
    for where, there, fresh in files:
        entries += len(fresh.fields) + len(fresh.plans)
        prefix = "" if where == path else f"{where.name}: "
        found += [prefix + line for line in _entry_differences(fresh, there, harmless)]
        found += [prefix + line for line in _frequency_differences(fresh, there, harmless)]
        if fresh.sha256() != hash_of(where):
            other.append(where.name)
    return Account(entries, tuple(found), options, tuple(harmless), tuple(other), excuse if other else "")


@dataclass(frozen=True)
class _Fresh:
    """A file that is not there: its header, parsed by the reader that parses real ones, and its tensors."""

    raw: bytes
    fields: Mapping[str, Field]
    tensors: Mapping[str, TensorInfo]
    plans: list[TensorPlan]

    def sha256(self) -> str:
        """Of all its bytes, which are made and forgotten a block at a time."""
        sink = HashSink()
        stream_gguf(sink, self.raw, self.plans)
        return sink.hexdigest()


def _model(checkpoint: CanonicalCheckpoint, options: Mapping[str, Any]) -> _Fresh:
    plans = plan_model(checkpoint, options["layout"])
    entries = model_entries(
        checkpoint,
        plans,
        options["layout"],
        allow_text_differences="text differences" in options,
        name=options.get("name"),
    )
    return _fresh(checkpoint, entries, plans)


def _adapter(
    checkpoint: CanonicalCheckpoint, adapter: Path | None, found: list[str]
) -> Iterator[tuple[Path, GgufFile, _Fresh]]:
    plans = plan_remainders(checkpoint)
    if plans and adapter is None:
        found.append("the adapter that holds the offsets is missing")
    if adapter is not None:
        there = GgufFile(adapter)
        name = there.metadata.get("general.name")
        entries = adapter_entries(checkpoint, name=name if isinstance(name, str) else None)
        yield adapter, there, _fresh(checkpoint, entries, plans)


def _fresh(checkpoint: CanonicalCheckpoint, entries: list[Entry], plans: list[TensorPlan]) -> _Fresh:
    raw = header_of(family_of(checkpoint.config).gguf_arch, entries, plans)
    size = sum(nbytes + -nbytes % ALIGNMENT for nbytes in (len(raw), *(plan.nbytes for plan in plans)))
    header = parse_header(raw, size, checkpoint.path)
    return _Fresh(raw, header.fields, {tensor.name: tensor for tensor in header.tensors}, plans)


def _entry_differences(fresh: _Fresh, there: GgufFile, harmless: list[str]) -> Iterator[str]:
    for key in (*fresh.fields, *(key for key in there.fields if key not in fresh.fields)):
        expected, found = fresh.fields.get(key), there.fields.get(key)
        if expected is None or found is None:
            yield f"{key}: expected {_shown(expected)}, found {_shown(found)}"
        elif (expected.kind, expected.item) != (found.kind, found.item):
            yield f"{key}: expected {_type(expected)}, found {_shown(found)}"
        elif not same(expected.stored, found.stored):
            if key == VERSION:
                harmless.append(f"{_shown(found)} as {key}, of another version")
            else:
                yield f"{key}: {_explained(expected, found)}"
    for name in (*fresh.tensors, *(name for name in there.tensors if name not in fresh.tensors)):
        stored = there.tensors.get(name)
        infos = fresh.tensors.get(name), None if stored is None else stored.info
        kinds = [ABSENT if info is None else f"{_ggml(info.type)} {info.shape}" for info in infos]
        if kinds[0] != kinds[1]:
            yield f"{name}: expected {kinds[0]}, found {kinds[1]}"


def _frequency_differences(fresh: _Fresh, there: GgufFile, harmless: list[str]) -> Iterator[str]:
    """The one tensor that is no weight of the checkpoint."""
    plan = next((plan for plan in fresh.plans if plan.name == ROPE_FREQUENCIES), None)
    stored = there.tensors.get(ROPE_FREQUENCIES)
    if plan is None or stored is None or stored.shape != plan.shape:
        return  # named already
    expected, found = plan.load(slice(None)), stored.values
    if not np.allclose(found, expected, rtol=ALLOWED, atol=0):
        yield f"{ROPE_FREQUENCIES}: {explain(np.asarray(expected), np.asarray(found))}"
    elif expected.tobytes() != found.tobytes():
        harmless.append(f"{ROPE_FREQUENCIES} differs by less than {ALLOWED:g} relative")


def _shown(field: Field | None) -> str:
    if field is None:
        return ABSENT
    begin = Field(field.kind, field.item, field.stored[:FIRST]) if field.kind == ARRAY else field
    return f"{_type(field)} {clip(begin.value)}"


def _explained(expected: Field, found: Field) -> str:
    """Both values at the first place that differs. A list of numbers is not made Python's, which may be very long."""
    want, got = expected.stored, found.stored
    if expected.kind != ARRAY or not isinstance(want, np.ndarray) or not isinstance(got, np.ndarray):
        return explain(expected.value, found.value)
    shared = min(len(want), len(got))
    index = next(iter(np.flatnonzero(want[:shared] != got[:shared])), shared)
    values = [clip(side[index].item()) if index < len(side) else ABSENT for side in (want, got)]
    sizes = f"({len(want)} expected, {len(got)} found)"
    return f"item {index}: expected {values[0]}, found {values[1]} {sizes}"


def _type(field: Field) -> str:
    from gguf import GGUFValueType

    kind = GGUFValueType(field.kind).name.lower()
    return kind if field.item is None else f"{kind} of {GGUFValueType(field.item).name.lower()}"


def _ggml(kind: int) -> str:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind).name
