"""Which modules are quantized and how: settings, then the first matching rule of the recipe, then what g must divide.

In-features that the group size does not divide: the module falls to the next smaller group size that does (128, 64,
32), and stays as it is, in 16 bits, where none does. A grid of super-blocks falls to free scales and offsets (affine16,
and q6_k to q8_0) where 256 does not divide. `strict_groups` refuses instead.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

from qalora_export.errors import InputError
from qalora_export.grid import AFFINE16, GRIDS, NamedGrid, SuperBlockGrid
from qalora_export.grid.named import SUPER_BLOCK
from qalora_export.quantization.presets import preset_rules
from qalora_export.recipe import GridName, GroupSize, QuantizeRule, QuantizeSettings

CHOICES = ("bits", "group_size", "sym")
Q8_0 = "q8_0"
SYMMETRIC = {Q8_0: 8, "q4_0": 4}  # affine16 as GGUF's blocks of 32 without an offset have it -> bits


@dataclass(frozen=True, slots=True)
class Plan:
    """How one module is quantized."""

    bits: int
    group_size: int
    sym: bool
    grid: NamedGrid = AFFINE16


def plan_of(grid: NamedGrid) -> Plan:
    """How a matrix on this grid of super-blocks is quantized."""
    assert isinstance(grid, SuperBlockGrid)
    return Plan(grid.bits, grid.group_size, grid.symmetric, grid)


@dataclass(frozen=True, slots=True)
class Resolution:
    """plans: module name -> plan, in the model's order. fallen: modules with a smaller group than asked for, and those
    left in 16 bits (None), each with its in-features and the group size asked for. off_grid: modules that do not divide
    into super-blocks, each with its in-features and the grid asked for. embeddings: those that go into blocks."""

    plans: dict[str, Plan]
    fallen: dict[str, tuple[int | None, int, int]]
    off_grid: dict[str, tuple[int, str]] = field(default_factory=dict)
    embeddings: dict[str, Plan] = field(default_factory=dict)

    def notes(self) -> tuple[str, ...]:
        """One line for all modules of a kind that fell alike: "30 × down_proj: groups of 64, …"."""
        kinds = Counter((name.rpartition(".")[2], *fall) for name, fall in self.fallen.items())
        groups = (
            f"{count} × {kind}: {'left in 16 bits' if got is None else f'groups of {got}'}, "
            f"{width} in-features do not divide into groups of {asked}"
            for (kind, got, width, asked), count in kinds.items()
        )
        others = Counter((name.rpartition(".")[2], *fall) for name, fall in self.off_grid.items())
        grids = (
            f"{count} × {kind}: grid {_instead(asked)} instead of {asked}, {width} in-features do not divide into "
            f"super-blocks of {SUPER_BLOCK}"
            for (kind, width, asked), count in others.items()
        )
        return (*groups, *grids)


def resolve(
    settings: QuantizeSettings,
    in_features: Mapping[str, int],
    *,
    inside: str,
    tied: bool,
    embeddings: Mapping[str, int] | None = None,
) -> Resolution:
    """What to quantize and how.

    in_features: every linear layer of the model with its width; embeddings: every embedding with its own. inside:
    prefix of the decoder layers; what lies outside them (lm_head, the embedding) is quantized only when a rule or the
    preset names it literally, never by a wildcard. Raises InputError for a rule that matches nothing, for a tied
    lm_head, for a grid beside a preset, when nothing is left to quantize, and with strict_groups for in-features that g
    does not divide.
    """
    if settings.preset and settings.grid != AFFINE16.name:
        raise InputError(
            f"preset {settings.preset} and grid {settings.grid} are two choices",
            where="quantize.preset",
            fix="leave one out; rules give single modules another grid than the preset",
        )
    widths = {**in_features, **(embeddings or {})}
    for each in settings.rules:
        _check_matches(each, list(widths))
    rules = (*settings.rules, *preset_rules(settings.preset, list(widths), inside=inside, tied=tied))
    plans, fallen, off_grid = dict[str, Plan](), dict[str, tuple[int | None, int, int]](), dict[str, tuple[int, str]]()
    for module, width in widths.items():
        outside = not module.startswith(inside)
        matching = (rule for rule in rules if fnmatchcase(module, rule.match))
        rule = next((rule for rule in matching if not outside or rule.skip or rule.match == module), None)
        if (rule is not None and rule.skip) or (outside and rule is None):
            continue
        if outside and tied and module in in_features:
            raise InputError(
                "cannot quantize an lm_head that shares its weights with the embedding",
                where=module,
                why="the embedding would change with it",
                fix=f"name the embedding instead: {', '.join(embeddings)}" if embeddings else "remove the rule for it",
            )
        plan = _planned(settings, rule, module)
        if plan.grid is not AFFINE16:
            if plan.grid.divides(width, plan.group_size):
                plans[module] = plan
                continue
            if settings.strict_groups:
                raise _no_super_blocks(module, width, plan.grid)
            off_grid[module] = (width, plan.grid.name)
            plan = _own(_instead(plan.grid.name), plan)
        fitting = _fitting(width, plan.group_size)
        if fitting != plan.group_size:
            if settings.strict_groups:
                raise _does_not_divide(module, width, plan.group_size)
            fallen[module] = (fitting, width, plan.group_size)
        if fitting is not None:
            plans[module] = replace(plan, group_size=fitting)
    found = {name: plans.pop(name) for name in embeddings or {} if name in plans}
    if not plans:
        raise InputError(
            "nothing is left to quantize",
            where="quantize",
            why="no group size divides the in-features of any module" if fallen else "the rules skip every module",
            fix="leave something to quantize",
        )
    return Resolution(plans, fallen, off_grid, found)


def parse_rule(text: str) -> QuantizeRule:
    """A rule as the command line spells it: "pattern=skip", "pattern=bits:3,group:64,sym:true"."""
    from qalora_export.recipe_file import validated

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
        elif key == "grid" and value in get_args(GridName):
            raw["grid"] = value
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


def _planned(settings: QuantizeSettings, rule: QuantizeRule | None, module: str) -> Plan:
    """Settings, then the rule. A grid of super-blocks has its own bits and groups: others are refused beside it, unless
    they are the usual ones of the settings. Where a rule asks for others, and for no grid, the module is affine16.
    """
    asked: dict[str, Any] = {name: None if rule is None else getattr(rule, name) for name in CHOICES}
    chosen: dict[str, Any] = {n: getattr(settings, n) if asked[n] is None else asked[n] for n in CHOICES}
    named = None if rule is None else rule.grid
    name, free = named or ("q4_k" if settings.preset else settings.grid), Plan(**chosen)
    if name == AFFINE16.name:
        return free
    plan = _own(name, free)
    own = {choice: getattr(plan, choice) for choice in CHOICES}
    if named is None and any(value not in (None, own[name]) for name, value in asked.items()):
        return free
    usual = QuantizeSettings()
    if all(chosen[n] == own[n] or (asked[n] is None and chosen[n] == getattr(usual, n)) for n in CHOICES):
        return plan
    raise InputError(
        f"grid {name} has {plan.bits} bits in groups of {plan.group_size}, {'' if plan.sym else 'not '}symmetric",
        where=f"quantize.rules: {rule.match}" if named and rule else f"quantize.grid ({module})",
        why=f"the settings say {free.bits} bits in groups of {free.group_size}{', symmetric' if free.sym else ''}",
        fix="leave them out, or choose another grid",
    )


def _own(name: str, free: Plan) -> Plan:
    """The plan that a grid is by itself; of the free one the bits of `free`, in groups that GGUF has."""
    if name in SYMMETRIC:
        return Plan(SYMMETRIC[name], 32, True)
    grid = GRIDS[name]
    if isinstance(grid, SuperBlockGrid):
        return plan_of(grid)
    return Plan(free.bits, max(free.group_size, min(get_args(GroupSize))), free.sym)


def _instead(grid: str) -> str:
    """What a module becomes that does not divide into super-blocks: llama.cpp's Q6_K falls to Q8_0 as well."""
    named = GRIDS[grid]
    return Q8_0 if isinstance(named, SuperBlockGrid) and named.symmetric else AFFINE16.name


def _no_super_blocks(module: str, width: int, grid: NamedGrid) -> InputError:
    return InputError(
        f"{width} in-features do not divide into super-blocks of {SUPER_BLOCK}",
        where=module,
        why=f"grid {grid.name}, and strict_groups is set",
        fix=f"for this module: --rule '{module}=grid:{AFFINE16.name}'; without strict_groups this is done by itself",
    )


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


def _fitting(width: int, asked: int) -> int | None:
    """The largest group size that is at most the asked one and divides the in-features."""
    return max((g for g in get_args(GroupSize) if g <= asked and width % g == 0), default=None)


def _does_not_divide(module: str, width: int, group_size: int) -> InputError:
    fitting = [g for g in get_args(GroupSize) if width % g == 0]
    fix = f"keep this module as it is: --rule '{module}=skip'"
    if fitting:
        sizes = " or ".join(map(str, fitting))
        fix = f"use group size {sizes}; for this module alone: --rule '{module}=group:{fitting[-1]}'"
    return InputError(
        f"{width} in-features do not divide into groups of {group_size}",
        where=module,
        why="strict_groups is set",
        fix=f"{fix}; without strict_groups this is done by rule",
    )
