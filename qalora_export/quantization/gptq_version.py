"""How a GPTQ checkpoint stores zero points: what its config says, checked against its values.

    gptq     (v1)  stored = z − 1        gptq_v2  stored = z

Checkpoints made before the config had `checkpoint_format` are v1, and GPTQModel takes its absence so. Some say v1 and
hold v2. Taking one for the other shifts every weight by one step, and the values tell: the zero points of a symmetric
layer are all 2^(b−1); of any layer, weights lie around zero, so codes lie around their zero points.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError
from qalora_export.quantization.gptq_layer import Layer, check_layer, group_of_columns, unpack_columns
from qalora_export.quantization.gptq_zeros import Rule, Wraps, find_wraps, values, zero_points

VERSIONS = ("gptq", "gptq_v2")
OPTION = "--checkpoint-format"
WORDS_UNTIL = (6, 1)  # GPTQModel before this took its 1 from whole words at 3 bits too

SAMPLED_LAYERS, SAMPLED_ROWS = 8, 64
SURE = 0.1  # largest standard error, in steps, with which a mean distance is trusted
NEAR_ONE = (0.75, 1.25)  # steps; a right reading gives 0, the other version ±1


@dataclass(frozen=True, slots=True)
class ZeroFormat:
    """version: "gptq" or "gptq_v2". words_at_3_bits: GPTQModel before 6.1 wrote it. reason: why this version."""

    version: str
    words_at_3_bits: bool
    reason: str
    notes: list[str] = field(default_factory=list)

    def rule(self, bits: int) -> Rule:
        """How the zero points of a layer with this many bits are undone."""
        if self.version == "gptq_v2":
            return "stored"
        return "per value" if bits == 3 and not self.words_at_3_bits else "per word"


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What the values of all layers say. votes: by symmetric layers; differing: the first layer that is not one;
    wraps: at 3 bits, and at others; words_at_3_bits: whether symmetric 3-bit layers are as GPTQModel before 6.1 wrote
    them, None when there are none.
    """

    votes: frozenset[str]
    differing: str | None
    wraps: Wraps
    wraps_at_3_bits: Wraps
    words_at_3_bits: bool | None


def choose_version(
    folder: ModelFolder, gptq: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], chosen: str | None
) -> ZeroFormat:
    """The format of the zero points. shapes: (out, in) of each quantized layer; chosen: what the user says, or None.

    Raises InputError when the values contradict the config or the assumption, naming both and the option that settles
    it; when zero points were lost by the packer; and for layers that are not in GPTQ format.
    """
    declared = _declared(folder, gptq)
    layers = {name: check_layer(folder, name, shape, gptq) for name, shape in shapes.items()}
    evidence = _look(folder, layers)
    version = chosen or declared or "gptq"
    against = sorted(evidence.votes - {version})
    looks = f"the stored zeros look like {' and '.join(sorted(evidence.votes))}" if evidence.votes else ""
    if not evidence.votes and (other := _by_codes(folder, layers, version)):
        against, looks = [other[0]], other[1]
    maker = _gptqmodel(gptq)
    old = evidence.words_at_3_bits
    if old is None:  # no layer tells
        old = maker is not None and maker < WORDS_UNTIL
    if chosen is not None:
        said = [f"format {chosen} as told, although {looks}"] if against else []
        result = ZeroFormat(chosen, old, f"{chosen}, as told by {OPTION}", said)
    else:
        _check_said(folder, gptq, declared, evidence, against, looks)
        result = ZeroFormat(version, old, _reason(declared, evidence))
    if old and any(layer.bits == 3 for layer in layers.values()):
        result.notes.append(f"3-bit zero points read as GPTQModel before {WORDS_UNTIL[0]}.{WORDS_UNTIL[1]} wrote them")
    if result.version == "gptq":
        _check_lost(folder, maker is not None, evidence)
    return result


def _declared(folder: ModelFolder, gptq: Mapping[str, Any]) -> str | None:
    declared = gptq.get("checkpoint_format") or gptq.get("format")
    if declared is not None and declared not in VERSIONS:
        raise InputError(
            f"cannot read the GPTQ variant {declared!r}",
            where=folder.path,
            why=f"it is packed for one kernel; supported: {', '.join(VERSIONS)}",
            fix="save it again in format gptq_v2 with GPTQModel",
        )
    if gptq.get("pack_dtype", "int32") != "int32":
        raise InputError(f"cannot read codes packed in {gptq['pack_dtype']}", where=folder.path, why="supported: int32")
    return declared


def _gptqmodel(gptq: Mapping[str, Any]) -> tuple[int, int] | None:
    """GPTQModel's (major, minor) version, where `meta.quantizer` says that it made the checkpoint."""
    meta = gptq.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    for text in quantizer if isinstance(quantizer, list) else [quantizer]:
        if found := re.match(r"gptqmodel:(\d{1,4})\.(\d{1,4})", str(text)):
            return int(found[1]), int(found[2])
    return None


