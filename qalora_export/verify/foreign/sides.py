"""What differs between the formats: how an artifact is opened, run without rounding, and what it says about itself."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qalora_export.checkpoint.generation import GENERATION
from qalora_export.errors import InputError
from qalora_export.formats.gguf.tensor_table import ROPE_LONG
from qalora_export.formats.onnx.layout import GENAI_CONFIG
from qalora_export.safety import inside, read_json
from qalora_export.verify.foreign.artifact import Foreign
from qalora_export.verify.foreign.ends import genai_sampling_differences, gguf_sampling_differences, llama_cpp_ends
from qalora_export.verify.foreign.gguf_file import open_gguf, rotary_divisors
from qalora_export.verify.foreign.graph_settings import graph_differences
from qalora_export.verify.foreign.metadata import Difference, gguf_differences
from qalora_export.verify.foreign.onnx_exact import float_variant
from qalora_export.verify.foreign.onnx_folder import Graph, open_onnx
from qalora_export.verify.foreign.onnx_interface import NO_CACHE, has_cache, output_in_place_of_logits, with_logits
from qalora_export.verify.metrics import EXACT
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.layerwise import Change
from qalora_export.verify.reference.logits import round_to_int8
from qalora_export.verify.reference.text import folder_answers
from qalora_export.verify.runtimes.facts import expected_text_facts
from qalora_export.verify.runtimes.llama_cpp import facts_of
from qalora_export.verify.runtimes.onnxruntime_genai import expected_generation_ends
from qalora_export.verify.runtimes.record import Artifact, TextHabits, all_runtimes
from qalora_export.verify.runtimes.runs import Runs
from qalora_export.verify.runtimes.twin import write_twin

# NMSE that rotary tables in float16 leave in a graph that is run in float32 otherwise: 8e-6 in a Llama of two layers.
HALF_TABLES = 1e-4
GENAI = "onnxruntime-genai"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def round_whole_to_uint8(x: torch.Tensor) -> torch.Tensor:
    """What DynamicQuantizeLinear makes of x: 256 levels from its least to its largest value, 0 among them."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = ((high - low) / 255).clamp_min(torch.finfo(x.dtype).tiny)
    zero = torch.round(-low / step)
    return (torch.clamp(torch.round(x / step) + zero, 0, 255) - zero) * step


class Side(ABC):
    """One artifact in one runtime. artifact: its tensors. bound: NMSE up to which its exact path may be off. rounding:
    what its shipped kernels do to the input of a layer, at most. is_half: it computes in float16 or bfloat16.
    """

    runtime: str
    artifact: Foreign
    bound: float = EXACT
    rounding: Change = staticmethod(round_to_int8)
    is_half = False

    @property
    def habits(self) -> TextHabits:
        return all_runtimes()[self.runtime].habits

    @property
    @abstractmethod
    def context(self) -> int | None:
        """Tokens after which it says that it ends; None where it does not say."""

    @abstractmethod
    def differences(self, config: Mapping[str, Any], frequencies: NDArray[np.floating[Any]]) -> list[Difference]:
        """Settings that are not the model's. frequencies: by which the model rotates."""

    @abstractmethod
    def exact(self, workdir: Path) -> contextlib.AbstractContextManager[Artifact]:
        """The same numbers for kernels that do not round."""

    def cannot_run(self) -> str:
        """Why no runtime can generate with it, "" where nothing is known that says so."""
        return ""

    def mended(self, _workdir: Path) -> str:
        """What is wrong with the names that runtimes ask for; a copy that has them stands for it from then on."""
        return ""

    @property
    def says_ends(self) -> bool:
        """Whether it says where a generation ends; whoever runs it knows otherwise."""
        return True

    def no_tokenizer(self) -> str:
        """Why there is no tokenizer to ask, "" where there is one."""
        return ""

    @abstractmethod
    def text_answers(self, runs: Runs, probes: ProbeSet) -> dict[str, Any]:
        """The answers to texts and conversations. Raises RuntimeUnavailableError, InputError."""

    @contextlib.contextmanager
    def ranges(self, _workdir: Path) -> Iterator[Artifact | None]:
        """The same, rounding activations to the ranges that it gives them; None where it gives none."""
        yield None

    def steps_of_no_size(self) -> list[str]:
        """Activations that it rounds in steps of no size, so that nothing comes out."""
        return []

    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What its tokenizer decides by, in the names of runtimes.facts."""

    @abstractmethod
    def ends(self, workdir: Path) -> list[int]:
        """Where a generation stops. Raises RuntimeUnavailableError."""

    @abstractmethod
    def sampling(self, generation: Mapping[str, Any]) -> list[str]:
        """Sampling defaults that are not the model's generation config."""


