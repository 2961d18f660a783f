"""Bits by integer programming: the best choice there is under the total, by trying every one."""

import itertools

import numpy as np
import pytest

from qalora_export.comparison.mixed import CHOICES, allocate, size_of, spent, uniform
from qalora_export.quantization.rules import Plan

SHAPES = {"a": (32, 128), "b": (64, 128), "c": (32, 256)}
SOME = [Plan(2, 64, False), Plan(3, 32, False), Plan(4, 128, False), Plan(5, 32, False)]
ERRORS = {
    name: {plan: float(error) for plan, error in zip(SOME, np.random.default_rng(index).uniform(0, 9, 4), strict=True)}
    for index, name in enumerate(SHAPES)
}


def total(plans: dict[str, Plan]) -> float:
    return sum(ERRORS[name][plan] for name, plan in plans.items())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_other_choice_in_the_budget_has_less_error(bits: int) -> None:
    budget = spent(SHAPES, uniform(list(SHAPES), dict.fromkeys(SHAPES, (bits, 32))))
    found = allocate(ERRORS, SHAPES, budget)
    every = (dict(zip(SHAPES, plans, strict=True)) for plans in itertools.product(SOME, repeat=len(SHAPES)))
    least = min(total(plans) for plans in every if spent(SHAPES, plans) <= budget)
    assert spent(SHAPES, found) <= budget and total(found) == pytest.approx(least)


def test_a_budget_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no choice"):
        allocate(ERRORS, SHAPES, 100)


def test_sizes_are_those_of_a_checkpoint() -> None:
    assert size_of((32, 128), Plan(4, 32, False)) == 32 * (64 + 4 * 4)
    assert 8 * size_of((32, 128), Plan(3, 64, False)) / (32 * 128) == 3.5
    assert len(CHOICES) == 12
