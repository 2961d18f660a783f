"""llama.cpp on a GGUF file: contents and facts of the file, its F32 twin, an export like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.differences import ABSENT
from qalora_export.checkpoint.generation import Generation
from qalora_export.formats.account import Account
from qalora_export.formats.gguf.account import account_gguf
from qalora_export.formats.gguf.file import GgufFile, StoredTensor
from qalora_export.formats.gguf.metadata import SAMPLERS
from qalora_export.formats.gguf.read import GgufContents, read_back, runtime_dequantized
from qalora_export.formats.gguf.split import adapter_path
from qalora_export.formats.gguf.tokenizer.byte_level import TEXT_DIFFERENCES
from qalora_export.formats.gguf.tokenizer.sentencepiece import NEVER_JOINED
from qalora_export.formats.gguf.tokenizer.token_types import ENDS, FILL_IN, SHOWN, effective_ends
from qalora_export.formats.gguf.tokenizer.unigram import UNUSED_SCORE
from qalora_export.models.families import FAMILIES
from qalora_export.safety import HashFile
from qalora_export.verify.kernels import ggml
from qalora_export.verify.kernels.products import TappedGraph
from qalora_export.verify.runtimes.facts import (
    expected_graph_facts,
    expected_text_facts,
    long_rope_facts,
    theta_frequencies,
    windows,
)
from qalora_export.verify.runtimes.record import Artifact, Facts, Matrices, RuntimeRecord, TextHabits, register
from qalora_export.verify.runtimes.twin import write_twin

# Samplers of llama.cpp that Transformers lacks or that are never asked for, with the values that switch them off.
UNUSED_SAMPLERS: Mapping[str, Any] = MappingProxyType(
    {
        **dict.fromkeys(("presence_penalty", "frequency_penalty", "xtc_probability", "dry_multiplier"), 0.0),
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
        "mirostat": 0,
        "dynatemp_range": 0.0,
    }
)
FREQUENCY_DIVISORS = "rope_freqs.weight"
# Looked at where the first is absent: the second by contexts beyond rope.scaling.original_context_length.
SHORT_DIVISORS, LONG_DIVISORS = "rope_factors_short.weight", "rope_factors_long.weight"
MOST_LAYERS, MOST_ROTATED = 2**16, 2**16
Stored = Callable[[], Mapping[str, StoredTensor]]  # the tensors of a file, opened when they are asked for
LOCAL_BASE = 10000.0  # rope_freq_base_train_swa of llama.cpp where the file does not say


@register
class LlamaCpp(RuntimeRecord):
    name = "llama.cpp"
    format = "gguf"
    dequantizer = "gguf.quants.dequantize, llama.cpp's own"
    habits = TextHabits(cuts_bos=True, reads_gguf=True)
    taps_of = "llama.cpp"
    half_cache = True
    rounding_activations = MappingProxyType({"gelu_pytorch_tanh": "GEGLU"})  # a table of float16: qalora_runtimes

    def read_back(self, artifact: Path) -> GgufContents:
        """By our reader, which shares no code with the writer, gguf.GGUFWriter."""
        return read_back(artifact, adapter_of(artifact))

    def dequantized(self, artifact: Path, workdir: Path) -> Matrices:
        return runtime_dequantized(artifact, adapter_of(artifact))

    def expected(self, checkpoint: CanonicalCheckpoint, frequencies: NDArray[Any]) -> Facts:
        config = checkpoint.config
        graph = expected_graph_facts(config, frequencies, "gguf") | long_rope_facts(config)
        return graph | expected_text_facts(checkpoint.path)

    def found(self, artifact: Path, contents: Any) -> Facts:
        return facts_of(artifact, contents.metadata)

    def account(self, checkpoint: CanonicalCheckpoint, artifact: Path, contents: Any, hash_of: HashFile) -> Account:
        return account_gguf(checkpoint, artifact, adapter_of(artifact), hash_of=hash_of)

    def shipped(self, artifact: Path) -> Artifact:
        return Artifact(artifact, adapter_of(artifact))

    def tapped_graph(self, shipped: Artifact, checkpoint: CanonicalCheckpoint, workdir: Path) -> TappedGraph:
        return ggml.tapped_graph(shipped.path, shipped.lora, checkpoint)

    def exact(self, artifact: Path, workdir: Path) -> Artifact:
        twin = workdir / "twin-f32.gguf"
        write_twin(artifact, twin)
        return Artifact(twin, adapter_of(artifact))

    def expected_defaults(self, generation: Generation, config: Mapping[str, Any]) -> dict[str, Any]:
        drawn: dict[str, Any] = {"temperature": 0.0}
        if generation.do_sample:
            names = ("temperature", "top_k", "top_p", "min_p")
            drawn = {name: getattr(generation, name) for name in names} | {"samplers": SAMPLERS.split(";")}
        return {**UNUSED_SAMPLERS} | drawn | {"repeat_penalty": generation.repetition_penalty}

    def ends_by_design(self, texts: Sequence[str | None]) -> dict[int, str]:
        known = effective_ends([text for text in texts if text is not None])
        return {i: f"llama.cpp ends at {text!r} by its text" for i, text in enumerate(texts) if text in known}

    def texts_by_design(self, texts: Sequence[str | None]) -> dict[int, str]:
        marked = ENDS | FILL_IN | SHOWN
        return {i: f"llama.cpp goes by the text of {text!r}" for i, text in enumerate(texts) if text in marked}

    def text_differences_accepted(self, artifact: Path) -> bool:
        return TEXT_DIFFERENCES in GgufFile(artifact).fields


def adapter_of(artifact: Path) -> Path | None:
    """The offset adapter that belongs to a file of layout "split", when it is there.

    A file of another layout has none: an adapter that lies beside it by chance must not be applied.
    """
    path = adapter_path(artifact)
    return path if path.is_file() and read_back(artifact).metadata.get("qalora.layout") == "split" else None


def facts_of(artifact: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Facts by GGUF metadata (docs/gguf.md of ggml), in the names of runtimes.facts."""
    arch = metadata.get("general.architecture")
    stored = cache(lambda: GgufFile(artifact).tensors)  # of a file without rotary keys nothing is read

    def of(key: str) -> Any:
        return metadata.get(f"{arch}.{key}", ABSENT)

    def token(key: str) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}")

    before = [token("bos_token_id")] if token("add_bos_token") else []
    after = [token("eos_token_id")] if token("add_eos_token") else []
    return {
        "vocabulary": of("vocab_size"),
        "hidden size": of("embedding_length"),
        "layers": of("block_count"),
        "attention heads": of("attention.head_count"),
        "context length": of("context_length"),
        "key/value heads": of("attention.head_count_kv"),
        "head size": of("attention.key_length"),
        "norm epsilon": of("attention.layer_norm_rms_epsilon"),
        "RoPE frequencies": _frequencies(stored, of, FREQUENCY_DIVISORS, SHORT_DIVISORS),
        "RoPE magnitude": 1.0 if (factor := of("rope.scaling.attn_factor")) == ABSENT else factor,
        "RoPE frequencies in larger contexts": _frequencies(stored, of, FREQUENCY_DIVISORS, LONG_DIVISORS),
        "larger contexts begin after": of("rope.scaling.original_context_length"),
        "attention windows": _windows(arch, of),
        "RoPE frequencies in windows": _local_frequencies(stored, arch, of),
        "tokens": token("tokens"),
        **_token_order(metadata),
        "BOS id": token("bos_token_id"),
        "EOS id": token("eos_token_id"),
        "ids around an empty text": before + after,
        "chat template": metadata.get("tokenizer.chat_template"),
    }


