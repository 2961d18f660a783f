"""What the exporters must know about an architecture, as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora_export.errors import InputError


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture in three vocabularies: Transformers, GGUF, ONNX.

    architectures: names in config.json's `architectures`.
    gguf_arch: `general.architecture` (the string, also the prefix of metadata keys).
    rope_permuted: module leaf -> config key of its head count. llama.cpp rotates neighbouring pairs of rows where
        Transformers rotates halves, so the rows of these modules change places in GGUF.
    rope_types: the rotary scalings that both exporters carry exactly.
    linears, norms: modules of one decoder layer, below `model.layers.<n>.`.
    only: config key -> the values we handle (the first is the default when the key is absent).
    """

    name: str
    architectures: tuple[str, ...]
    gguf_arch: str
    rope_permuted: Mapping[str, str]
    rope_types: tuple[str, ...]
    only: Mapping[str, tuple[Any, ...]]
    linears: tuple[str, ...]
    norms: tuple[str, ...]

    def required_modules(self, config: Mapping[str, Any]) -> list[str]:
        """Dotted names of every module that must have a weight, in the order of the forward pass."""
        names = ["model.embed_tokens"]
        for layer in range(config["num_hidden_layers"]):
            names += [f"model.layers.{layer}.{leaf}" for leaf in (*self.linears, *self.norms)]
        names.append("model.norm")
        return names if config.get("tie_word_embeddings") else [*names, "lm_head"]

    def permuted_heads(self, module: str, config: Mapping[str, Any]) -> int | None:
        """Head count by which the rows of `module` (a dotted module name) are permuted in GGUF, or None."""
        key = self.rope_permuted.get(module.rpartition(".")[2])
        if key is None:
            return None
        return int(config.get(key) or config["num_attention_heads"])

    def check(self, config: Mapping[str, Any]) -> None:
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


def head_dim(config: Mapping[str, Any]) -> int:
    """Features of one attention head: `head_dim`, or hidden size over heads as in Transformers."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
