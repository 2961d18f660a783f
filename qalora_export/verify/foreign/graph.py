"""Graph and metadata: the artifact's own numbers in Transformers against the runtime's rounding-free path; then, if
they differ, which setting of the artifact explains it. And kernels: that path against the one that ships.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.verify.foreign.diagnosis import Part
from qalora_export.verify.foreign.metadata import Difference
from qalora_export.verify.foreign.model import OwnNumbers
from qalora_export.verify.metrics import EXACT, PositionMetrics, Summary, following_ids, position_metrics
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.runtimes.runs import CrashedError

LogProbs = NDArray[np.float32]
MOST_TRIED = 6  # settings whose every subset is worth a run of the model, at most one setting left out at a time
# KL of the shipped kernels against the exact path, in what rounding every layer's input to int8 costs in PyTorch.
KERNELS_FACTOR, KERNELS_FLOOR = 4.0, 2e-3
WANTED = {  # the paths that another is held against
    "exact": "even without rounding",
    "decode": "without rounding, a token at a time,",
    "ranges": "with activations rounded to the ranges of the file",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One comparison of log-probabilities: positions, and their summary. bound: NMSE up to which they are the same."""

    positions: PositionMetrics
    summary: Summary
    bound: float = EXACT

    @property
    def agrees(self) -> bool:
        """Whether float32 rounding explains every difference, as gate G2 has it."""
        s = self.summary
        return s.bad_positions == 0 and s.nmse_scaled_max <= self.bound and (s.disagreements == 0 or self.bound > EXACT)

    def figures(self) -> dict[str, float]:
        s = self.summary
        return {"kl": s.kl_mean, "kl_max": s.kl_max, "top1": s.top1, "nmse": s.nmse_max, "scaled": s.nmse_scaled_max}


def measured(probes: ProbeSet, wanted: LogProbs, found: LogProbs) -> Measured:
    positions = position_metrics(wanted, found, following_ids(probes.ids, probes.lengths))
    return Measured(positions, positions.summary())


def scaled(own: OwnNumbers, wanted: LogProbs, found: LogProbs, tried: tuple[Difference, ...] = ()) -> Measured:
    """The same, where needed knowing how much each position amplifies rounding. wanted: own.logprobs(tried)."""
    plain = replace(measured(own.probes, wanted, found), bound=own.bound)
    if plain.summary.bad_positions or not (plain.positions.nmse > EXACT).any() or plain.summary.kl_mean > 1e-4:
        return plain
    positions = plain.positions.scaled_by(own.noise(wanted, tried))
    return Measured(positions, positions.summary(), own.bound)


def graph_part(
    runtime: str, own: OwnNumbers, exact: LogProbs, differences: Sequence[Difference], numbers: LogProbs | None
) -> Part:
    """numbers: own.logprobs(), None where the artifact lacks what a model needs."""
    said = tuple(difference.said for difference in differences)
    if numbers is None:
        return Part("graph", runtime, "not run", "tensors are missing, so its numbers make no model", said)
    if (at := _first_bad(numbers)) is not None:
        where = own.probes.place(at)
        return Part("graph", runtime, "not run", f"its own numbers give NaN or infinite logits, first at {where}", said)
    plain = scaled(own, numbers, exact)
    seen = f"its own numbers in Transformers and in {runtime} differ by NMSE {plain.summary.nmse_max:.1e} at most"
    if plain.agrees:
        note = "" if not said else f"; {len(said)} settings differ without an effect on these probes"
        return Part("graph", runtime, "ok" if not said else "broken", seen + note, said, figures=plain.figures())
    cause, proof = _cause(own, exact, differences, plain)
    return Part("graph", runtime, "broken", cause, said, proof, plain.figures())


def graph_refused(runtime: str, error: RuntimeUnavailableError) -> Part:
    """A runtime that is not there leaves the part open; one that cannot run the file has found something."""
    if isinstance(error, CrashedError):
        return Part("graph", runtime, "broken", f"{runtime} cannot run it: {error.reason}")
    return Part("graph", runtime, "not run", error.reason)


def _first_bad(logprobs: LogProbs) -> int | None:
    """The first position with a NaN or +∞, which nothing can be compared with."""
    bad = (np.isnan(logprobs) | (logprobs == np.inf)).any(axis=1)
    return int(np.argmax(bad)) if bad.any() else None


