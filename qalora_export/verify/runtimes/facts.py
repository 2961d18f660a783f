"""What an artifact says beside its tensors, in the checkpoint's own vocabulary, and what it should say.

A fact is a name and a value that every reader can compare: a size, an epsilon, a list of tokens. The expected facts
come from config.json and Hugging Face's tokenizer; an artifact's facts come from the written file. A fact that is
expected and absent is a differing fact.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.differences import ABSENT, explain
from qalora_export.models.families import Family, family_of, rope_of
from qalora_export.models.families.family import Format, head_dim
from qalora_export.models.loading import load_tokenizer
from qalora_export.safety import inside, read_json

# Frequencies are recomputed from a base or read out of a float32 table; a wrong base of 1 part in 10,000 shows.
FREQUENCY_TOLERANCE = 1e-5
NOT_CARRIED = object()  # found: this kind of artifact has no place for it, and nothing that reads it
# Fact -> key of config.json.
SIZES = {
    "vocabulary": "vocab_size",
    "hidden size": "hidden_size",
    "layers": "num_hidden_layers",
    "attention heads": "num_attention_heads",
    "context length": "max_position_embeddings",
}


def expected_graph_facts(config: Mapping[str, Any], frequencies: NDArray[Any], fmt: Format) -> dict[str, Any]:
    """Sizes, heads and normalization by config.json, as an export has them; frequencies: the reference's own RoPE,
    (rotated features / 2,).
    """
    config = family_of(config).exported(config, fmt)
    facts = {fact: config[key] for fact, key in SIZES.items()}
    return facts | {
        "key/value heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head size": head_dim(config),
        "norm epsilon": np.float32(config.get("rms_norm_eps", 1e-6)),
        "RoPE frequencies": frequencies,
        "RoPE magnitude": np.float32(rope_of(config).magnitude),
        **_window_facts(config, frequencies),
    }


def _window_facts(config: Mapping[str, Any], frequencies: NDArray[Any]) -> dict[str, Any]:
    family = family_of(config)
    facts: dict[str, Any] = {"attention windows": windows(family, config)}
    if facts["attention windows"]:
        own = None if family.local_theta is None else theta_frequencies(family.local_theta(config), head_dim(config))
        facts["RoPE frequencies in windows"] = frequencies if own is None else own
    return facts


def theta_frequencies(theta: float, size: int) -> NDArray[np.float64]:
    """Radians per position, (size / 2,): theta^(−2i/size)."""
    frequencies: NDArray[np.float64] = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    return frequencies


def long_rope_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF file holds beside the exported context: RoPE in larger contexts, and where those begin."""
    rope = rope_of(config)
    if rope.kind != "longrope":
        return {}
    size = rope.rotated(head_dim(config))
    beyond = theta_frequencies(rope.theta, size) / np.asarray(rope.long)
    return {"RoPE frequencies in larger contexts": beyond, "larger contexts begin after": rope.original_context}


def windows(family: Family, config: Mapping[str, Any]) -> list[int]:
    """Positions that each layer looks back, its own included, 0 where it sees everything; empty when all do.

    Prompts of a probe set are often shorter than a window, so logits do not show a lost one.
    """
    return [int(config["sliding_window"]) if windowed else 0 for windowed in family.windowed(config)]


def expected_text_facts(checkpoint: Path) -> dict[str, Any]:
    """Tokens by id, their order, special ids, what is put around a text, chat template, by Transformers."""
    tokenizer = load_tokenizer(checkpoint)
    raw = read_json(inside(checkpoint, "tokenizer.json"))
    return {
        "tokens": tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))),
        **token_order(raw),
        "BOS id": tokenizer.bos_token_id,
        "EOS id": tokenizer.eos_token_id,
        "ids around an empty text": [int(i) for i in tokenizer("")["input_ids"]],
        "chat template": tokenizer.chat_template,
    }


def token_order(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What decides between tokens in a parsed tokenizer.json, in the form that its kind has in every format.

    Byte-level BPE: merges as "left right", by rank. BPE with byte fallback: the tokens that merges make, by the rank of
    their first rule. Unigram: each token's score, as float32.
    """
    model = raw["model"]
    if model["type"] == "Unigram":
        return {"scores": [float(np.float32(score)) for _, score in model["vocab"]]}
    rules = [rule.split(" ") if isinstance(rule, str) else rule for rule in model["merges"]]
    if model.get("byte_fallback"):
        return {"tokens by rank": list(dict.fromkeys("".join(rule) for rule in rules))}
    return {"merges": [" ".join(rule) for rule in rules]}


def differing_facts(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line per fact that is absent or has another value; lists name the first place that differs."""
    return [
        f"{name}: {explain(value, found.get(name, ABSENT))}"
        for name, value in expected.items()
        if not _same(name, value, found.get(name, ABSENT))
    ]


def _same(name: str, expected: Any, found: Any) -> bool:
    if found is NOT_CARRIED:
        return True
    if isinstance(expected, np.ndarray):
        return (
            isinstance(found, np.ndarray)
            and found.shape == expected.shape
            and np.allclose(found, expected, rtol=FREQUENCY_TOLERANCE, atol=0)
        )
    if isinstance(expected, np.floating):
        return isinstance(found, int | float | np.floating) and np.float32(found) == expected
    if name == "tokens":
        return isinstance(found, list) and _first_wrong(expected, found) is None
    return bool(type(expected) is type(found) and expected == found)


def _first_wrong(expected: list[Any], found: list[Any]) -> int | None:
    """Index of the first token that differs. Ids without a token, and rows beyond the last, may hold any filler."""
    for index, token in enumerate(expected):
        if token is not None and (index >= len(found) or found[index] != token):
            return index
    return None
