"""Weights: every tensor of the artifact against the source's, by what its type can hold (holding.py).

A tensor is wrong when its error is more than a right tool leaves in its type, when it does not point the way the source
does, when single blocks stand out from its own others, or when all of it is scaled. What is wrong with it is then found
by trying (causes.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.model_folder import ModelFolder, as_float32
from qalora_export.errors import InputError
from qalora_export.grid.narrow import BFLOAT16
from qalora_export.progress import track
from qalora_export.verify.foreign.artifact import Foreign, Tensor
from qalora_export.verify.foreign.causes import cause_of
from qalora_export.verify.foreign.diagnosis import Part
from qalora_export.verify.foreign.fit import Fit, fit, source_of
from qalora_export.verify.foreign.graph import LogProbs, measured
from qalora_export.verify.foreign.holding import FLOATS, without_step
from qalora_export.verify.foreign.model import OwnNumbers


@dataclass(frozen=True, slots=True)
class Finding:
    """One tensor. cause: what is wrong with it, "" where nothing is; fit: None where it cannot be compared."""

    name: str
    stored_as: str
    kind: str
    values: int
    fit: Fit | None
    cause: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


def compared(artifact: Foreign, folder: ModelFolder, heads: Mapping[str, int]) -> list[Finding]:
    """Every tensor of the artifact, in its order. heads: module leaf -> head count, for what may be permuted."""
    found = []
    for name, tensor in track(list(artifact.tensors.items()), "weights, tensors"):
        source = source_of(folder, name)
        size = int(np.prod(tensor.shape))
        if source is None:
            found.append(Finding(name, tensor.stored_as, tensor.kind, size, None, _unknown(name)))
            continue
        if tuple(source.shape) != tuple(tensor.shape):
            cause = cause_of(tensor, source, None, folder, heads)
            found.append(Finding(name, tensor.stored_as, tensor.kind, size, None, cause))
            continue
        near, kind = fit(tensor, source), tensor.kind
        if not near.right and (narrow := _added_in(tensor, source)) is not None:
            near, kind = fit(replace(tensor, kind=narrow), source), narrow
        cause = "" if near.right else cause_of(tensor, source, near, folder, heads)
        found.append(Finding(name, tensor.stored_as, kind, size, near, cause))
    return found


def _added_in(tensor: Tensor, source: NDArray[Any]) -> str | None:
    """The 16-bit type in which a tool added 1 to the weights of a norm (GenAI's builder does), exactly; else None."""
    if not tensor.shift or FLOATS.get(tensor.kind) != FLOATS["F32"]:
        return None
    exact = as_float32(source[:]) + np.float32(tensor.shift)
    found = np.concatenate([tensor.load(rows).ravel() for rows in tensor.slices()]).reshape(exact.shape)
    for kind, dtype in (("F16", np.dtype(np.float16)), ("BF16", BFLOAT16)):
        if np.array_equal(found, exact.astype(dtype).astype(np.float32)):
            return kind
    return None


def _unknown(name: str) -> str:
    return "a bias that the model does not have" if name.endswith(".bias") else "the model has no such tensor"


def weights_part(
    folder: ModelFolder, reference: LogProbs, findings: list[Finding], own: OwnNumbers, numbers: LogProbs | None
) -> Part:
    """findings: of `compared`. reference: what the model answers; numbers: own.logprobs(), None if there are none."""
    artifact = own.artifact
    wrong = [finding for finding in findings if finding.cause]
    said = [f"{finding.name} ({without_step(finding.kind)}): {finding.cause}" for finding in wrong]
    said += [f"{name} is missing{_what_for(name)}" for name in artifact.absent]
    said += [f"{name} is no tensor of this architecture" for name in artifact.extra]
    kinds = sorted({without_step(finding.kind) for finding in findings})
    if not said:
        seen = f"{len(findings)} tensors are the model's, as {', '.join(kinds)} hold them"
        return Part("weights", "", "ok", seen)
    repaired = {f.name: source_of(folder, f.name) for f in wrong} | {
        name: source_of(folder, name) for name in artifact.absent
    }
    usable = {name: values for name, values in repaired.items() if values is not None}
    more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
    return Part("weights", "", "broken", said[0] + more, tuple(said), _proof(reference, own, numbers, usable))


def _what_for(name: str) -> str:
    return ": the runtime takes the embedding in its place" if name == "lm_head.weight" else ""


def _proof(reference: LogProbs, own: OwnNumbers, numbers: LogProbs | None, repaired: Mapping[str, NDArray[Any]]) -> str:
    """What the model's tensors in place of the wrong ones do to the artifact's own logits."""
    if not repaired:
        return ""
    try:
        mended = own.logprobs(repaired=repaired)
    except InputError as error:
        return f"with the model's tensors in their place it is no model yet: {error.what}"
    after = measured(own.probes, reference, mended).summary.kl_mean
    if numbers is None:
        return f"with the model's {len(repaired)} tensors in their place KL is {after:.3g} nats"
    before = measured(own.probes, reference, numbers).summary.kl_mean
    return f"KL {before:.3g} nats with them, {after:.3g} with the model's {len(repaired)} tensors in their place"
