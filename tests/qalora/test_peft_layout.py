"""adapter_config.json: what is honoured, what is refused, and PEFT's own opinion of it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from qalora_export.errors import InputError, QaloraError, UnsafeInputError
from qalora_export.qalora.peft_layout import (
    ACCEPTED,
    HARMLESS,
    READ,
    make_config,
    parse_config,
    shortest_targets,
    split_name,
    tensor_name,
)

BASE = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_qalora": True, "qalora_group_size": 32, "bias": "none"}


def parse(**changes: object) -> object:
    return parse_config(BASE | changes, where="x")


def test_reads_peft_defaults() -> None:
    config = parse_config(LoraConfig(use_qalora=True).to_dict() | {"peft_type": "LORA"}, where="x")
    assert (config.rank, config.alpha, config.pool) == (8, 8.0, 16)
    assert config.alpha_over_r(["m"])["m"] == (8, 1.0)


def test_without_use_qalora_the_group_size_means_nothing() -> None:
    assert parse(use_qalora=False).pool is None


def test_rslora_divides_by_the_root() -> None:
    assert parse(use_rslora=True, r=16).alpha_over_r(["m"])["m"] == (16, 4.0)


PATTERNS = {"q_proj": 1, r"^model.layers.1.mlp.down_proj": 2, r"layers\.\d+\.mlp\.up_proj": 3, "mlp.gate_proj": 4}
NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.11.mlp.down_proj",
    "model.layers.10.mlp.up_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.self_attn.xq_proj",
]


@pytest.mark.parametrize("name", NAMES)
def test_patterns_match_as_in_peft(name: str) -> None:
    expected = PATTERNS.get(get_pattern_key(PATTERNS.keys(), name), 16)
    assert parse(alpha_pattern=PATTERNS).alpha_over_r([name])[name] == (8, expected / 8)
    expected = PATTERNS.get(get_pattern_key(PATTERNS.keys(), name), 8)
    assert parse(rank_pattern=PATTERNS).alpha_over_r([name])[name][0] == expected


REFUSED = {
    "other method": {"peft_type": "IA3"},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "full modules": {"modules_to_save": ["lm_head"]},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "loftq": {"init_lora_weights": "loftq"},
    "tokens": {"trainable_token_indices": [1, 2]},
    "activated": {"alora_invocation_tokens": [5]},
    "kasa": {"kasa_config": {"beta": 1e-4}},
    "lora-ga": {"init_lora_weights": "lora_ga"},
    "target parameters": {"target_parameters": ["experts.weight"]},
    "a field of a later PEFT": {"use_novel_lora": True},
    "rank zero": {"r": 0},
    "rank is text": {"r": "8"},
    "rank is true": {"r": True},
    "fractional rank": {"r": 2.5},
    "no alpha": {"lora_alpha": None},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha infinite": {"lora_alpha": float("inf")},
    "negative pool": {"qalora_group_size": -32},
    "pattern is a list": {"rank_pattern": ["q_proj"]},
    "pattern of text": {"alpha_pattern": {"q_proj": "9"}},
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_has_no_lossless_form(case: str) -> None:
    with pytest.raises(InputError):
        parse(**REFUSED[case])


def test_every_field_of_this_peft_is_known() -> None:
    known = set(ACCEPTED) | READ | HARMLESS
    assert {field.name for field in fields(LoraConfig)} - {"runtime_config"} <= known  # runtime_config is never saved


def test_fields_that_say_nothing_pass_and_others_are_named() -> None:
    """PEFT before 0.3 wrote enable_lora and merge_weights; a later one may write what nobody knows yet."""
    assert parse(enable_lora=None, merge_weights=False, new_table={}) == parse()
    with pytest.raises(InputError, match=r"enable_lora = '\[True\]'.*does not know the field.*remove it"):
        parse(enable_lora=[True])


@pytest.mark.parametrize("name", ["gaussian", "eva", "orthogonal", "mica", False])
def test_initializations_that_keep_the_base_are_taken(name: object) -> None:
    assert parse(init_lora_weights=name) == parse()


def test_a_list_is_no_config() -> None:
    with pytest.raises(UnsafeInputError):
        parse_config([], where="x")


@pytest.mark.parametrize(
    ("key", "error"), [("(a+)+b", UnsafeInputError), ("(a|aa)*c", UnsafeInputError), ("[", InputError)]
)
def test_patterns_that_hang_or_fail_are_refused(
    key: str, error: type[QaloraError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qalora_export.safety.confined.SECONDS", 0.3)
    with pytest.raises(error, match="pattern"):
        parse(rank_pattern={key: 2}).alpha_over_r(["a" * 60])


def test_a_long_but_harmless_pattern_is_read() -> None:
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(40)]
    key = r"model\.layers\.(" + "|".join(str(n) for n in range(0, 40, 2)) + r")\.(self_attn\.[qkvo]_proj)+"
    found = parse(rank_pattern={key: 2}).alpha_over_r(names)
    assert [rank for rank, _ in found.values()] == [2, 8] * 20


def test_many_names_are_matched_in_bounded_time() -> None:
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(1100)]
    found = parse(alpha_pattern={name: n + 1 for n, name in enumerate(names)}).alpha_over_r(names)
    assert [alpha * 8 for _, alpha in found.values()] == list(range(1, 1101))


def test_lora_dropout_is_a_training_setting() -> None:
    assert parse(lora_dropout=0.5).alpha_over_r(["m"])["m"] == (8, 2.0)


def test_peft_reads_our_config_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    ours = make_config(
        rank=4,
        alpha=8.0,
        pool=32,
        ranks={"a.b": 2},
        alphas={"a.b": 1.5, "c": 2.25},
        targets=["b", "c"],
        base_name="base",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(ours))
    theirs = LoraConfig.from_pretrained(str(tmp_path))
    assert [str(w.message) for w in recwarn if "nexpected" in str(w.message)] == []
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_qalora", "qalora_group_size", "bias"):
        assert getattr(theirs, field) == ours[field]
    assert theirs.target_modules == {"b", "c"}
    assert parse_config(ours, where="x").alpha_over_r(["a.b"])["a.b"] == (2, 0.75)


def test_tensor_names() -> None:
    assert tensor_name("model.layers.0.q", "A") == "base_model.model.model.layers.0.q.lora_A.weight"
    for name in (
        "base_model.model.m.q.lora_B.weight",
        "m.q.lora_B.weight",
        "base_model.model.m.q.lora_B.default.weight",
    ):
        assert split_name(name, where="x") == ("m.q", "B")
    refused = {
        "m.q.weight": "only lora_A",
        ".lora_A.weight": "only lora_A",
        "m.q.lora_A.bias": "trained bias",
        "m.q.bias": "trained bias",
        "m.q.lora_magnitude_vector": "DoRA",
        "m.embed_tokens.lora_embedding_A": "adapter on an embedding",
        "base_model.model.model.embed_tokens.weight": "trained embeddings",
        "base_model.model.lm_head.weight": "trained output head",
        "base_model.model.score.modules_to_save.default.weight": "fully trained module",
    }
    for name, reason in refused.items():
        with pytest.raises(InputError, match=f"cannot merge.*{reason}"):
            split_name(name, where="x")


def test_targets_are_leaf_names_only_when_those_select_the_same() -> None:
    modules = ["m.0.q", "m.0.k", "m.1.q", "m.1.k", "m.0", "m"]
    assert shortest_targets(["m.0.q", "m.1.q"], modules) == ["q"]
    assert shortest_targets(["m.0.q"], modules) == ["m.0.q"]
    assert shortest_targets(["m.0.q", "m.1.q", "m.0.k"], modules) == ["m.0.k", "m.0.q", "m.1.q"]
