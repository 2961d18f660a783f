"""Planted faults: each turns verify-parity red and is named; an undamaged line is green, so red means something."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from qalora_runtimes.taps import run_taps

from qalora_export.errors import ExitCode
from qalora_export.recipe import VerifySettings
from qalora_export.verify.report.parity_report import ParityReport
from qalora_export.verify.stage import verify_parity
from tests.conftest import MadeOnce
from tests.faults import off_by_one
from tests.faults import runtime as faulty
from tests.faults.cases import CASES, FAULTS, KIND, LLAMA, ORT, Fault
from tests.faults.line import Line, line_in, make_line
from tests.faults.table import markdown
from tests.warm_runners import WarmRunners

pytestmark = pytest.mark.usefixtures("warm_runners")
# Every kind of damage that must never pass.
REQUIRED = (
    "nibble order",
    "offset sign",
    "scales transposed",
    "groups shifted by one",
    "one code ±1 in one tensor",
    "RoPE permutation missing",
    "pool mean merged as sum",
    "wrong alpha",
    "wrong rank",
    "lm_head quantized",
    "norm epsilon 1e-6 for 1e-5",
    "RoPE base 20,000 for 10,000",
    "BOS missing",
    "one merge rule of the tokenizer lost",
    "chat template altered",
    "NaN in one offset",
    "KV cache off by one",
    "adapter of another base",
)


@pytest.fixture(scope="module")
def line(made_once: MadeOnce) -> Line:
    return line_in(made_once("line", make_line))


def verify(line: Line, runtime: str, out: Path, taps: Any = run_taps) -> ParityReport:
    # The edge cases and no random sequences after them: no fault here is rare.
    settings = VerifySettings(runtimes=(runtime,), threads=1, sequences=16).model_copy(update={"positions": 1})
    artifact = {"gguf": line.gguf} if KIND[runtime] == "gguf" else {"onnx": line.onnx}
    return verify_parity(line.merged, out, settings, base=line.base, taps=taps, **artifact)


@pytest.mark.pictures
@pytest.mark.parametrize("runtime", KIND)
def test_the_undamaged_line_is_green(runtime: str, line: Line, tmp_path: Path) -> None:
    report = verify(line, runtime, tmp_path / "report")
    assert report.exit_code == ExitCode.OK
    assert not report.bisections
    assert "merge recomputed from base and adapter in 4 modules" in report.entries[0].detail


@pytest.mark.parametrize(("fault", "runtime"), CASES, ids=[f"{f.name}, {r}" for f, r in CASES])
def test_a_planted_fault_is_red_and_named(
    fault: Fault, runtime: str, line: Line, warm_runners: WarmRunners, tmp_path: Path
) -> None:
    damaged = fault.plant[runtime](line, tmp_path)
    scaled = fault.name == faulty.SCALED_KERNEL
    if fault.runtime_fault and not scaled:
        warm_runners.prepare = (off_by_one.__name__, runtime)
    with fault.context() if fault.context else nullcontext():
        report = verify(damaged, runtime, tmp_path / "report", taps=faulty.scaled_taps if scaled else run_taps)
    statuses = {entry.gate: entry.status for entry in report.entries}
    assert report.exit_code == ExitCode.PARITY_FAILED
    assert {gate for gate in fault.gates if statuses[gate] == "fail"} == set(fault.gates), statuses
    assert {gate for gate in fault.blind.split() if statuses[gate] == "pass"} == set(fault.blind.split()), statuses
    first = next(entry for entry in report.entries if entry.gate == fault.gates[0])
    assert any(fault.place_for(runtime) in place for place in first.where), first.where
    if fault.bisect:
        assert_bisected(report, runtime, fault.bisect, tmp_path / "report")


def assert_bisected(report: ParityReport, runtime: str, tensor: str, folder: Path) -> None:
    """The finding is in the report, in front of the failed gate's places, and plotted."""
    written = json.loads((folder / "report.json").read_text())["bisect"][runtime]
    assert written["first_tensor"] == tensor
    assert tensor.startswith(written["first_layer"])
    failed = next(entry for entry in report.entries if entry.gate == "G2")
    assert f"first diverges at {tensor} " in failed.where[0]
    plot = (folder / f"bisect-{runtime}.svg").read_text()
    assert tensor in plot


def test_every_required_fault_is_planted_and_for_both_formats_where_it_exists() -> None:
    names = {fault.name for fault in FAULTS}
    assert set(REQUIRED) <= names
    assert all(runtime in KIND for _, runtime in CASES)
    only = {fault.name for fault in FAULTS if not {LLAMA, ORT} <= set(fault.plant)}
    assert only == {
        "RoPE permutation missing",
        "RoPE permutation missing, read back with the same fault",
        "RoPE pairs interleaved",
    }


def test_the_table_has_one_row_per_fault() -> None:
    lines = markdown().splitlines()
    assert len(lines) == 2 + len(FAULTS)
    assert all(line.count("|") == 5 for line in lines)
