"""What "pool" means in the wild, as one table; imports name a convention, they never guess one.

Every QA-LoRA implementation computes  y = x Wᵀ + scaling · B A · pool(x)  over runs of p in-features, and they differ
in pool alone. Our layer sums. The others reach the same function with another scaling:

    name   pool(x)                          scaling for a sum          source
    sum    Σ x                              α/r                        paper, Algorithm 1 (AvgPool × L)
    mean   Σ x / p                          α/r / p                    authors' code: peft_utils.py, merge.py
    peft   mean × number of groups          α/r · in / p²              peft/tuners/lora/variants.py, `use_qalora`
"""

from collections.abc import Callable
from typing import Literal, get_args

from qalora_export.errors import InputError

ConventionName = Literal["sum", "mean", "peft"]
ConventionChoice = Literal["auto", "sum", "mean", "peft"]

# name -> factor(in_features, pool) that turns the convention's α/r into the scaling of a sum
FACTORS: dict[ConventionName, Callable[[int, int], float]] = {
    "sum": lambda in_features, pool: 1.0,  # noqa: ARG005
    "mean": lambda in_features, pool: 1.0 / pool,  # noqa: ARG005
    "peft": lambda in_features, pool: in_features / pool**2,
}


def sum_scaling(convention: ConventionName, alpha_over_r: float, in_features: int, pool: int) -> float:
    """The scaling with which a sum over `pool` in-features computes what `convention` computes."""
    return alpha_over_r * FACTORS[convention](in_features, pool)


def peft_alpha(scaling: float, rank: int, in_features: int, pool: int) -> float:
    """The alpha that makes PEFT's variant (alpha / rank · in / pool²) compute a sum with `scaling`."""
    return scaling * rank / FACTORS["peft"](in_features, pool)


def resolve(choice: str, *, own: bool, use_qalora: bool, where: object) -> ConventionName:
    """The convention of an adapter, from the user's choice and what its files declare.

    own: the folder carries our manifest. use_qalora: adapter_config.json says PEFT's variant trained it. Raises
    InputError when the files do not settle it and the user did not either, or when both speak and disagree.
    """
    if choice not in get_args(ConventionChoice):
        raise InputError(f"unknown convention {choice!r}", where=where, fix=f"one of {get_args(ConventionChoice)}")
    declared: ConventionName | None = "sum" if own else "peft" if use_qalora else None
    named: ConventionName | None = next((name for name in FACTORS if name == choice), None)
    if declared is None and named is None:
        raise InputError(
            "this adapter does not say how it pools its input",
            where=where,
            why="sum (paper), mean (the authors' code) and peft (use_qalora) share one file layout and differ in scale",
            fix="pass --convention sum, mean or peft",
        )
    if declared and named and declared != named:
        raise InputError(
            f"the adapter declares the convention {declared!r}, you asked for {named!r}",
            where=where,
            fix=f"leave --convention out, or pass {declared}",
        )
    resolved = named or declared
    assert resolved is not None
    return resolved
