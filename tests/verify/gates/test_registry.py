"""A gate is one file: registered once, it is measured, judged and shown everywhere."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from qalora_export.cli.parity_table import print_report, summary_table
from qalora_export.errors import ExitCode, RuntimeUnavailableError
from qalora_export.verify.gates import registry
from qalora_export.verify.gates.registry import all_gates, measures, registered
from qalora_export.verify.report.parity_report import ParityReport
from qalora_export.verify.rule import Entry, Gate, Limit
from qalora_export.verify.stage import verify_parity
from qalora_export.verify.target import Target
from tests.verify.exports import Exported
from tests.verify.fakes import FakeRuntimes

LIMIT = Limit("odd_bytes", 0, "bytes", "a test counts them")
GATE = Gate("G77", "throwaway", "one number against another", "bytes that a test finds odd", (LIMIT,))


@pytest.fixture
def odd_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A gate that measures the one number in the list."""
    registered()
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    measured = [0.0]

    @measures(GATE)
    def odd(target: Target) -> Entry:
        if measured[0] < 0:
            raise RuntimeUnavailableError("nobody counts", where="/a/path")
        return GATE.judge(target.name, {"odd_bytes": measured[0]}, detail="counted", where=["byte 5"])

    yield measured


def verified(exported: Exported, out: Path) -> ParityReport:
    fake = FakeRuntimes(exported.checkpoint)
    return verify_parity(exported.checkpoint, out, gguf=exported.gguf, launch=fake, taps=fake.taps, bisect=False)


@pytest.mark.parametrize(
    ("measured", "status", "code"),
    [
        (0.0, "pass", ExitCode.OK),
        (3.0, "fail", ExitCode.PARITY_FAILED),
        (-1.0, "not run", ExitCode.RUNTIME_UNAVAILABLE),
    ],
)
def test_a_new_gate_is_found_everywhere(
    measured: float,
    status: str,
    code: ExitCode,
    odd_bytes: list[float],
    exported: Exported,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd_bytes[0] = measured
    report = verified(exported, tmp_path / "report")
    assert report.exit_code == code
    print_report(report)
    assert "G77 throwaway" in capsys.readouterr().err
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    (entry,) = (entry for entry in written["gates"] if entry["gate"] == "G77")
    assert (entry["status"], entry["row"]) == (status, GATE.row)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "G77 throwaway" in page and (LIMIT.reason in page) == (status != "not run")
    suite = ElementTree.parse(tmp_path / "report" / "junit.xml").getroot()[0]
    assert "G77 throwaway" in [case.get("name") for case in suite]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary_table(written))
    row = next(line for line in console.export_text().splitlines() if GATE.row in line)
    assert ("not run" if measured < 0 else str(int(measured))) in row


def test_a_gate_without_a_row_title_or_reason_cannot_be() -> None:
    for missing in ({"row": ""}, {"title": ""}, {"what": ""}, {"limits": ()}):
        fields = {"id": "G78", "title": "t", "what": "w", "row": "r", "limits": (LIMIT,)} | missing
        with pytest.raises(ValueError, match="G78"):
            Gate(**fields)
    with pytest.raises(ValueError, match="without a unit or a reason"):
        Gate("G78", "t", "w", "r", (Limit("x", 0, "bytes", ""),))


def test_an_id_is_taken_once() -> None:
    gate = all_gates()["G2"]
    with pytest.raises(ValueError, match="two gates are called G2"):
        measures(gate)(lambda target: gate.not_run(target.name, ""))


def test_gates_are_in_the_order_of_their_numbers(odd_bytes: list[float]) -> None:
    numbers = [int(gate.removeprefix("G")) for gate in all_gates()]
    assert numbers == sorted(numbers)
    assert {*range(7), 77} <= set(numbers)


def test_each_gate_is_in_a_file_of_its_own() -> None:
    homes = {measured.gate.id: measured.measure.__module__ for measured in registered()}
    assert len(set(homes.values())) == len(homes)
    assert all(home.rpartition(".")[2].startswith(f"{gate.lower()}_") for gate, home in homes.items())


def test_the_summary_shows_the_headline_and_what_failed_instead() -> None:
    gate = all_gates()["G0"]
    figures = {limit.figure: 0 for limit in gate.limits} | {"broken_links": 2}
    entry = gate.judge("llama.cpp", figures, detail="")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary_table(ParityReport(Path("out"), [entry], [], {}).as_json()))
    assert "0, broken_links 2" in console.export_text()
