"""What the exporters and the verifier must know about an architecture, as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qalora_export.errors import InputError
from qalora_export.models.families.rope import rope_of

Config = Mapping[str, Any]
# What both exporters take where config.json lacks a key.
ASSUMED = {
    "num_key_value_heads": "num_attention_heads",
    "head_dim": "hidden_size / num_attention_heads",
    "rms_norm_eps": "1e-6",
    "rope_theta": "10000",
}
EMBEDDING_NODE = "embd"
Side = Literal["input", "output"]
Format = Literal["gguf", "onnx"]


@dataclass(frozen=True, slots=True)
class GgufField:
    """A metadata key of llama.cpp that the shared ones (formats/gguf/metadata.py) lack.

    key: below `<arch>.`; kind: GGUFWriter's add_* name; value: from config.json, None leaves the key out.
    """

    key: str
    kind: str
    value: Callable[[Config], Any]


@dataclass(frozen=True, slots=True)
class Bound:
    """How many positions of the model's `context` an export has, because beyond them a runtime computes another
    function than Transformers; why.
    """

    positions: int
    why: str
    context: int

    def __str__(self) -> str:
        return f"the context is {self.positions} positions, not the model's {self.context}: {self.why}"


@dataclass(frozen=True, slots=True)
class LayerPoint:
    """Where the bisect looks inside a decoder layer.

    module, side: the end of a Transformers module, below the layer. name: of the point, below the layer (empty: the
    layer's own output). what: what a divergence that starts here means. node: llama.cpp's name in its graph builder.
    heads_first: Transformers holds it as (1, heads, positions, head size), not (1, positions, …).
    """

    module: str
    side: Side
    name: str
    what: str
    node: str
    heads_first: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture in three vocabularies: Transformers, GGUF, ONNX.

    architectures: names in config.json's `architectures`.
    wrappers: names of multimodal models whose language model is one of this family (models/multimodal.py).
    gguf_arch: `general.architecture` (the string, also the prefix of metadata keys).
    rope_permuted: module leaf -> config key of its head count. llama.cpp rotates neighbouring pairs of rows where
        Transformers rotates halves, so the rows of these modules change places in GGUF. Empty where llama.cpp rotates
        halves too.
    rope_types: the rotary scalings that both exporters carry exactly.
    only: config key -> the values we handle (the first is the default when the key is absent).
    stated: keys that config.json must have, because what Transformers takes where they are absent is not what both
        exporters take (`ASSUMED`); tests/models/families/test_families.py finds them.
    linears, norms: modules of one decoder layer, below `model.layers.<n>.`.
    points: observation points of the bisect in the order of the data flow; embedding_node: llama.cpp's name of what
        enters the first layer.
    gguf_fields: metadata beside the shared keys.
    norm_shift: added to every norm weight in GGUF, in float32 as the model itself does it: Gemma's norms multiply by
        1 + w and llama.cpp's by w.
    tied: whether lm_head is the embedding when config.json does not say.
    check: raises InputError for variants that `only` cannot express.
    attention_scale: factor of q·k before the softmax.
    windowed: layers whose attention looks back `sliding_window` positions only, one bool each; empty: none does.
    gguf_windows: whether llama.cpp's graph has those windows. Where it has not, a GGUF file's context ends with the
        window: up to there, the model sees everything anyway.
    partial_rotary: whether `partial_rotary_factor` may leave features of a head unrotated.
    local_theta: RoPE base of the layers with a window where it is not that of the others.
    embedding_scale: factor of the embedding, None where there is none.
    rotates_pairs: Transformers' model itself rotates neighbouring pairs, not halves.
    fused_qkv: q, k and v are rows of one matrix, `self_attn.qkv_proj`, in that order.
    genai_type: `model.type` in genai_config.json where ONNX Runtime GenAI does not know Transformers' name.
    onnx_refused: why this family has no ONNX export; empty where it has.
    """

    name: str
    architectures: tuple[str, ...]
    gguf_arch: str
    rope_permuted: Mapping[str, str]
    rope_types: tuple[str, ...]
    only: Mapping[str, tuple[Any, ...]]
    linears: tuple[str, ...]
    norms: tuple[str, ...]
    points: tuple[LayerPoint, ...]
    stated: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()
    embedding_node: str = EMBEDDING_NODE
    gguf_fields: tuple[GgufField, ...] = ()
    norm_shift: float = 0.0
    tied: bool = False
    check: Callable[[Config], None] | None = None
    attention_scale: Callable[[Config], float] = lambda config: head_dim(config) ** -0.5
    windowed: Callable[[Config], tuple[bool, ...]] = lambda _: ()
    gguf_windows: bool = True
    partial_rotary: bool = False
    local_theta: Callable[[Config], float] | None = None
    embedding_scale: Callable[[Config], float] | None = None
    rotates_pairs: bool = False
    fused_qkv: bool = False
    genai_type: str = ""
    onnx_refused: str = ""

    def required_modules(self, config: Config) -> list[str]:
        """Dotted names of every module that must have a weight, in the order of the forward pass."""
        names = ["model.embed_tokens"]
        for layer in range(config["num_hidden_layers"]):
            names += [f"model.layers.{layer}.{leaf}" for leaf in (*self.linears, *self.norms)]
        names.append("model.norm")
        return names if self.ties_head(config) else [*names, "lm_head"]

    def ties_head(self, config: Config) -> bool:
        """Whether lm_head is the embedding matrix."""
        tied = config.get("tie_word_embeddings")
        return self.tied if tied is None else bool(tied)

    def permuted_heads(self, module: str, config: Config) -> int | None:
        """Head count by which the rows of `module` (a dotted module name) are permuted in GGUF, or None."""
        key = self.rope_permuted.get(module.rpartition(".")[2])
        if key is None:
            return None
        return int(config.get(key) or config["num_attention_heads"])

    def bound(self, config: Config, fmt: Format) -> Bound | None:
        """Where the context of an export ends before the model's own; None where it does not."""
        context, found, rope = int(config["max_position_embeddings"]), list[Bound](), rope_of(config, self.rope_types)
        if rope.kind == "longrope" and rope.original_context < context:
            found.append(
                Bound(
                    rope.original_context,
                    "for longer texts the model has other RoPE factors (longrope); Transformers takes them by the "
                    "length of a text, llama.cpp by the size of its context, and a KV cache cannot change them",
                    context,
                )
            )
        if fmt == "gguf" and not self.gguf_windows and any(self.windowed(config)):
            found.append(
                Bound(
                    int(config["sliding_window"]),
                    f"the model attends within a sliding window, which llama.cpp's {self.gguf_arch} does not have",
                    context,
                )
            )
        return min(found, key=lambda bound: bound.positions, default=None)

    def exported(self, config: Config, fmt: Format) -> dict[str, Any]:
        """config.json of the function that an export holds: the model's, on the context that its bound leaves."""
        bound, found = self.bound(config, fmt), dict(config)
        if bound is not None:
            found["max_position_embeddings"] = bound.positions
            if not any(self.windowed(found)) and "sliding_window" in found:
                found["sliding_window"] = None
            rope = rope_of(config, self.rope_types)
            if rope.kind == "longrope":  # which follows from the model's own context unless it is stated
                key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
                found[key] = dict(config[key]) | {"attention_factor": rope.magnitude}
        return found

    def check_variant(self, config: Config) -> None:
        """Raise InputError for a variant of the architecture that we would export wrongly."""
        for key, allowed in self.only.items():
            value = config.get(key, allowed[0])
            if value not in allowed:
                raise InputError(
                    f"{self.name} with {key} = {value!r} is not supported",
                    where=f"config.json: {key}",
                    why=f"both exporters handle {', '.join(map(repr, allowed))} only",
                    fix="use a model of the standard architecture",
                )
        rope = config.get("rope_parameters") or config.get("rope_scaling")
        theta = isinstance(rope, Mapping) and ("rope_theta" in rope or "full_attention" in rope)
        for key in self.stated:
            if key not in config and not (key == "rope_theta" and theta):
                raise InputError(
                    f"config.json does not say {key}",
                    where=f"config.json: {key}",
                    why=f"Transformers has a default of its own for {self.name}, exporters take {ASSUMED[key]}",
                    fix="state what Transformers' configuration class of the model has",
                )
        if self.check is not None:
            self.check(config)


def head_dim(config: Config) -> int:
    """Features of one attention head: `head_dim`, or hidden size over heads as in Transformers."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def activation(config: Config) -> str:
    """Transformers' name of the MLP's activation function; Gemma has a key of its own for it."""
    return str(config.get("hidden_activation") or config.get("hidden_act") or "silu")


def from_config(key: str) -> Callable[[Config], Any]:
    """The value of a config key, None when it is absent."""
    return lambda config: config.get(key)
