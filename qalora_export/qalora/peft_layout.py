"""PEFT's adapter layout, both directions: adapter_config.json as PEFT writes and reads it, and its tensor names.

    adapter_config.json        LoraConfig fields; use_qalora and qalora_group_size select peft's QALoraLinearVariant
    adapter_model.safetensors  base_model.model.<module>.lora_A.weight (r, in/pool), ….lora_B.weight (out, r)

PEFT's variant scales by alpha/r · in/pool² where we scale by a number of our own, and in-features differ from module to
module. The tensors stay as trained, bit for bit; the factor goes into `alpha_pattern`, PEFT's per-module alpha.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety.confined import Confined, FailedError, OutOfBoundsError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
WITH_SCALES = "QALORA_PLUS"  # peft_type of an adapter that moves scales too, which PEFT refuses to load
PARTS = ({"A", "B"}, {"A", "B", "scale_A", "scale_B"})  # of a module: of its offsets, and of its scales
NAME = re.compile(r"[\w.-]+")  # as an expression: no repetition
MOST_MATCHES = 10**6  # keys × modules
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>(?:scale_)?[AB])(?:\.default)?\.weight")

# LoraConfig field -> (values that leave our formula intact, why any other cannot be imported)
ACCEPTED: dict[str, tuple[tuple[object, ...], str]] = {
    "peft_type": (("LORA",), "only LoRA adapters can hold QA-LoRA"),
    "use_dora": ((False, None), "DoRA rescales whole rows of the weight; codes and scales would change"),
    "bias": (("none", None), "trained biases are not part of the adapter's low-rank update"),
    "lora_bias": ((False, None), "a bias on lora_B adds a term outside of the weight"),
    "modules_to_save": ((None, []), "fully trained modules replace tensors of the base"),
    "init_lora_weights": (
        (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
        "this initialization changed the base weights before training",
    ),
    "layer_replication": ((None, []), "replicated layers are another architecture"),
    "trainable_token_indices": ((None, [], {}), "trained embeddings replace tensors of the base"),
    "target_parameters": ((None, []), "adapters on bare parameters have no module"),
    "alora_invocation_tokens": ((None, []), "activated LoRA switches on in mid-sequence and cannot merge"),
    "arrow_config": ((None,), "a routed mixture of adapters cannot merge"),
    "use_bdlora": ((None,), "block-diagonal LoRA is another formula"),
    "velora_config": ((None,), "VeLoRA is another formula"),
    "monteclora_config": ((None,), "MonteCLoRA is another formula"),
    "kasa_config": ((None,), "KaSA truncates the base weights and scales the update by trained singular values"),
}
# Fields that parse_config reads, and fields whose value changes nothing about what a trained adapter computes.
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_qalora", "qalora_group_size"}
HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors tell
    *(
        "lora_dropout",
        "ensure_weight_tying",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    ),  # training
    *("fan_in_fan_out", "megatron_config", "megatron_core"),  # how the base stores or shares out its weights
}
ONLY = "only lora_A.weight and lora_B.weight of linear layers have a lossless form"
# What a tensor that is no lora_A or lora_B belongs to, by a part of its name.
FOREIGN = {
    "lora_embedding_": "an adapter on an embedding: embeddings are not quantized, so they have no offset to move",
    "lora_magnitude_vector": "DoRA's magnitudes rescale whole rows of the weight",
    "modules_to_save": "a fully trained module, which replaces tensors of the base",
    "embed_tokens": "trained embeddings, which PEFT saves along when the vocabulary grew",
    "lm_head": "a trained output head, which PEFT saves along when the vocabulary grew",
    "bias": "a trained bias, which is not part of a low-rank update",
}


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What adapter_config.json says about the arithmetic. pool: None unless use_qalora."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool
    pool: int | None

    def alpha_over_r(self, modules: list[str]) -> dict[str, tuple[int, float]]:
        """module -> (rank, alpha/r or alpha/√r), patterns honoured."""
        ranks = _by_pattern(self.rank_pattern, modules, self.rank)
        alphas = _by_pattern(self.alpha_pattern, modules, self.alpha)
        return {
            module: (rank, alpha / (rank**0.5 if self.rslora else rank))
            for module, rank, alpha in zip(modules, ranks, alphas, strict=True)
        }


def parse_config(raw: Any, *, where: object, own: bool = False) -> PeftConfig:
    """Read a LoraConfig. Raises InputError naming the first field that has no lossless form, or that is malformed.

    own: by our manifest we wrote it, so that it may be WITH_SCALES.
    """
    if not isinstance(raw, dict):
        raise UnsafeInputError(f"{CONFIG} is not a JSON object", where=where)
    if own and raw.get("peft_type") == WITH_SCALES:
        raw = raw | {"peft_type": "LORA"}
    for field, (accepted, reason) in ACCEPTED.items():
        if field in raw and not any(raw[field] == value for value in accepted):
            raise InputError(f"cannot import an adapter with {field} = {raw[field]!r}", where=where, why=reason)
    for field in sorted(set(raw) - set(ACCEPTED) - READ - HARMLESS):
        if raw[field] not in (None, False, "", [], {}):
            raise InputError(
                f"cannot import an adapter with {field} = {str(raw[field])[:80]!r}",
                where=where,
                why="this version does not know the field, which may change what the adapter computes",
                fix=f"if it only steered training, remove it from {CONFIG}",
            )
    pool = raw.get("qalora_group_size", 16) if raw.get("use_qalora") else None  # 16 is LoraConfig's default
    numbers = [raw.get("r"), raw.get("lora_alpha"), *([] if pool is None else [pool])]
    patterns = [raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}]
    for table in patterns:
        if not isinstance(table, dict):
            raise InputError("rank_pattern and alpha_pattern must be tables", where=where)
        numbers += table.values()
    if not all(type(n) in (int, float) and 0 < n < 2**31 for n in numbers):
        raise InputError(
            "r, lora_alpha, qalora_group_size and patterns must be positive numbers",
            where=where,
            why=f"found {numbers[:8]}",
        )
    if not all(type(n) is int for n in (raw["r"], pool or 1, *patterns[0].values())):
        raise InputError("ranks and qalora_group_size must be whole numbers", where=where)
    ranks, alphas = patterns
    return PeftConfig(raw["r"], float(raw["lora_alpha"]), ranks, alphas, bool(raw.get("use_rslora")), pool)


def _first_matches(keys: list[str], modules: list[str]) -> list[int | None]:
    """PEFT's get_pattern_key: the first key that, as a regular expression, matches a dotted suffix of each name."""
    patterns = [re.compile(rf"(.*\.)?({key})$") for key in keys]
    return [next((number for number, pattern in enumerate(patterns) if pattern.match(name)), None) for name in modules]


