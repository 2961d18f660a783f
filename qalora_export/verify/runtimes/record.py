"""One record per runtime: which artifact it runs, how that artifact is read back, what its exact path is.

A runtime is added by adding its file to this package, with a class that registers itself:

    @register
    class MyRuntime(RuntimeRecord):
        name = "my-runtime"
        …

The process that runs it is qalora_runtimes' side (qalora_runtimes.records): the same name, found there the same way.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.generation import Generation
from qalora_export.errors import InputError
from qalora_export.formats.account import Account
from qalora_export.formats.contents import Contents
from qalora_export.models.families.family import Format
from qalora_export.safety import HashFile
from qalora_export.verify import runtimes
from qalora_export.verify.kernels.products import TappedGraph
from qalora_export.verify.probes.behaviour import BehaviourProbes

Facts = dict[str, Any]
Matrices = Iterator[tuple[str, NDArray[np.float32]]]  # (module, dequantized (out, in))


@dataclass(frozen=True)
class Artifact:
    """What a runtime loads: a GGUF file (with an adapter file in the split layout) or an ONNX folder."""

    path: Path
    lora: Path | None = None


@dataclass(frozen=True, slots=True)
class TextHabits:
    """What a runtime does by design. adds_specials: puts BOS/EOS around plain text as Hugging Face's tokenizer does.

    cuts_bos: renders conversations without the leading BOS text that its tokenizer will add as an id.
    rewrites_tools: changes the descriptions of tools before the chat template sees them.
    reads_gguf: has the tokenizer from a GGUF file, which cannot say everything (formats/gguf/tokenizer/reading.py).
    reads_as_genai: has a tokenizer of its own that takes parts of tokenizer.json (formats/onnx/genai_text/reading.py).
    own_decoder: drops bytes that are no character, ends a text at NUL, and drops a space behind a hidden special token.
    """

    adds_specials: bool = True
    cuts_bos: bool = False
    reads_gguf: bool = False
    reads_as_genai: bool = False
    rewrites_tools: bool = False
    own_decoder: bool = False


class RuntimeRecord(ABC):
    """Everything runtime-specific about verifying.

    format: of the artifact. dequantizer: who dequantizes for gate G1. habits, own_tokenizer: whether the runtime itself
    answers gate G5, and how. taps_of: the runtime that shows the values inside this one's graph. half_cache: the
    shipped path keeps keys and values in float16. rounding_activations: activation function (config.json) -> the
    runtime's operator that rounds in it, which its runner replaces by the function on the exact path and must say so.
    """

    name: ClassVar[str]
    format: ClassVar[Format]
    dequantizer: ClassVar[str]
    habits: ClassVar[TextHabits] = TextHabits()
    own_tokenizer: ClassVar[bool] = True
    taps_of: ClassVar[str]
    half_cache: ClassVar[bool] = False
    rounding_activations: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @abstractmethod
    def read_back(self, artifact: Path) -> Contents:
        """Gate G0: the artifact's contents by an independent reader."""

    @abstractmethod
    def dequantized(self, artifact: Path, workdir: Path) -> Matrices:
        """Gate G1: every matrix by the runtime's own dequantizer."""

    @abstractmethod
    def expected(self, checkpoint: CanonicalCheckpoint, frequencies: NDArray[Any]) -> Facts:
        """Gate G0: facts by the checkpoint. frequencies: the reference's own RoPE, radians per position."""

    @abstractmethod
    def found(self, artifact: Path, contents: Any) -> Facts:
        """Gate G0: the same facts by the artifact; contents: what read_back gave."""

    @abstractmethod
    def account(self, checkpoint: CanonicalCheckpoint, artifact: Path, contents: Any, hash_of: HashFile) -> Account:
        """Gate G0: every entry of the artifact against a fresh export; contents: what read_back gave."""

    @abstractmethod
    def shipped(self, artifact: Path) -> Artifact:
        """What to run for gate G3: the artifact as users run it."""

    @abstractmethod
    def tapped_graph(self, shipped: Artifact, checkpoint: CanonicalCheckpoint, workdir: Path) -> TappedGraph:
        """What to run for the local proof of gate G3: every matrix product, what it sees, gives and documents."""

    @abstractmethod
    def exact(self, artifact: Path, workdir: Path) -> Artifact:
        """What to run for gate G2: the same numbers for rounding-free kernels, written into `workdir`."""

    @abstractmethod
    def expected_defaults(self, generation: Generation, config: Mapping[str, Any]) -> dict[str, Any]:
        """Gate G6: what the runner must report as `defaults` for a folder that generates so; float, int, bool, list."""

    def lost_settings(self, generation: Generation) -> tuple[str, ...]:
        """Gate G6: settings of the folder that this runtime has no place for."""
        return generation.other

    def ends_by_design(self, texts: Sequence[str | None]) -> dict[int, str]:
        """Gate G6: ids at which the runtime ends whatever a file says, with the reason. texts: of each id."""
        return {}

    def texts_by_design(self, texts: Sequence[str | None]) -> dict[int, str]:
        """Gate G6: ids that the runtime hides or shows whatever a file says, with the reason."""
        return {}

    def text_behaviour(self, artifact: Path, probes: BehaviourProbes, said: Mapping[str, Any]) -> dict[str, Any]:
        """Gate G6: text answers by the artifact's own tokenizer files, for a runtime without a tokenizer."""
        raise NotImplementedError

    def text_differences_accepted(self, artifact: Path) -> bool:
        """Gate G5: whether the artifact says that it was exported with differences in its tokenizer."""
        return False


R = TypeVar("R", bound=type[RuntimeRecord])
_REGISTERED: dict[str, RuntimeRecord] = {}


def register(record: R) -> R:
    """Register a runtime by its name. Raises ValueError when the name is taken."""
    if record.name in _REGISTERED:
        raise ValueError(f"two runtimes are called {record.name}")
    _REGISTERED[record.name] = record()
    return record


def all_runtimes() -> Mapping[str, RuntimeRecord]:
    """Every runtime by name, in the order of their files' names."""
    _import_all()
    return _REGISTERED


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(runtimes.__path__):
        importlib.import_module(f"{runtimes.__name__}.{module.name}")


def requested(names: Iterable[str] | None, given: Mapping[str, Path | None]) -> dict[str, Path]:
    """Runtime -> the artifact it is verified on. given: by format. names None: every runtime of a given artifact.

    Raises InputError when a runtime is not known, has no artifact, or none is left.
    """
    records = all_runtimes()
    if names is None:
        names = [name for name, record in records.items() if given.get(record.format) is not None]
    artifacts: dict[str, Path] = {}
    for name in dict.fromkeys(names):
        if name not in records:
            raise InputError(f"no runtime is called {name!r}", fix=f"name one of {', '.join(records)}")
        path = given.get(records[name].format)
        if path is None or not path.exists():
            kind = records[name].format
            raise InputError(
                f"{name} is requested but there is no {kind} artifact to run",
                where=path or "",
                fix=f"pass --{kind}, or leave the runtime out",
            )
        artifacts[name] = path
    if not artifacts:
        raise InputError("no runtime is requested", fix="pass --gguf or --onnx")
    return artifacts
