"""Bits and group size of every matrix by integer linear programming (as LQ-LoRA, arXiv 2311.12023, §3.2).

    minimize   Σ_m Σ_c error[m, c] · x[m, c]           x in {0, 1},  Σ_c x[m, c] = 1 for every matrix m
    so that    Σ_m Σ_c size[m, c] · x[m, c] ≤ budget

error: Σ F ∘ E², with F the Fisher information of every weight and E what is left of it: to second order and without
products of two weights, how much the loss grows. So errors of all matrices are on one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from qalora_export.checkpoint.forecast import FP16
from qalora_export.comparison.bench import Bench, plain
from qalora_export.comparison.needs import SCIPY, imported
from qalora_export.grid import packed_width
from qalora_export.progress import track
from qalora_export.quantization.rules import Plan

# Every choice that GGUF and ONNX hold exactly after training, or beside a 16-bit adapter.
CHOICES = tuple(Plan(bits, group, sym=False) for bits in (2, 3, 4, 5) for group in (32, 64, 128))
Rest = Callable[[str, Tensor, Plan], Tensor]  # module, its weight (out, in), a choice -> what is left of the weight


def size_of(shape: tuple[int, int], plan: Plan) -> int:
    """Bytes of codes, scales and offsets of a matrix (out, in)."""
    rows, columns = shape
    return rows * (packed_width(columns, plan.bits) + 2 * FP16 * columns // plan.group_size)


def errors_of(bench: Bench, rest: Rest, choices: Sequence[Plan] = CHOICES) -> dict[str, dict[Plan, float]]:
    """Module -> those of `choices` that its width allows -> error."""
    model, fisher, found = plain(bench.source), bench.fisher, dict[str, dict[Plan, float]]()
    for name in track(bench.modules, "errors of every choice of bits, matrices"):
        weight = model.get_submodule(name).weight.data
        fit = [plan for plan in choices if weight.shape[1] % plan.group_size == 0]
        found[name] = {plan: float((fisher[name] * rest(name, weight, plan).square()).sum()) for plan in fit}
    return found


def allocate(
    errors: Mapping[str, Mapping[Plan, float]], shapes: Mapping[str, tuple[int, int]], budget: int
) -> dict[str, Plan]:
    """The choice of every matrix with the least total error in `budget` bytes.

    errors: module -> choice -> error. Raises ValueError when not even the smallest choices fit.
    """
    optimize = imported(f"{SCIPY}.optimize")
    options = [(name, plan) for name, choices in errors.items() for plan in choices]
    cost = np.array([errors[name][plan] for name, plan in options])
    sizes = np.array([size_of(shapes[name], plan) for name, plan in options], np.float64)
    one_each = np.array([[float(name == module) for name, _ in options] for module in errors])
    solved = optimize.milp(
        cost / (cost.max() or 1.0),  # the solver's tolerances are absolute
        integrality=np.ones(len(options)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(sizes[None] / budget, -np.inf, 1),
        ],
    )
    if solved.x is None:
        raise ValueError(f"no choice of bits fits in {budget} bytes: {solved.message}")
    return {name: plan for (name, plan), x in zip(options, solved.x, strict=True) if x > 0.5}


def spent(shapes: Mapping[str, tuple[int, int]], plans: Mapping[str, Plan]) -> int:
    """Bytes of all matrices together."""
    return sum(size_of(shapes[name], plan) for name, plan in plans.items())


def uniform(modules: Sequence[str], of: Mapping[str, tuple[int, int]]) -> dict[str, Plan]:
    """The plans of a checkpoint's modules; of: name -> (bits, group size)."""
    return {name: Plan(*of[name], sym=False) for name in modules}
