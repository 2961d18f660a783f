"""The six gates as data, and the one rule that turns measurements into pass, fail or not run.

A gate passes only when every one of its checks was measured and lies within its bound; NaN lies within no bound. A
gate that could not be measured is "not run", which is never a pass: it makes the whole run exit with code 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from qalora_export.errors import ExitCode

Status = Literal["pass", "fail", "not run"]
Kind = Literal["absolute", "floor"]


@dataclass(frozen=True, slots=True)
class Limit:
    """One figure's bound and why it is where it is.

    kind "absolute": bound is the largest passing value. kind "floor": bound multiplies the noise floor's figure, and
    `errors` standard errors of that figure are added: both sides are measured on as many positions, and both scatter.
    """

    figure: str
    bound: float
    unit: str
    reason: str
    kind: Kind = "absolute"
    errors: float = 0.0


@dataclass(frozen=True, slots=True)
class Gate:
    """id as in the report, what it compares, and its limits (the first is the gate's headline figure)."""

    id: str
    title: str
    what: str
    limits: tuple[Limit, ...]


def _prefixed(prefix: str, *limits: Limit) -> tuple[Limit, ...]:
    """The same limits on figures of one path."""
    return tuple(replace(limit, figure=prefix + limit.figure) for limit in limits)


NO_BAD = Limit("bad_positions", 0, "positions with NaN or Inf", "a NaN compares false with everything: count it")
EXACT_NMSE = Limit(
    "nmse_scaled_max",
    1e-9,
    "largest NMSE",
    "float32 kernels of different libraries differ by 1e-13 to 1e-11 through 30 layers; one wrong code, offset or "
    "epsilon in a real model moves a position by more than 1e-8",
)
EXACT_TOP1 = Limit("disagreements", 0, "positions", "beyond a tie (1e-3 nats) rounding cannot change the first choice")
# √2 · 3 standard errors: measured figure and floor scatter alike, and a right model must not fail by chance.
SCATTER = 4.0
SHIPPED = (
    Limit(
        "kl_mean", 1.25, "mean KL, nats", "a few positions carry much of the mean: hence its scatter", "floor", SCATTER
    ),
    Limit("nmse_mean", 1.25, "mean NMSE", "the steadiest figure, within 10 % of the floor", "floor", SCATTER),
    Limit("kl_p99", 1.25, "99th percentile of KL, nats", "the tail that users notice", "floor", SCATTER),
    Limit("kl_max", 10.0, "largest KL, nats", "a single draw: 0.4 to 6 times the floor in right models", "floor"),
    Limit("disagreements", 1.25, "other first choices", "near-ties flip under any rounding", "floor", SCATTER),
    Limit("perplexity_shift", 1.25, "nats per token", "noise must not bias the model", "floor", SCATTER),
)
NOISE_GAIN = Limit(
    "noise_gain",
    2.0,
    "times simulated int8 noise",
    "kernels were 0.91 to 1.16 times as noisy as int8 rounding in PyTorch; a broken base would raise its own bound",
)
GATES: dict[str, Gate] = {
    gate.id: gate
    for gate in (
        Gate(
            "G0",
            "bytes",
            "the written file, read back by an independent reader, against the checkpoint",
            (
                Limit("differing_values", 0, "values", "the export moves bytes; nothing is rounded"),
                Limit(
                    "differing_facts", 0, "facts", "a right tensor under a wrong epsilon or RoPE base is a wrong model"
                ),
                Limit(
                    "broken_links", 0, "links", "a hash that does not match is another file than the one that was made"
                ),
                Limit("wrong_merged_values", 0, "values", "a right export of a wrong merge is not the trained model"),
            ),
        ),
        Gate(
            "G1",
            "weights",
            "every matrix dequantized by the runtime's own dequantizer",
            (
                Limit("ulp_max", 0, "ulp", "s·q is exact in float32, so there is one rounding and one right answer"),
                Limit("missing_matrices", 0, "matrices", "a matrix that was not dequantized was not checked"),
            ),
        ),
        Gate(
            "G2",
            "exact path",
            "logits of the artifact through rounding-free kernels against PyTorch float32",
            (EXACT_NMSE, EXACT_TOP1, NO_BAD),
        ),
        Gate(
            "G3",
            "shipped path",
            "logits of the kernels that ship, against the noise floor of the unadapted base",
            (*SHIPPED, NO_BAD, NOISE_GAIN),
        ),
        Gate(
            "G4",
            "decode",
            "logits token by token with the KV cache against logits of the whole prompt",
            (*_prefixed("exact_", EXACT_NMSE, EXACT_TOP1, NO_BAD), *_prefixed("shipped_", *SHIPPED, NO_BAD)),
        ),
        Gate(
            "G5",
            "text",
            "token ids and rendered chat template against Hugging Face tokenizers",
            (
                Limit("differing_ids", 0, "ids", "a wrong id is a wrong prompt: the most frequent fault users report"),
                Limit("differing_chats", 0, "conversations", "the chat template is part of the model"),
            ),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Check:
    """One measured figure against its bound."""

    figure: str
    measured: float
    bound: float
    unit: str
    reason: str

    @property
    def passed(self) -> bool:
        return self.measured <= self.bound  # False for NaN on either side


@dataclass(frozen=True, slots=True)
class Entry:
    """One gate of one runtime. measured, bound, unit: the deciding check (the first that failed, else the headline).

    where: tensors, files or positions that the finding points at. unavailable: not run because the runtime is missing
    or crashed.
    """

    gate: str
    runtime: str
    status: Status
    detail: str
    checks: tuple[Check, ...] = ()
    where: tuple[str, ...] = ()
    figures: Mapping[str, Any] | None = None

    @property
    def deciding(self) -> Check | None:
        failed = [check for check in self.checks if not check.passed]
        return next(iter(failed or self.checks), None)


def judge(
    gate: str,
    runtime: str,
    measured: Mapping[str, float],
    *,
    detail: str,
    where: Iterable[str] = (),
    floor: Callable[[Limit], float] | None = None,
    limits: Iterable[Limit] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> Entry:
    """Turn measurements into an entry. Every limit of the gate needs its figure: a missing one raises KeyError.

    floor: the bound that the noise floor gives a limit of kind "floor".
    """
    chosen = tuple(limits if limits is not None else GATES[gate].limits)
    checks = tuple(_check(limit, measured, floor) for limit in chosen)
    if not checks:
        raise ValueError(f"gate {gate} has nothing to check")
    status: Status = "pass" if all(check.passed for check in checks) else "fail"
    return Entry(gate, runtime, status, detail, checks, tuple(where), figures)


def not_run(gate: str, runtime: str, reason: str) -> Entry:
    """An entry for a gate that could not be measured, and why."""
    return Entry(gate, runtime, "not run", reason)


def exit_code(entries: Iterable[Entry]) -> ExitCode:
    """1 when any gate failed, else 3 when any was not run, else 0. No entries at all is not a pass."""
    statuses = [entry.status for entry in entries]
    if "fail" in statuses:
        return ExitCode.PARITY_FAILED
    if "not run" in statuses or not statuses:
        return ExitCode.RUNTIME_UNAVAILABLE
    return ExitCode.OK


def _check(limit: Limit, measured: Mapping[str, float], floor: Callable[[Limit], float] | None) -> Check:
    bound = limit.bound
    if limit.kind == "floor":
        if floor is None:
            raise ValueError(f"{limit.figure} is bounded by the noise floor, which was not measured")
        bound = floor(limit)
    return Check(limit.figure, float(measured[limit.figure]), float(bound), limit.unit, limit.reason)
