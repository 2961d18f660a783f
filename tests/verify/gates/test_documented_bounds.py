"""README, DESIGN.md, help texts and comments state the bounds that the gates have."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import qalora_export
from qalora_export.cli import verify_parity
from qalora_export.recipe import VerifySettings
from qalora_export.verify.gates.g3_shipped_path import COST
from qalora_export.verify.gates.registry import all_gates
from qalora_export.verify.metrics import EXACT, ORDINARY, TIE_MARGIN
from qalora_export.verify.rule import Gate, Limit

PACKAGE = Path(qalora_export.__file__).parent
DOCUMENTS = {"README.md": PACKAGE.parent / "README.md", "DESIGN.md": PACKAGE / "DESIGN.md"}
TIMES = round(EXACT / ORDINARY)
NUMBER = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?(?:e-\d+)?(?: %)?")


def rows(document: str) -> dict[str, str]:
    """Gate -> the bounds of its row, which are the last cell; "as G2 and G3" is what those say."""
    found: dict[str, str] = {}
    for line in DOCUMENTS[document].read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| (G\d+) .*\| ([^|]*) \|$", line):
            gate, cell = match.groups()
            if gate not in found:
                found[gate] = re.sub(r"\bG\d+\b", lambda other: found.get(other.group(), ""), cell)
    return found


def shown(limit: Limit) -> str:
    """As a reader sees it: shares of positions that may differ as the share that must agree."""
    if limit.figure.endswith("other_choices"):
        return f"{100 - 100 * limit.bound:g} %"
    return f"{limit.bound:g}".replace("e-0", "e-")


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("gate", all_gates().values(), ids=list(all_gates()))
def test_a_document_states_every_bound_and_no_other(gate: Gate, document: str) -> None:
    cell = rows(document)[gate.id]
    bounds = {shown(limit) for limit in gate.limits}
    said = set(NUMBER.findall(cell))
    assert said <= bounds | {"0"}, cell
    assert bounds - {"0"} <= said, cell


@pytest.mark.parametrize("document", DOCUMENTS)
def test_how_much_rounding_is_allowed_is_said_as_it_is(document: str) -> None:
    text = " ".join(DOCUMENTS[document].read_text(encoding="utf-8").split())
    assert f"{TIMES} times" in text


def test_help_and_defaults_are_the_limits() -> None:
    kl, other = (limit.bound for limit in COST)
    assert VerifySettings().max_kl == kl
    assert VerifySettings().min_top1 == pytest.approx(1 - other)
    options = inspect.getsource(verify_parity)
    assert f"nats ({kl:g})" in options and f"(default {1 - other:g})" in options


def test_reasons_beside_bounds_name_no_figure_beyond_them() -> None:
    """A reason that says "at most 3e-10" beside a bound of 1e-10 is of another time."""
    wrong = []
    for gate in all_gates().values():
        for limit in gate.limits:
            for figure in re.findall(r"at most (\d+(?:\.\d+)?e-\d+)", limit.reason):
                if float(figure) > limit.bound:
                    wrong.append(f"{gate.id} {limit.figure}: at most {figure}, bound {limit.bound:g}")
    assert not wrong


def test_a_tie_is_as_wide_as_its_comment_says() -> None:
    assert "2 · 6 · 3 · 3e-5 = 1e-3 nats" in (PACKAGE / "verify/metrics.py").read_text(encoding="utf-8")
    assert pytest.approx(2 * 6 * 3 * 3e-5, rel=0.1) == TIE_MARGIN
