"""Which architectures are admitted: every Family that a module of this package defines."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.models.families.family import Family, head_dim
from qalora_export.models.families.rope import rope_of


def _defined() -> tuple[Family, ...]:
    """Every Family at the top of a module of this package, by name: a new file is enough to add one."""
    package = importlib.import_module(__name__.rpartition(".")[0])
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for found in pkgutil.iter_modules(package.__path__)
        if found.name != "registry"
    ]
    found = {value.name: value for module in modules for value in vars(module).values() if isinstance(value, Family)}
    return tuple(found[name] for name in sorted(found))


FAMILIES = _defined()
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
MAX_LAYERS = 1024  # the largest models have 126; a table of names is made for every layer that a file claims


def supported_architectures() -> list[str]:
    """Every admitted name of config.json's `architectures`."""
    return [name for family in FAMILIES for name in family.architectures]


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model by its config.json.

    Raises InputError, with the list of supported architectures, when there is none, and for variants (rotary
    scaling, activation, …) that the family's exporters do not carry exactly.
    """
    named = config.get("architectures") or []
    names = [str(name) for name in named] if isinstance(named, list) else []
    found = [family for family in FAMILIES if set(names) & set(family.architectures)]
    if len(found) != 1:
        raise InputError(
            f"unsupported architecture {', '.join(names) if names else '(none named)'}",
            where="config.json: architectures",
            why=f"supported: {', '.join(supported_architectures())}",
            fix="every other architecture needs a family table and a parity test first",
        )
    family = found[0]
    for key in SIZES:
        if type(config.get(key)) is not int or config[key] <= 0:
            raise InputError(f"{key} is {config.get(key)!r}, not a positive number", where=f"config.json: {key}")
    if config["num_hidden_layers"] > MAX_LAYERS:
        raise UnsafeInputError(
            f"a model of {config['num_hidden_layers']} layers",
            where="config.json: num_hidden_layers",
            why=f"more than {MAX_LAYERS} are taken for damage",
        )
    family.check_variant(config)
    rope = rope_of(config, family.rope_types)
    if rope.partial != 1.0 and not family.partial_rotary:
        raise InputError(
            f"{family.name} with partial_rotary_factor = {rope.partial!r} is not supported",
            where="config.json: partial_rotary_factor",
            why="the runtimes rotate whole heads",
            fix="use a model of the standard architecture",
        )
    _check_heads(config)
    if rope.rotated(head_dim(config)) % 2:
        raise InputError("an odd number of features is rotated", where="config.json: partial_rotary_factor")
    return family


def _check_heads(config: Mapping[str, Any]) -> None:
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if type(kv_heads) is not int or kv_heads <= 0 or heads % kv_heads:
        raise InputError(f"{heads} attention heads do not divide among {kv_heads} key/value heads", where="config.json")
    if config.get("head_dim") is not None and (type(config["head_dim"]) is not int or config["head_dim"] <= 0):
        raise InputError(f"head_dim is {config['head_dim']!r}, not a positive number", where="config.json: head_dim")
    if not config.get("head_dim") and config["hidden_size"] % heads:
        raise InputError(f"hidden size {config['hidden_size']} does not divide into {heads} heads", where="config.json")
    if head_dim(config) % 2:
        raise InputError(f"head_dim {head_dim(config)} is odd", where="config.json", why="rotary embedding needs pairs")
