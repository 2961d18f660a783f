"""Which part broke: the first layer, and inside it the first tensor, where a runtime leaves the PyTorch reference.

The probe sequence with the worst position is looked at: every projection, norm and sum of every layer. On the exact
path each point is compared by itself (bisect/forced.py): what is wrong there arose there.

On the shipped path int8 noise travels with the values, and two passes follow it: the hidden state after every decoder
layer, then every point inside the first layer that is wrong. At each the error is the largest NMSE of any position,
Σ (b̂ − b)² / Σ b², and what diverges is beyond a multiple of what int8 activations do at that point in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import QaloraError, RuntimeUnavailableError
from qalora_export.models.families import Family, family_of
from qalora_export.progress import status
from qalora_export.verify.bisect.forced import PointError
from qalora_export.verify.bisect.points import Point, layer_points, model_points
from qalora_export.verify.bisect.values import THROUGH, LaunchTaps, Reader, ReferenceModel, Suspect, reader_of
from qalora_export.verify.metrics import EXACT, PositionMetrics
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.local_proof import position_nmse
from qalora_export.verify.rule import Entry
from qalora_export.verify.session import Session
from qalora_export.verify.target import RunPath, Target

# A single sequence's worst position scatters around the floor; a fault is orders of magnitude above it.
TIMES_FLOOR = 10.0
UNSEEN = PointError(math.nan, EXACT)


@dataclass(frozen=True, slots=True)
class Step:
    """One point, or a layer by the worst point inside. nmse: at the position that is furthest beyond its bound, inf for
    NaN or another shape; nan where the runtime shows no value.
    """

    name: str
    what: str
    nmse: float
    bound: float

    @property
    def diverges(self) -> bool:
        return self.nmse > self.bound


@dataclass(frozen=True, slots=True)
class Bisection:
    """Findings for one runtime. layers: in order; inside: the points of the first wrong layer; note: what limits it."""

    runtime: str
    gate: str
    path: str
    mode: str
    sequence: str
    through: str
    layers: list[Step] = field(default_factory=list)
    inside: list[Step] = field(default_factory=list)
    note: str = ""

    @property
    def first_layer(self) -> str | None:
        """Name of the first wrong step of `layers`, "model.layers.3" say."""
        return next((step.name for step in self.layers if step.diverges), None)

    @property
    def first(self) -> Step | None:
        """The first point that diverges, as near as it can be told."""
        return next((step for step in [*self.inside, *self.layers] if step.diverges), None)

    def describe(self) -> str:
        if self.first is None:
            return f"bisect: {self.note or 'no point diverges beyond its bound'}"
        return f"bisect: first diverges at {self.first.name} ({self.first.what}), NMSE {self.first.nmse:.2e}"

    def as_json(self) -> dict[str, Any]:
        return {
            "gate": self.gate,
            "path": self.path,
            "mode": self.mode,
            "sequence": self.sequence,
            "through": self.through,
            "first_layer": self.first_layer,
            "first_tensor": self.first.name if self.first else None,
            "what": self.first.what if self.first else None,
            "nmse": self.first.nmse if self.first else None,
            "note": self.note,
            "layers": [_step_json(step) for step in self.layers],
            "inside": [_step_json(step) for step in self.inside],
        }


def bisect_failures(
    session: Session,
    targets: Iterable[Target],
    entries: list[Entry],
    positions: dict[tuple[str, str], PositionMetrics],
    launch: LaunchTaps,
) -> dict[str, Bisection]:
    """A bisection for every runtime with a failed logits gate.

    One that cannot be done is a note in the report: it never hides the failure that it was to explain.
    """
    model: ReferenceModel | None = None
    found: dict[str, Bisection] = {}
    for target in targets:
        suspect = suspect_of(entries, positions, target.name, session.probes)
        if suspect is None:
            continue
        with status(f"{target.name}: which part broke"):
            try:
                model = model or ReferenceModel(session.checkpoint.path, threads=session.settings.threads)
                found[target.name] = _bisect_target(target, suspect, model, launch)
            except QaloraError as error:
                note = f"{error.what} {error.why}".strip()
                found[target.name] = _nothing_yet(target.name, suspect, through="", note=note)
    return found


def _bisect_target(target: Target, suspect: Suspect, model: ReferenceModel, launch: LaunchTaps) -> Bisection:
    session, runtime = target.session, target.runtime
    read = reader_of(
        runtime.format,
        target.exact if suspect.path == "exact" else target.shipped,
        session.checkpoint,
        suspect,
        session.workdir / f"{target.name}-bisect",
        threads=session.settings.threads,
        launch=launch,
    )
    config = session.checkpoint.config
    layers, through = config["num_hidden_layers"], THROUGH[runtime.format]
    found = bisect(target.name, suspect, model, layers, read, family=family_of(config), through=through)
    if runtime.taps_of != target.name and found.first is None and not found.note:
        blame = "the fault lies in its own settings or in its generation loop"
        return replace(found, note=f"{runtime.taps_of} computes the same graph right: {blame}")
    return found


def suspect_of(
    entries: Iterable[Entry], positions: dict[tuple[str, str], PositionMetrics], runtime: str, probes: ProbeSet
) -> Suspect | None:
    """The failed logits gate of a runtime that says most (prompt before decode), or None.

    Gate G3 looks at every layer itself and names what is wrong.
    """
    failed = {entry.gate: entry for entry in entries if entry.runtime == runtime and entry.status == "fail"}
    decode_path: RunPath = "exact"
    if "G4" in failed and not any(c.figure.startswith("exact_") and not c.passed for c in failed["G4"].checks):
        decode_path = "shipped"
    choices: tuple[tuple[str, RunPath, str], ...] = (
        ("G2", "exact", "prefill"),
        ("G4", decode_path, "decode"),
    )
    for gate, path, mode in choices:
        measured = positions.get((runtime, path if mode == "prefill" else f"{path} {mode}"))
        if gate in failed and measured is not None:
            worst = int(np.argmax(np.where(measured.bad, np.inf, measured.nmse / measured.sensitivity)))
            index = int(np.searchsorted(probes.starts, worst, side="right")) - 1
            start, length = int(probes.starts[index]), int(probes.lengths[index])
            return Suspect(gate, path, mode, probes.names[index], probes.ids[start : start + length])
    return None


def bisect(
    runtime: str,
    suspect: Suspect,
    model: ReferenceModel,
    layers: int,
    read: Reader,
    *,
    family: Family,
    through: str,
) -> Bisection:
    """Look into every layer, and name what is wrong inside the first wrong one. Never raises for what the runtime does.

    family: says where its decoder layers can be observed.
    """
    found = _nothing_yet(runtime, suspect, through=through)
    look = _each_by_itself if suspect.path == "exact" else _along_the_way
    try:
        outer, inside = look(suspect, model, layers, read, family)
    except RuntimeUnavailableError as error:
        return replace(found, note=f"the values inside could not be read: {error}")
    found = replace(found, layers=outer, inside=inside)
    unseen = [step.name for step in [*found.layers, *found.inside] if math.isnan(step.nmse)]
    return replace(found, note=f"the runtime does not show {', '.join(unseen)}") if unseen else found


def _nothing_yet(runtime: str, suspect: Suspect, *, through: str, note: str = "") -> Bisection:
    return Bisection(runtime, suspect.gate, suspect.path, suspect.mode, suspect.sequence, through, note=note)


def explain(entries: list[Entry], found: Bisection) -> list[Entry]:
    """The same entries; those of the runtime's failed logits gates begin `where` with the finding."""
    return [
        replace(entry, where=(found.describe(), *entry.where))
        if entry.runtime == found.runtime and entry.gate in ("G2", "G3", "G4") and entry.status == "fail"
        else entry
        for entry in entries
    ]


