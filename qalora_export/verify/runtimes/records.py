"""One record per runtime: which artifact it runs, how that artifact is read back, what its exact path is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import InputError
from qalora_export.models.families.family import head_dim
from qalora_export.recipe import GgufSettings, OnnxSettings
from qalora_export.verify.gates.artifact import Contents
from qalora_export.verify.gates.text import TextHabits
from qalora_export.verify.runtimes import gguf_side, onnx_side
from qalora_export.verify.runtimes.facts import expected_graph_facts, expected_text_facts
from qalora_export.verify.runtimes.runs import Artifact
from qalora_export.verify.runtimes.twin import write_twin

Facts = dict[str, Any]
Expected = Callable[[CanonicalCheckpoint, NDArray[Any]], Facts]


@dataclass(frozen=True)
class RuntimeAdapter:
    """Everything runtime-specific about verifying.

    read_back, dequantized (artifact, working folder), dequantizer: gates G0 and G1. expected, found: facts of
    checkpoint and artifact.
    shipped, exact: what to run for G3 and G2 (exact writes into a folder). export_like: exports another checkpoint
    with the settings of an artifact, for the noise floor. own_tokenizer: the runtime itself answers G5.
    int8_block: activations that share one int8 step in the shipped kernels (llama.cpp: Q8_1 and Q8_0 blocks of 32;
    MatMulNBits: the group of the weights, None).
    """

    runtime: str
    format: Literal["gguf", "onnx"]
    read_back: Callable[[Path], Contents]
    dequantized: Callable[[Path, Path], Iterator[tuple[str, NDArray[np.float32]]]]
    dequantizer: str
    expected: Expected
    found: Callable[[Path, Any], Facts]
    shipped: Callable[[Path], Artifact]
    exact: Callable[[Path, Path], Artifact]
    export_like: Callable[[Path, Path, Path], Artifact]
    habits: TextHabits
    own_tokenizer: bool = True
    int8_block: int | None = 32


def _gguf_expected(checkpoint: CanonicalCheckpoint, frequencies: NDArray[Any]) -> Facts:
    return expected_graph_facts(checkpoint.config, frequencies) | expected_text_facts(checkpoint.path)


def _gguf_found(artifact: Path, contents: Any) -> Facts:
    return gguf_side.facts_of(artifact, contents.metadata)


def _gguf_dequantized(artifact: Path, _workdir: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    return gguf_side.dequantized(artifact)


def _gguf_shipped(artifact: Path) -> Artifact:
    return Artifact(artifact, gguf_side.adapter_of(artifact))


def _gguf_exact(artifact: Path, workdir: Path) -> Artifact:
    twin = workdir / "twin-f32.gguf"
    write_twin(artifact, twin)
    return Artifact(twin, gguf_side.adapter_of(artifact))


def _gguf_export_like(artifact: Path, checkpoint: Path, workdir: Path) -> Artifact:
    from qalora_export.formats.gguf.export import export_gguf

    layout = gguf_side.contents_of(artifact).metadata.get("qalora.layout", "q4_1")
    out = workdir / "base.gguf"
    export_gguf(checkpoint, out, GgufSettings(layout=layout))
    return Artifact(out, gguf_side.adapter_of(out))


def _onnx_expected(checkpoint: CanonicalCheckpoint, frequencies: NDArray[Any]) -> Facts:
    scale = np.float32(head_dim(checkpoint.config) ** -0.5)
    facts = expected_graph_facts(checkpoint.config, frequencies) | expected_text_facts(checkpoint.path)
    return facts | {"attention scale": scale}


def _onnx_found(artifact: Path, contents: Any) -> Facts:
    return onnx_side.graph_facts(contents) | _tokenizer_facts(artifact)


def _genai_expected(checkpoint: CanonicalCheckpoint, frequencies: NDArray[Any]) -> Facts:
    ends = onnx_side.expected_generation_ends(checkpoint.path, checkpoint.config)
    sizes = expected_graph_facts(checkpoint.config, frequencies)
    config = {f"genai {name}": sizes[name] for name in onnx_side.GENAI_SIZES}
    facts = _onnx_expected(checkpoint, frequencies)
    return facts | config | {"genai BOS id": facts["BOS id"], "genai ends at": ends}


def _genai_found(artifact: Path, contents: Any) -> Facts:
    return _onnx_found(artifact, contents) | onnx_side.genai_facts(artifact)


def _tokenizer_facts(folder: Path) -> Facts:
    """Text facts of the tokenizer files in an ONNX folder; files that do not load leave every fact absent."""
    try:
        return expected_text_facts(folder)
    except InputError:
        return {}


def _onnx_exact(artifact: Path, workdir: Path) -> Artifact:
    from qalora_export.formats.onnx.exact import exact_variant

    return Artifact(exact_variant(artifact, workdir / "exact"))


def _onnx_export_like(artifact: Path, checkpoint: Path, workdir: Path) -> Artifact:
    from qalora_export.formats.onnx.export import export_onnx

    level = onnx_side.contents_of(artifact).accuracy_level
    out = workdir / "base-onnx"
    export_onnx(checkpoint, out, OnnxSettings(accuracy_level=1 if level == 1 else 4))
    return Artifact(out)


def _onnx_dequantized(artifact: Path, workdir: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    from qalora_export.verify.runtimes.onnx_dequantize import runtime_dequantized

    return runtime_dequantized(artifact, workdir)


def _onnx_adapter(
    runtime: str, expected: Expected, found: Callable[[Path, Any], Facts], habits: TextHabits, *, own_tokenizer: bool
) -> RuntimeAdapter:
    return RuntimeAdapter(
        runtime=runtime,
        format="onnx",
        read_back=onnx_side.contents_of,
        dequantized=_onnx_dequantized,
        dequantizer="ONNX Runtime on the file's own nodes and an identity",
        expected=expected,
        found=found,
        shipped=Artifact,
        exact=_onnx_exact,
        export_like=_onnx_export_like,
        habits=habits,
        own_tokenizer=own_tokenizer,
        int8_block=None,
    )


ADAPTERS: Mapping[str, RuntimeAdapter] = {
    "llama.cpp": RuntimeAdapter(
        runtime="llama.cpp",
        format="gguf",
        read_back=gguf_side.contents_of,
        dequantized=_gguf_dequantized,
        dequantizer=gguf_side.DEQUANTIZER,
        expected=_gguf_expected,
        found=_gguf_found,
        shipped=_gguf_shipped,
        exact=_gguf_exact,
        export_like=_gguf_export_like,
        habits=TextHabits(cuts_bos=True),
    ),
    "onnxruntime": _onnx_adapter("onnxruntime", _onnx_expected, _onnx_found, TextHabits(), own_tokenizer=False),
    "onnxruntime-genai": _onnx_adapter(
        "onnxruntime-genai", _genai_expected, _genai_found, TextHabits(adds_specials=False), own_tokenizer=True
    ),
}