class GgufSide(Side):
    """A GGUF file in llama.cpp."""

    runtime = "llama.cpp"

    def __init__(self, path: Path, config: Mapping[str, Any], source: set[str]) -> None:
        self.artifact = open_gguf(path, config, source)

    @property
    def context(self) -> int | None:
        metadata = self.artifact.metadata
        found = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        return found if isinstance(found, int) and found > 0 else None

    def differences(self, config: Mapping[str, Any], frequencies: NDArray[np.floating[Any]]) -> list[Difference]:
        short, long = rotary_divisors(self.artifact.path)
        found = gguf_differences(self.artifact.metadata, config, short, frequencies)
        wanted = (config.get("rope_parameters") or {}).get("long_factor")
        same = wanted is None or (long is not None and np.allclose(long, wanted, rtol=1e-6, atol=0))
        return found if same else [*found, Difference(ROPE_LONG, wanted, None if long is None else long.tolist())]

    @contextlib.contextmanager
    def exact(self, workdir: Path) -> Iterator[Artifact]:
        twin = workdir / "twin-f32.gguf"
        write_twin(self.artifact.path, twin)
        yield Artifact(twin)
        twin.unlink()

    def text_answers(self, runs: Runs, probes: ProbeSet) -> dict[str, Any]:
        return runs.text_answers(self.runtime, Artifact(self.artifact.path))

    def facts(self) -> Mapping[str, Any]:
        return facts_of(self.artifact.path, self.artifact.metadata)

    def ends(self, workdir: Path) -> list[int]:
        return llama_cpp_ends(self.artifact.path, workdir)

    def sampling(self, generation: Mapping[str, Any]) -> list[str]:
        return gguf_sampling_differences(self.artifact.metadata, generation)


class OnnxSide(Side):
    """An ONNX folder in one of its runtimes: ONNX Runtime GenAI where it has that one's config, else ONNX Runtime."""

    def __init__(self, path: Path, config: Mapping[str, Any], source: set[str], runtime: str | None = None) -> None:
        """runtime: another than that. Raises InputError for GenAI on a folder without its config."""
        self._graph = Graph(path)
        self.artifact = open_onnx(self._graph, config, source)
        there = (path / GENAI_CONFIG).exists()
        self.runtime = runtime or (GENAI if there else "onnxruntime")
        if self.runtime == GENAI and not there:
            raise InputError(
                f"{GENAI} is requested but the folder has no {GENAI_CONFIG}",
                where=path,
                fix="leave --runtime out, or name onnxruntime",
            )
        self.genai = read_json(inside(path, GENAI_CONFIG)) if there else None
        self.is_half = self._graph.is_half
        if self.is_half:
            self.bound = HALF_TABLES
        if self._graph.rounds_whole_inputs:
            self.rounding = round_whole_to_uint8

    @property
    def context(self) -> int | None:
        model = self.genai.get("model") if isinstance(self.genai, dict) else None
        found = model.get("context_length") if isinstance(model, dict) else None
        return found if isinstance(found, int) and found > 0 else None

    def differences(self, config: Mapping[str, Any], frequencies: NDArray[np.floating[Any]]) -> list[Difference]:
        return graph_differences(self._graph, config, frequencies)

    @contextlib.contextmanager
    def exact(self, workdir: Path) -> Iterator[Artifact]:
        yield Artifact(float_variant(self._graph, workdir / f"exact-{self.runtime}"))

    @contextlib.contextmanager
    def ranges(self, workdir: Path) -> Iterator[Artifact | None]:
        target = workdir / f"ranges-{self.runtime}"
        yield Artifact(float_variant(self._graph, target, ranges=True)) if self._graph.rounds_to_ranges else None

    def steps_of_no_size(self) -> list[str]:
        return self._graph.steps_of_no_size()

    def cannot_run(self) -> str:
        return "" if has_cache(self._graph.model, self.genai) else NO_CACHE

    def mended(self, workdir: Path) -> str:
        name = output_in_place_of_logits(self._graph.model, self.genai)
        if name is None:
            return ""
        copy = with_logits(self.artifact.path, name, workdir / f"named-{self.runtime}")
        self._graph = Graph(copy)
        self.artifact = replace(self.artifact, path=copy)
        return f"the output that holds the logits is named {name!r}, runtimes ask for 'logits'"

    @property
    def says_ends(self) -> bool:
        return any((self.artifact.path / name).exists() for name in (GENAI_CONFIG, GENERATION, *TOKENIZERS))

    def no_tokenizer(self) -> str:
        if any((self.artifact.path / name).exists() for name in TOKENIZERS):
            return ""
        return (
            f"the folder has no tokenizer ({', '.join(TOKENIZERS)}), whoever runs it brings one; copy the model's "
            "tokenizer files beside the graph to have them looked at"
        )

    def text_answers(self, runs: Runs, probes: ProbeSet) -> dict[str, Any]:
        if self.runtime != GENAI:
            return folder_answers(self.artifact.path, probes)
        return runs.text_answers(self.runtime, Artifact(self.artifact.path))

    def facts(self) -> Mapping[str, Any]:
        try:
            return expected_text_facts(self.artifact.path)
        except InputError:
            return {}  # every fact is absent

    def ends(self, workdir: Path) -> list[int]:
        model = self.genai.get("model") if isinstance(self.genai, dict) else None
        if not isinstance(model, dict):
            return expected_generation_ends(self.artifact.path, {})
        ends = model.get("eos_token_id")
        return [ends] if isinstance(ends, int) else [end for end in ends or [] if isinstance(end, int)]

    def sampling(self, generation: Mapping[str, Any]) -> list[str]:
        return [] if self.genai is None else genai_sampling_differences(self.genai, generation)
