"""The noise floor of the shipped path: what int8 activations cost this model in this runtime.

The noise of the unadapted base in the same runtime is no floor; measured, it fails right models: on the
sample (7.5 M parameters, g = 32) a merged fine-tune whose exact path agrees to 4e-10 has 2.9 times the base's NMSE in
llama.cpp and 2.7 times in ONNX Runtime, because tuning made the model more sensitive to the same rounding. Rounding the
input of every quantized layer to int8 in PyTorch predicts both models: measured over simulated NMSE was 1.00 and 1.04
(base, merged) in llama.cpp, 0.94 and 0.91 in ONNX Runtime, and 0.93 to 1.16 over 2, 3, 4 and 8 bits, groups of 32, 64
and 128 in both. So

    floor = simulation of this checkpoint · gain,      gain = base in the runtime / simulation of the base

The base says how noisy the runtime's kernels are, the simulation carries that over to the adapted weights. Without a
base to measure (the checkpoint is the base itself, or its base is not on this machine) the gain is taken as
ASSUMED_GAIN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.provenance import base_of
from qalora_export.errors import InputError
from qalora_export.verify.metrics import SCATTERING, PositionMetrics, following_ids, position_metrics
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.logits import reference_logprobs, simulated_int8_logprobs
from qalora_export.verify.rule import Limit
from qalora_export.verify.runtimes.record import Artifact, RuntimeRecord
from qalora_export.verify.runtimes.runs import Runs

ASSUMED_GAIN = 1.25  # the largest measured was 1.16
# Counts and shifts grow with the size of the error, NMSE and KL with its square.
LINEAR = ("disagreements", "perplexity_shift")
# A count of zero still scatters by about one (Poisson), which no bootstrap of zeros can show.
LEAST_ERRORS = {"disagreements": 1.0}
# What float32 rounding leaves even where no activation is rounded to int8 (accuracy_level 1, bits without a kernel).
FLOAT32_NOISE = 1e-9


@dataclass(frozen=True)
class Floor:
    """What noise the shipped path may have in one runtime. source: how it was found.

    figures, errors: of metrics.Summary's scattering figures and kl_max, and their standard errors. gain: how noisy the
    runtime's kernels are against simulated int8 rounding, and whether that was measured. measured_on_base: what the
    unadapted base shows in the runtime. metrics, base_metrics: simulation and base per position, for plots.
    """

    source: str
    figures: Mapping[str, float]
    errors: Mapping[str, float]
    gain: float = 1.0
    gain_measured: bool = False
    measured_on_base: Mapping[str, float] | None = None
    metrics: PositionMetrics | None = None
    base_metrics: PositionMetrics | None = None

    def bound(self, limit: Limit) -> float:
        """Largest passing value of a figure; "shipped_" before its name does not matter."""
        name = limit.figure.removeprefix("shipped_")
        return limit.bound * self.figures[name] + limit.errors * self.errors.get(name, 0.0)

    def as_json(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "source": self.source,
            "figures": dict(self.figures),
            "standard_errors": dict(self.errors),
            "gain": self.gain,
            "gain_measured": self.gain_measured,
            "measured_on_base": dict(self.measured_on_base) if self.measured_on_base else None,
        }


@dataclass
class NoiseFloor:
    """Measures floors on demand; references, simulations and exported bases are made once.

    reference: of the checkpoint itself, float32 (positions, vocabulary).
    """

    checkpoint: Path
    given_base: Path | None
    probes: ProbeSet
    reference: NDArray[np.float32]
    runs: Runs
    threads: int
    workdir: Path
    _exported: dict[str, Artifact] = field(default_factory=dict)
    _references: dict[Path, NDArray[np.float32]] = field(default_factory=dict)
    _simulated: dict[tuple[Path, int | None, int | None], PositionMetrics] = field(default_factory=dict)

    def of(self, runtime: RuntimeRecord, shipped: Artifact) -> Floor:
        """Raises RuntimeUnavailableError when the base cannot be run, InputError when it is not this model's."""
        head = runtime.head_block(shipped.path)
        expected = self.simulation(self.checkpoint, runtime.int8_block, head)
        base = self.base
        if base is None:
            source = f"int8 rounding simulated in PyTorch, times {ASSUMED_GAIN} (no base to measure kernels on)"
            return _scaled(source, expected, ASSUMED_GAIN)
        measured = self._base_in(runtime, shipped, base)
        gain = measured.summary().nmse_mean / self.simulation(base, runtime.int8_block, head).summary().nmse_mean
        source = f"int8 rounding simulated in PyTorch, times {gain:.3f} as measured on the unadapted base {base.name}"
        return _scaled(source, expected, gain, on_base=measured)

    def simulation(self, checkpoint: Path, block: int | None, head_block: int | None = None) -> PositionMetrics:
        """Simulated int8 against the reference of the same checkpoint; blocks as in simulated_int8_logprobs."""
        key = (checkpoint, block, head_block)
        if key not in self._simulated:
            found = simulated_int8_logprobs(
                checkpoint, self.probes, threads=self.threads, block=block, head_block=head_block
            )
            self._simulated[key] = position_metrics(self._reference(checkpoint), found, self._following)
        return self._simulated[key]

    @property
    def base(self) -> Path | None:
        """The base checkpoint to measure on: the given one, else the one the manifest names, beside the checkpoint."""
        if self.given_base is None:
            return base_of(self.checkpoint)
        base, adapted = CanonicalCheckpoint(self.given_base), CanonicalCheckpoint(self.checkpoint)
        if base.modules != adapted.modules or base.config["vocab_size"] != adapted.config["vocab_size"]:
            raise InputError(
                "base and checkpoint differ in modules, bits, groups or vocabulary",
                where=self.given_base,
                fix="give the base that the checkpoint was merged from",
            )
        return self.given_base

    def _base_in(self, runtime: RuntimeRecord, shipped: Artifact, base: Path) -> PositionMetrics:
        if runtime.format not in self._exported:
            folder = self.workdir / f"base-{runtime.format}"
            folder.mkdir()
            self._exported[runtime.format] = runtime.export(base, folder, runtime.export_settings(shipped.path))
        artifact = self._exported[runtime.format]
        found = self.runs.logprobs(runtime.name, artifact, "prefill", exact=False, label="base")
        return position_metrics(self._reference(base), found, self._following)

    def _reference(self, checkpoint: Path) -> NDArray[np.float32]:
        if checkpoint == self.checkpoint:
            return self.reference
        if checkpoint not in self._references:
            self._references[checkpoint] = reference_logprobs(checkpoint, self.probes, threads=self.threads).logprobs
        return self._references[checkpoint]

    @property
    def _following(self) -> NDArray[np.int32]:
        return following_ids(self.probes.ids, self.probes.lengths)


def _scaled(source: str, expected: PositionMetrics, gain: float, *, on_base: PositionMetrics | None = None) -> Floor:
    """The simulation's figures times the gain of noise power, and never below float32's own noise."""
    powers = {name: gain**0.5 if name in LINEAR else gain for name in (*SCATTERING, "kl_max")}
    least = {name: FLOAT32_NOISE**0.5 if name in LINEAR else FLOAT32_NOISE for name in powers}
    summary, errors = asdict(expected.summary()), expected.standard_errors()
    return Floor(
        source=source,
        figures={name: max(power * summary[name], least[name]) for name, power in powers.items()},
        errors={name: max(powers[name] * error, LEAST_ERRORS.get(name, 0.0)) for name, error in errors.items()},
        gain=gain,
        gain_measured=on_base is not None,
        measured_on_base=asdict(on_base.summary()) if on_base else None,
        metrics=expected,
        base_metrics=on_base,
    )