def _look(folder: ModelFolder, layers: Mapping[str, Layer]) -> _Evidence:
    votes, differing = set(), None
    old: bool | None = None
    wraps = {False: Wraps(), True: Wraps()}
    for name, layer in layers.items():
        qzeros, middle = np.asarray(folder.tensor(f"{name}.qzeros")), 2 ** (layer.bits - 1)
        readings: dict[str, Rule] = {"gptq": "per value", "gptq_v2": "stored", "old": "per word"}
        read = {vote: zero_points(qzeros, layer.bits, rule) for vote, rule in readings.items()}
        vote = next((vote for vote, zeros in read.items() if (zeros == middle).all()), None)
        if layer.bits == 3 and vote in ("gptq", "old"):
            old = vote == "old"
        if vote is None:
            differing = differing or name
            wraps[layer.bits == 3] += find_wraps(qzeros, layer.bits)
        else:
            votes.add("gptq" if vote == "old" else vote)
    return _Evidence(frozenset(votes), differing, wraps[False], wraps[True], old)


def _by_codes(folder: ModelFolder, layers: Mapping[str, Layer], version: str) -> tuple[str, str] | None:
    """(the other version, why) when codes lie one step off their zero points as read; None when they do not tell.

    Weights of a trained layer lie around zero, so the mean of code − zero point, over many rows, is near 0.
    """
    sampled = list(layers.items())[:: max(1, len(layers) // SAMPLED_LAYERS)][:SAMPLED_LAYERS]
    means = np.concatenate([_distances(folder, name, layer) for name, layer in sampled]) - (version == "gptq")
    if not len(means):
        return None
    mean, error = float(means.mean()), float(means.std()) / len(means) ** 0.5
    towards = -1 if version == "gptq" else 1
    if error > SURE or not NEAR_ONE[0] <= mean * towards <= NEAR_ONE[1]:
        return None
    other = "gptq_v2" if version == "gptq" else "gptq"
    return other, f"read as {version}, codes lie {mean:+.2f} steps off their zero points on average; read as {other}, 0"


def _distances(folder: ModelFolder, name: str, layer: Layer) -> NDArray[np.float64]:
    """Mean of code − stored zero point of some rows, float64 (rows,). Words with an all-ones value, which writers of v1
    store in different ways, are left out.
    """
    shared = 32 if layer.bits == 3 else 32 // layer.bits  # values in a word, or in three that share some
    rows = min(SAMPLED_ROWS, layer.out_features) // shared * shared
    stored = values(np.asarray(folder.tensor(f"{name}.qzeros")), layer.bits)[:, :rows]  # (G, rows)
    plain = (stored != 2**layer.bits - 1).reshape(layer.groups, -1, shared).all(axis=-1)
    weight = np.repeat(plain, shared, axis=1).astype(np.float64)
    groups = group_of_columns(folder, name, layer)  # (in,)
    codes = unpack_columns(np.asarray(folder.tensor(f"{name}.qweight"))[:, :rows], layer.bits)  # (rows, in)
    distance = (codes - stored.astype(np.float64)[groups].T) * weight[groups].T
    counted = weight[groups].sum(axis=0)
    return np.asarray(distance.sum(axis=1)[counted > 0] / counted[counted > 0])


def _check_said(
    folder: ModelFolder,
    gptq: Mapping[str, Any],
    declared: str | None,
    evidence: _Evidence,
    against: list[str],
    looks: str,
) -> None:
    """Raise InputError when the values contradict what the config says or leaves out."""
    if against:
        said = f"says {declared}" if declared else "does not say the format, which means gptq,"
        raise InputError(
            f"the config {said} but {looks}",
            where=folder.path,
            why="taking one for the other shifts every weight by one step",
            fix=f"pass {OPTION} {against[0]}" if len(evidence.votes) < 2 else "the layers are of different formats",
        )
    if gptq.get("sym") and evidence.differing and not gptq.get("dynamic"):
        raise InputError(
            "the config says symmetric but a layer's zero points differ",
            where=folder.path,
            why=evidence.differing,
            fix=f"if you know the format pass {OPTION} {' or '.join(VERSIONS)}",
        )


def _reason(declared: str | None, evidence: _Evidence) -> str:
    if declared is not None:
        return f"{declared}, as the config says"
    tell = "as the zero points of symmetric layers confirm" if evidence.votes else "which the values do not contradict"
    return f"gptq (v1), the meaning of a config without checkpoint_format, {tell}"


def _check_lost(folder: ModelFolder, gptqmodel: bool, evidence: _Evidence) -> None:
    """Raise InputError when zero points lie under an OR of −1. Values that no OR covered show that nothing did."""
    wraps, three = evidence.wraps, evidence.wraps_at_3_bits
    lost = wraps if wraps.covered and not wraps.open else Wraps()
    if three.covered or three.open:
        lost += three
    if gptqmodel or not lost.hidden:
        return
    raise InputError(
        f"up to {lost.hidden} zero points of this checkpoint are lost",
        where=folder.path,
        why="AutoGPTQ packs a zero point of 0 as −1, all ones, over every value above it in its 32-bit word",
        fix="no reader can bring them back: quantize the source model again, symmetric, or with GPTQModel, or here",
    )
