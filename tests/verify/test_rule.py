"""A gate passes only when everything was measured and lies within its bound."""

import math

import pytest

from qalora_export.errors import ExitCode
from qalora_export.verify.gates.registry import all_gates
from qalora_export.verify.rule import Entry, exit_code

G2_GATE = all_gates()["G2"]
RAW = {"nmse_max": 1e-11}
G2 = {"nmse_scaled_max": 1e-12, "disagreements": 0, "bad_positions": 0}


def entry(status: str) -> Entry:
    return {
        "pass": G2_GATE.judge("r", RAW | G2, detail=""),
        "fail": G2_GATE.judge("r", RAW | G2 | {"nmse_scaled_max": 1.0}, detail=""),
        "not run": G2_GATE.not_run("r", "missing"),
    }[status]


@pytest.mark.parametrize("figure", list(G2))
@pytest.mark.parametrize("value", [math.nan, math.inf, 2.0])
def test_one_figure_out_of_bounds_fails(figure: str, value: float) -> None:
    found = G2_GATE.judge("llama.cpp", RAW | G2 | {figure: value}, detail="")
    assert found.status == "fail"
    assert found.deciding is not None
    assert found.deciding.figure == figure


def test_a_missing_figure_is_an_error_not_a_pass() -> None:
    with pytest.raises(KeyError):
        G2_GATE.judge("r", RAW | {"nmse_scaled_max": 0.0}, detail="")


def test_no_limits_is_an_error_not_a_pass() -> None:
    with pytest.raises(ValueError, match="nothing to check"):
        G2_GATE.judge("r", RAW | G2, limits=(), detail="")


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["pass", "pass"], ExitCode.OK),
        (["pass", "not run"], ExitCode.RUNTIME_UNAVAILABLE),
        (["pass", "fail"], ExitCode.PARITY_FAILED),
        (["not run", "fail"], ExitCode.PARITY_FAILED),
        ([], ExitCode.RUNTIME_UNAVAILABLE),
    ],
)
def test_exit_code(statuses: list[str], code: ExitCode) -> None:
    assert exit_code(entry(status) for status in statuses) == code


def test_every_limit_states_unit_and_reason() -> None:
    assert {"G0", "G1", "G2", "G3", "G4", "G5", "G6"} <= set(all_gates())
    for gate in all_gates().values():
        assert gate.limits
        assert all(limit.unit and limit.reason for limit in gate.limits)
        assert len({limit.figure for limit in gate.limits}) == len(gate.limits)