def _cause(own: OwnNumbers, exact: LogProbs, differences: Sequence[Difference], plain: Measured) -> tuple[str, str]:
    """(what is broken, what was tried). The smallest set of settings that explains the runtime's logits."""
    usable = [difference for difference in differences if difference.can_be_tried][:MOST_TRIED]
    apart = f"KL {plain.summary.kl_mean:.3g} nats, NMSE {plain.summary.nmse_max:.2g}"
    for count in range(1, len(usable) + 1):
        for tried in itertools.combinations(usable, count):
            found = _tried(own, exact, tried)
            if found is not None and found.agrees:
                names = " and ".join(difference.said for difference in tried)
                proof = (
                    f"with that value Transformers gives the runtime's logits (NMSE {found.summary.nmse_max:.1e}), "
                    f"with the model's they are apart ({apart})"
                )
                return names, proof
    listed = f"; settings that differ: {'; '.join(d.said for d in differences)}" if differences else ""
    return (
        f"the runtime computes something else with the artifact's own numbers ({apart}){listed}",
        f"{len(usable)} settings tried, none explains it" if usable else "no setting differs that could explain it",
    )


def _tried(own: OwnNumbers, exact: LogProbs, tried: tuple[Difference, ...]) -> Measured | None:
    try:
        numbers = own.logprobs(tried)
        return scaled(own, numbers, exact, tried)
    except (InputError, ValueError, RuntimeError):  # a value that makes no model, or NaN
        return None


def kernels_part(runtime: str, own: OwnNumbers, paths: dict[str, LogProbs], numbers: LogProbs | None) -> Part:
    """paths: "exact", "shipped", "decode" (exact, token by token), and "ranges" (exact, but for activations rounded to
    ranges of the file) where it has them: what that costs is the file's, and no kernel's.
    """
    for path, words in WANTED.items():
        if path in paths and (at := _first_bad(paths[path])) is not None:
            said = f"{words} it gives NaN or infinite logits, first at {own.probes.place(at)}"
            return Part("kernels", runtime, "broken", said)
    cost = measured(own.probes, paths.get("ranges", paths["exact"]), paths["shipped"])
    stepwise = measured(own.probes, paths["exact"], paths["decode"])
    figures: dict[str, Any] = cost.figures() | {"decode_nmse": stepwise.summary.nmse_max}
    if cost.summary.bad_positions:
        where = own.probes.place(int(np.argmax(cost.positions.bad)))
        return Part("kernels", runtime, "broken", f"NaN or infinite logits, first at {where}", figures=figures)
    allowed = KERNELS_FLOOR
    if numbers is not None and _first_bad(numbers) is None:
        simulated = measured(own.probes, numbers, own.logprobs(int8=True))
        allowed = max(allowed, KERNELS_FACTOR * simulated.summary.kl_mean)
        figures |= {"simulated_kl": simulated.summary.kl_mean}
    figures |= {"allowed_kl": allowed}
    seen = f"the shipped kernels cost {cost.summary.kl_mean:.2g} nats (KL) against exact ones"
    if cost.summary.kl_mean <= allowed:
        return Part("kernels", runtime, "ok", seen, figures=figures)
    return Part(
        "kernels",
        runtime,
        "broken",
        f"{seen}, more than the {allowed:.2g} that rounding to int8 explains",
        proof="the same file with its numbers as float32 does not show it",
        figures=figures,
    )


def kernels_refused(runtime: str, error: RuntimeUnavailableError, *, graph_runs: bool, is_half: bool) -> Part:
    """graph_runs: the same nodes and numbers run without rounding, so that only the kernels are what fails."""
    if not graph_runs or not isinstance(error, CrashedError):
        return Part("kernels", runtime, "not run", error.reason)
    if is_half:
        said = f"{runtime} has no processor kernels that run this float16 graph; in float32 it runs"
        return Part("kernels", runtime, "not run", said, (error.reason,))
    said = f"{runtime} cannot run it as it is, and runs the same numbers without rounding: {error.reason}"
    return Part("kernels", runtime, "broken", said)


def costs(
    probes: ProbeSet, reference: LogProbs, runtime: str, numbers: LogProbs | None, paths: Mapping[str, LogProbs]
) -> dict[str, Any]:
    """What each step away from the model costs, against the model: its own numbers, exact and shipped kernels."""
    exact = f"exact path in {runtime}"
    steps = {"its numbers in Transformers": numbers, exact: paths.get("exact")}
    steps |= {f"{exact}, activations in the file's ranges": paths.get("ranges")}
    steps |= {f"as shipped in {runtime}": paths.get("shipped")}
    return {
        name: measured(probes, reference, logprobs).figures()
        for name, logprobs in steps.items()
        if logprobs is not None
    }