def _by_pattern(table: dict[str, Any], modules: list[str], default: Any) -> list[Any]:
    """The value of each module: of the first key that matches, or the default.

    A few plain names match in no time. Any other expression came with the adapter and may take for ever, so it is
    tried in a confined process.
    """
    keys = list(table)
    plain = len(keys) * len(modules) <= MOST_MATCHES and all(NAME.fullmatch(key) for key in keys)
    try:
        found = (_first_matches if plain else Confined(_first_matches))(keys, modules)
    except FailedError as error:
        raise InputError("a rank or alpha pattern is no regular expression", where=CONFIG, why=str(error)) from error
    except OutOfBoundsError as error:
        raise UnsafeInputError(
            "the rank or alpha patterns do not come to an end",
            where=CONFIG,
            why=str(error),
            fix="they are regular expressions that came with the adapter: look at them",
        ) from error
    return [default if number is None else table[keys[number]] for number in found]


def make_config(
    *,
    rank: int,
    alpha: float,
    pool: int,
    ranks: dict[str, int],
    alphas: dict[str, float],
    targets: list[str],
    base_name: str,
    scales: bool = False,
) -> dict[str, Any]:
    """adapter_config.json for PEFT. ranks: modules whose rank differs; alphas: PEFT's alpha of every module.

    scales: they are trained too, so it is not for PEFT.
    """
    return {
        "peft_type": WITH_SCALES if scales else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": targets,
        "use_qalora": True,
        "qalora_group_size": pool,
    }


def tensor_name(module: str, part: str) -> str:
    """part "A" or "B" -> PEFT's tensor name; "scale_A" or "scale_B" -> one of ours beside it."""
    return f"{PREFIX}{module}.lora_{part}.weight"


def split_name(name: str, *, where: object) -> tuple[str, str]:
    """A name of tensor_name's -> (module, part). Raises InputError for tensors that are not LoRA matrices."""
    match = _KEY.fullmatch(name)
    if match is None:
        raise InputError(
            f"the adapter holds a tensor we cannot merge: {name!r}",
            where=where,
            why=next((reason for part, reason in FOREIGN.items() if part in name), ONLY),
        )
    return match["module"], match["part"]


def shortest_targets(adapted: list[str], all_modules: list[str]) -> list[str]:
    """target_modules for PEFT: leaf names when they select exactly `adapted`, else the full names."""
    leaves = {name.rpartition(".")[2] for name in adapted}
    selected = {name for name in all_modules if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if selected == set(adapted) else sorted(adapted)
