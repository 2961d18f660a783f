"""The artifact's own numbers as a model in Transformers: what the runtime would compute if nothing else differed.

The config is the source's, but for what is tried in its place. Where the artifact has no head the embedding is one, as
runtimes take it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qalora_export.checkpoint.model_folder import ModelFolder, as_float32
from qalora_export.checkpoint.safetensors_file import TensorEntry
from qalora_export.errors import InputError
from qalora_export.verify.foreign.artifact import Foreign, Tensor
from qalora_export.verify.foreign.fit import HEAD
from qalora_export.verify.foreign.metadata import Difference
from qalora_export.verify.metrics import EXACT
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.layerwise import Change, LayerwiseModel
from qalora_export.verify.reference.logits import fixed_threads, noise_of, round_to_int8

F32 = np.dtype(np.float32)


class ArtifactFolder(ModelFolder):
    """The tensors of an artifact under a config of their own; `path` is a folder of ours that holds config.json."""

    def __init__(
        self, artifact: Foreign, config: Mapping[str, Any], path: Path, repaired: Mapping[str, NDArray[Any]]
    ) -> None:
        """repaired: name -> numbers that stand in for the artifact's, or for what it lacks."""
        self._tensors = dict(artifact.tensors)
        self._repaired = repaired
        self.path, self.config = path, {**config, "tie_word_embeddings": HEAD not in self}
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config), encoding="utf-8")

    def names(self) -> list[str]:
        return list(dict.fromkeys([*self._tensors, *self._repaired]))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._repaired

    def entry(self, name: str) -> TensorEntry:
        shape = self._repaired[name].shape if name in self._repaired else self._found(name).shape
        return TensorEntry(F32, tuple(shape), 0)

    def tensor(self, name: str) -> NDArray[Any]:
        """float32; what the artifact adds to norms is taken off again."""
        if name in self._repaired:
            return as_float32(self._repaired[name])
        tensor = self._found(name)
        values = np.concatenate([tensor.load(rows) for rows in tensor.slices()])
        return values - np.float32(tensor.shift) if tensor.shift else values

    def tensors(self) -> Iterator[tuple[str, NDArray[Any]]]:
        for name in self.names():
            yield name, self.tensor(name)

    def _found(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise InputError(f"the artifact has no tensor {name!r}", where=self.path)
        return self._tensors[name]


class OwnNumbers:
    """An artifact in Transformers, with any of its settings in place of the source's.

    config: the source's, complete. folder: an empty one for what is written on the way. bound: NMSE up to which a
    runtime that does the same may be off. rounding: what its kernels do to the input of a layer.
    """

    def __init__(
        self,
        artifact: Foreign,
        config: Mapping[str, Any],
        probes: ProbeSet,
        folder: Path,
        *,
        threads: int,
        bound: float = EXACT,
        rounding: Change = round_to_int8,
    ) -> None:
        self.artifact, self.config, self.probes, self.bound = artifact, config, probes, bound
        self._rounding = rounding
        self._folder, self._threads, self._count = folder, threads, 0

    def logprobs(
        self,
        tried: tuple[Difference, ...] = (),
        *,
        repaired: Mapping[str, NDArray[Any]] = MappingProxyType({}),
        int8: bool = False,
    ) -> NDArray[np.float32]:
        """float32 (positions, vocabulary). tried: settings of the artifact that are taken instead of the source's.

        repaired: numbers in place of the artifact's. int8: with the input of every layer but the head rounded to int8,
        as integer kernels do it. Raises InputError where a tensor is missing or has another shape.
        """
        with fixed_threads(self._threads), torch.inference_mode():
            model = self._model(tried, repaired, rounding=self._rounding if int8 else None)
            return model.run(self.probes.sequences(), decode=False)[0]

    def noise(self, exact: NDArray[np.float32], tried: tuple[Difference, ...] = ()) -> NDArray[np.float64]:
        """What float32 rounding alone makes of each position (reference.logits). exact: logprobs(tried)."""
        with fixed_threads(self._threads), torch.inference_mode():
            return noise_of(lambda change: self._model(tried, noise=change), self.probes, exact)

    def _model(
        self,
        tried: tuple[Difference, ...],
        repaired: Mapping[str, NDArray[Any]] = MappingProxyType({}),
        **changes: Any,
    ) -> LayerwiseModel:
        self._count += 1
        config = dict(self.config)
        for difference in tried:
            config |= difference.config
        folder = ArtifactFolder(self.artifact, config, self._folder / f"own-{self._count}", repaired)
        model = LayerwiseModel(folder, **changes)
        for difference in tried:
            if difference.frequencies is not None:
                model.rotate_by(difference.frequencies)
        return model