def _token_order(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp decides between tokens by, in the form of facts.token_order; nothing makes the tokens below."""
    kind, tokens, scores = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens", "scores"))
    if kind == "gpt2":
        return {"merges": metadata.get("tokenizer.ggml.merges", ABSENT)}
    if not isinstance(tokens, list) or not isinstance(scores, list) or len(scores) != len(tokens):
        return {}
    if not all(isinstance(score, Real) for score in scores):
        return {}
    if kind == "t5":
        count = max((index + 1 for index, score in enumerate(scores) if score != UNUSED_SCORE), default=0)
        return {"scores": [float(np.float32(score)) for score in scores[:count]]}
    made = [(-score, text) for text, score in zip(tokens, scores, strict=True) if score > NEVER_JOINED]
    return {"tokens by rank": [text for _, text in sorted(made)]}


def _local_frequencies(stored: Stored, arch: Any, of: Any) -> NDArray[np.float64] | str:
    """In layers with a window: by a base of their own, never scaled, in families that have one; else as elsewhere."""
    base, size = of("rope.freq_base_swa"), of("rope.dimension_count")
    if base == ABSENT and not any(f.local_theta for f in FAMILIES if f.gguf_arch == arch):
        return _frequencies(stored, of, FREQUENCY_DIVISORS, SHORT_DIVISORS)
    base = LOCAL_BASE if base == ABSENT else base
    if not isinstance(base, float) or not isinstance(size, int) or base <= 0 or not 0 < size < MOST_ROTATED:
        return ABSENT
    return theta_frequencies(base, size)


def _windows(arch: Any, of: Any) -> list[int] | str:
    """What llama.cpp's code does for this architecture; families that it gives no windows have none in any file."""
    family = next((family for family in FAMILIES if family.gguf_arch == arch), None)
    layers, window = of("block_count"), of("attention.sliding_window")
    if family is None or not isinstance(layers, int) or not 0 < layers < MOST_LAYERS:
        return ABSENT
    if (pattern := of("attention.sliding_window_pattern")) != ABSENT:
        return f"by a pattern of the file's own: {pattern}"
    if not family.gguf_windows:
        return []
    return windows(family, {"num_hidden_layers": layers, "sliding_window": window if isinstance(window, int) else 0})


def rotation(base: float, size: int, kind: Any, factor: Any) -> NDArray[np.float64]:
    """Radians per position, (size / 2,), that llama.cpp divides by a file's divisors: base^(-2i/size) over the factor.

    kind, factor: rope.scaling.type and .factor, ABSENT where they are not there. To llama.cpp a scaling without a type
    is linear, and one without a factor, or by 0, is none.
    """
    linear = kind in ("linear", ABSENT) and isinstance(factor, Real) and factor
    return theta_frequencies(base, size) / (float(factor) if linear else 1.0)


def _frequencies(stored: Stored, of: Any, *divisors: str) -> NDArray[np.float64] | str:
    """What llama.cpp rotates by: its rotation over the first of the tensors that is there."""
    base, size = of("rope.freq_base"), of("rope.dimension_count")
    if not isinstance(base, float) or not isinstance(size, int) or not base > 0 or not 0 < size < MOST_ROTATED:
        return ABSENT
    frequencies = rotation(base, size, of("rope.scaling.type"), of("rope.scaling.factor"))
    found = next((np.asarray(stored()[name].values, np.float64) for name in divisors if name in stored()), None)
    if found is not None and found.shape != frequencies.shape:
        return f"{found.shape} divisors"
    return frequencies if found is None else frequencies / found