def _each_by_itself(
    suspect: Suspect, model: ReferenceModel, layers: int, read: Reader, family: Family
) -> tuple[list[Step], list[Step]]:
    """(every layer by the worst point inside it, the points of the first wrong one)"""
    first, *outputs, norm, head = model_points(layers, family.embedding_node)
    inside = [layer_points(index, family.points) for index in range(layers)]
    points = [first, *(point for points in inside for point in points), norm, head]
    errors = model.errors(suspect.ids, points, read(suspect.ids, points))

    def step(point: Point) -> Step:
        error = errors.get(point.key, UNSEEN)
        return Step(point.name, point.what, error.nmse, error.allowed)

    def layer(output: Point, steps: list[Step]) -> Step:
        worst = max(steps, key=lambda one: -1.0 if math.isnan(one.nmse) else one.nmse / one.bound)
        if not worst.diverges:  # a point that is not shown is never "no point diverges"
            worst = next((one for one in steps if math.isnan(one.nmse)), worst)
        return replace(worst, name=output.name, what=f"the worst inside layer {output.name.rpartition('.')[2]}")

    by_layer = [[step(point) for point in points] for points in inside]
    shown = [step(first), *(layer(*pair) for pair in zip(outputs, by_layer, strict=True)), step(norm), step(head)]
    wrong = next((steps for steps in by_layer if any(one.diverges for one in steps)), [])
    return shown, [] if shown[0].diverges else wrong


def _along_the_way(
    suspect: Suspect, model: ReferenceModel, layers: int, read: Reader, family: Family
) -> tuple[list[Step], list[Step]]:
    """(every layer, the points of the first wrong one), errors of earlier points included."""
    outer = _steps(suspect, model, model_points(layers, family.embedding_node), read)
    wrong = next((index for index, step in enumerate(outer) if step.diverges), None)
    if wrong is None or not 1 <= wrong <= layers:
        return outer, []
    return outer, _steps(suspect, model, layer_points(wrong - 1, family.points), read)


def _steps(suspect: Suspect, model: ReferenceModel, points: list[Point], read: Reader) -> list[Step]:
    want, got = model.activations(suspect.ids, points), read(suspect.ids, points)
    floor = model.activations(suspect.ids, points, int8=True)
    steps = []
    for point in points:
        bound = max(EXACT, TIMES_FLOOR * worst_nmse(want[point.key], floor[point.key]))
        error = worst_nmse(want[point.key], got[point.key]) if point.key in got else float("nan")
        steps.append(Step(point.name, point.what, error, bound))
    return steps


def worst_nmse(want: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Largest NMSE of any position; both float32 (positions, features). inf for NaN, Inf or another shape."""
    return float(position_nmse(got, want).max())


def _step_json(step: Step) -> dict[str, Any]:
    return {"name": step.name, "what": step.what, "nmse": step.nmse, "bound": step.bound, "diverges": step.diverges}
