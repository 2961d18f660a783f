"""The noise floor of the shipped path: what a runtime's int8 kernels do to the unadapted base.

The base goes through the same export, the same runtime and the same probe set; its distance to its own PyTorch
reference is what the kernels cost, and the adapted model may cost at most 1.25 times that. Without a base to measure
(the checkpoint is the base itself, or its base is not on this machine) the floor is simulated in PyTorch: the same
checkpoint with the input of every quantized layer rounded to int8.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import InputError
from qalora_export.verify.adapters import RuntimeAdapter
from qalora_export.verify.logits_gates import Floor
from qalora_export.verify.metrics import PositionMetrics, compare, following_ids
from qalora_export.verify.probes import ProbeSet
from qalora_export.verify.provenance import base_of
from qalora_export.verify.reference import reference_logprobs, simulated_int8_logprobs
from qalora_export.verify.runs import Artifact, Runs


@dataclass
class NoiseFloor:
    """Measures floors on demand; references and exported bases are made once. reference: of the checkpoint itself."""

    checkpoint: Path
    given_base: Path | None
    probes: ProbeSet
    reference: NDArray[np.float32]
    runs: Runs
    threads: int
    workdir: Path
    _exported: dict[str, Artifact] = field(default_factory=dict)
    _base_reference: NDArray[np.float32] | None = None
    _simulated: PositionMetrics | None = None

    def of(self, adapter: RuntimeAdapter, shipped: Artifact) -> Floor:
        """Raises RuntimeUnavailableError when the base cannot be run, InputError when it is not this model's."""
        base = self.base
        if base is None:
            return self._floor("simulated: inputs of quantized layers rounded to int8 in PyTorch", self._simulation())
        if adapter.format not in self._exported:
            folder = self.workdir / f"base-{adapter.format}"
            folder.mkdir()
            self._exported[adapter.format] = adapter.export_like(shipped.path, base, folder)
        if self._base_reference is None:
            self._base_reference = reference_logprobs(base, self.probes, threads=self.threads).logprobs
        found = self.runs.logprobs(adapter.runtime, self._exported[adapter.format], "prefill", exact=False,
                                   label="base")  # fmt: skip
        following = following_ids(self.probes.ids, self.probes.lengths)
        return self._floor(f"unadapted base {base.name}", compare(self._base_reference, found, following))

    @property
    def base(self) -> Path | None:
        """The base checkpoint to measure on: the given one, else the one the manifest names, beside the checkpoint."""
        if self.given_base is None:
            return base_of(self.checkpoint)
        base, adapted = CanonicalCheckpoint(self.given_base), CanonicalCheckpoint(self.checkpoint)
        if base.modules != adapted.modules or base.config["vocab_size"] != adapted.config["vocab_size"]:
            raise InputError("base and checkpoint differ in modules, bits, groups or vocabulary", where=self.given_base,
                             fix="give the base that the checkpoint was merged from")  # fmt: skip
        return self.given_base

    def _simulation(self) -> PositionMetrics:
        if self._simulated is None:
            found = simulated_int8_logprobs(self.checkpoint, self.probes, threads=self.threads)
            self._simulated = compare(self.reference, found, following_ids(self.probes.ids, self.probes.lengths))
        return self._simulated

    @staticmethod
    def _floor(source: str, metrics: PositionMetrics) -> Floor:
        return Floor(source, asdict(metrics.summary()), metrics)
