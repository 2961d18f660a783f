"""Ways in which files of other tools have been wrong, and the part that must be named for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from qalora_export.formats.gguf.permute import hf_order, row_order
from tests.verify.foreign.files import GONE, Change, Values, rewritten


@dataclass(frozen=True)
class Damage:
    """part: what must be broken first. said: must stand in its sentence or findings."""

    part: str
    said: str
    change: Change = lambda _: None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    only_permuted: bool = False  # needs an architecture whose q and k are permuted


def _permuted(undo: bool) -> Change:
    def change(values: Values) -> None:
        for name, heads in (("blk.0.attn_q.weight", 4), ("blk.0.attn_k.weight", 2)):
            rows = values[name].shape[0]
            values[name] = values[name][hf_order(rows, heads) if undo else row_order(rows, heads)]

    return change


def _transposed(values: Values) -> None:
    values["blk.0.attn_q.weight"] = values["blk.0.attn_q.weight"].T.copy()


def _swapped(values: Values) -> None:
    one, other = "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"
    values[one], values[other] = values[other], values[one]


def _stale(values: Values) -> None:
    wrong = values["blk.1.ffn_gate.weight"]
    values["blk.1.ffn_gate.weight"] = np.random.default_rng(3).normal(0, wrong.std(), wrong.shape).astype(np.float32)


def _scaled(values: Values) -> None:
    values["blk.1.attn_output.weight"] = values["blk.1.attn_output.weight"] * np.float32(1.1)


def _norm(values: Values) -> None:
    values["blk.1.ffn_norm.weight"] = values["blk.1.ffn_norm.weight"] + 1


def _some_rows(values: Values) -> None:
    values["blk.0.ffn_down.weight"][40:44] = values["blk.0.ffn_down.weight"][40:44][::-1]


def _headless(values: Values) -> None:
    del values["output.weight"]


BY_NAME: Mapping[str, Damage] = {
    "q and k not permuted": Damage("weights", "not permuted", _permuted(undo=True), only_permuted=True),
    "q and k permuted twice": Damage("weights", "twice", _permuted(undo=False), only_permuted=True),
    "q transposed": Damage("weights", "transposed", _transposed),
    "two layers swapped": Damage("weights", "holds the numbers of model.layers.1.mlp.up_proj", _swapped),
    "stale tensor": Damage("weights", "of no tensor of this model", _stale),
    "one tensor × 1.1": Damage("weights", "multiplied by 1.1", _scaled),
    "norm + 1": Damage("weights", "has 1 added", _norm),
    "four rows in another order": Damage("weights", "damaged", _some_rows),
    "head lost": Damage("weights", "lm_head.weight is missing", _headless),
    "RoPE base": Damage("graph", "rope.freq_base is 10000", metadata={"llama.rope.freq_base": 10000.0}),
    "epsilon": Damage(
        "graph", "layer_norm_rms_epsilon is 0.001", metadata={"llama.attention.layer_norm_rms_epsilon": 1e-3}
    ),
    "EOS id": Damage("ends", "an ordinary token", metadata={"tokenizer.ggml.eos_token_id": 70}),
    "EOT id": Damage("ends", "an ordinary token", metadata={"tokenizer.ggml.eot_token_id": 70}),
    "BOS not put before a text": Damage(
        "tokenizer", "ids around an empty text", metadata={"tokenizer.ggml.add_bos_token": False}
    ),
    "merges cut": Damage("tokenizer", "merges", metadata={"tokenizer.ggml.merges": "half"}),
    "template changed": Damage("template", "instead of", metadata={"tokenizer.chat_template": "longer"}),
    "template lost": Damage("template", "the artifact has none", metadata={"tokenizer.chat_template": GONE}),
    "temperature 5": Damage("ends", "temperature is 5", metadata={"general.sampling.temp": 5.0}),
}


def damaged(source: Path, out: Path, kinds: Mapping[str, str] | str, damage: Damage) -> Path:
    """source with the damage, in the types `kinds`."""
    fields = GGUFReader(source).fields
    edits = dict(damage.metadata)
    for key, value in edits.items():
        if value == "half":
            rules = fields[key].contents()
            edits[key] = rules[: len(rules) // 2]
        if value == "longer":
            edits[key] = fields[key].contents() + "!"
    return rewritten(source, out, kinds, change=damage.change, metadata=edits)
