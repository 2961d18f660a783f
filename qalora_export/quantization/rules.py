"""Which modules are quantized and how: settings, then the first matching rule of the recipe."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import get_args

from qalora_export.errors import InputError
from qalora_export.recipe import GroupSize, QuantizeRule, QuantizeSettings


@dataclass(frozen=True, slots=True)
class Plan:
    """How one module is quantized."""

    bits: int
    group_size: int
    sym: bool


def resolve(settings: QuantizeSettings, in_features: Mapping[str, int], *, inside: str, tied: bool) -> dict[str, Plan]:
    """Module name -> plan, in the model's order.

    in_features: every linear layer of the model with its width. inside: prefix of the decoder layers; linear layers
    outside them (lm_head) are quantized only when a rule names them literally, never by a wildcard. Raises InputError
    for a rule that matches nothing, for a tied lm_head, for in-features that g does not divide, and when nothing is
    left to quantize.
    """
    for each in settings.rules:
        _check_matches(each, list(in_features))
    plans: dict[str, Plan] = {}
    for module, width in in_features.items():
        rule = next((rule for rule in settings.rules if fnmatchcase(module, rule.match)), None)
        outside = not module.startswith(inside)
        if (rule is not None and rule.skip) or (outside and not (rule is not None and rule.match == module)):
            continue
        if outside and tied:
            raise InputError(
                "cannot quantize an lm_head that shares its weights with the embedding",
                where=module,
                why="the embedding would change with it",
                fix="remove the rule for it",
            )
        plans[module] = _planned(settings, rule)
        _check_width(module, width, plans[module].group_size)
    if not plans:
        raise InputError("the rules skip every module", where="quantize.rules", fix="leave something to quantize")
    return plans


def parse_rule(text: str) -> QuantizeRule:
    """A rule as the command line spells it: "pattern=skip", "pattern=bits:3,group:64,sym:true"."""
    from qalora_export.recipe import validated

    pattern, equals, actions = text.partition("=")
    raw: dict[str, object] = {"match": pattern}
    for action in actions.split(","):
        key, _, value = action.strip().partition(":")
        if key == "skip" and not value:
            raw["skip"] = True
        elif key == "bits" and value.isdigit():
            raw["bits"] = int(value)
        elif key in ("group", "group_size") and value.isdigit():
            raw["group_size"] = int(value)
        elif key == "sym" and value in ("true", "false"):
            raw["sym"] = value == "true"
        else:
            raise InputError(
                f"cannot read the rule {text!r}",
                where="--rule",
                why=f"{action!r} is not an action",
                fix="write 'pattern=skip' or 'pattern=bits:3,group:64,sym:true'",
            )
    if not pattern or not equals:
        raise InputError(f"the rule {text!r} names no pattern", where="--rule", fix="write 'pattern=skip'")
    return validated(QuantizeRule, raw, where=f"--rule {text!r}")


def _planned(settings: QuantizeSettings, rule: QuantizeRule | None) -> Plan:
    chosen = [
        getattr(settings, name) if rule is None or getattr(rule, name) is None else getattr(rule, name)
        for name in ("bits", "group_size", "sym")
    ]
    return Plan(*chosen)


def _check_matches(rule: QuantizeRule, modules: list[str]) -> None:
    if any(fnmatchcase(module, rule.match) for module in modules):
        return
    close = difflib.get_close_matches(rule.match, modules, n=1, cutoff=0.3) or modules[:1]
    raise InputError(
        f"the rule {rule.match!r} matches no linear layer",
        where="quantize.rules",
        why=f"modules are named like {close[0]!r}" if close else "the model has none",
        fix="correct the pattern (* matches any text) or remove the rule",
    )


def _check_width(module: str, width: int, group_size: int) -> None:
    if width % group_size == 0:
        return
    fitting = [g for g in get_args(GroupSize) if width % g == 0]
    fix = f"keep this module as it is: --rule '{module}=skip'"
    if fitting:
        sizes = " or ".join(map(str, fitting))
        fix = f"use group size {sizes}; for this module alone: --rule '{module}=group:{fitting[-1]}'"
    raise InputError(f"{width} in-features do not divide into groups of {group_size}", where=module, fix=fix)
