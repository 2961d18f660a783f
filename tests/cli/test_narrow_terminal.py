"""Every table fits 80 columns, however long names and paths are, and stays short however large the model is."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from qalora_export.cli import (
    doctor,
    export_gguf,
    export_onnx,
    inspect,
    merge,
    parity_table,
    quantize,
    train,
)
from qalora_export.console import console, results
from qalora_export.formats.export_report import ExportReport
from qalora_export.inspection.view import open_view
from qalora_export.qalora.merge import MergeReport
from qalora_export.quantization.report import ModuleReport, QuantizeReport
from tests.verify.report.test_parity_report import made

BOX = re.compile("[│┃┏┡└├┳╇┴]")
LONG = Path("/home/somebody/" + "a-folder-with-a-rather-long-name/" * 4 + "merged.qalora")
FILES = (LONG / "model.gguf", LONG / "model.gguf.manifest.json")
EXPORTED = ExportReport(FILES, {"Q4_1": 210, "BF16": 62}, 98_362_432, 10**9, 0, ("note",))
PREFIXES = ("model.layers", "model.language_model.text_decoder_with_a_long_name.transformer.layers")
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(autouse=True)
def eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 80)
    monkeypatch.setattr(results, "width", 80)


def table_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that belong to tables; each fits."""
    out, err = capsys.readouterr()
    lines = [line for line in (out + err).splitlines() if BOX.search(line)]
    assert lines
    for line in lines:
        assert cell_len(line) <= 80, line
    return lines


def modules(layers: int, prefix: str = "model.layers") -> tuple[ModuleReport, ...]:
    return tuple(
        ModuleReport(f"{prefix}.{n}.{kind}", (11008, 4096), 4, 128, True, 0.0123 + n / 1e6, 0.000123, 10**6, 0.5)
        for n in range(layers)
        for kind in KINDS
    )


@pytest.mark.parametrize("prefix", PREFIXES)
def test_quantize_is_a_row_per_kind_and_the_worst_few(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    quantize.print_report(QuantizeReport(LONG, "gptq", modules(80, prefix), 3, 65536, 1e4, 10**10, None))
    lines = table_lines(capsys)
    assert len(lines) < 40
    assert sum("q_proj" in line for line in lines) <= 1 + quantize.WORST
    assert any(re.search(r"│ down_proj +│ +80 │", line) for line in lines)


def test_the_worst_modules_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    quantize.print_report(QuantizeReport(LONG, "rtn", modules(9), 3, 0, 1.0, 10**9, None))
    assert any("model.layers.8.self_attn.q_proj" in line for line in table_lines(capsys))


def test_train_merge_and_export(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("activations kept for backward", 10**11)]
    memory = SimpleNamespace(trainable_parameters=10**9, adapted_modules=560, rows=lambda: rows, total=10**11)
    steps = SimpleNamespace(total=10**6, per_epoch=10**5, evaluate_every=10**4)
    plan = SimpleNamespace(
        memory=memory,
        samples=10**6,
        tokens=10**9,
        train=[0],
        steps=steps,
        dtype="torch.bfloat16",
        accounts={},
        untrained=tuple(f"{prefix}.{n}.{kind}" for prefix in PREFIXES for n in range(30) for kind in KINDS),
    )
    train._print_plan(plan, ("*",))  # type: ignore[arg-type]
    table_lines(capsys)
    console.print(merge._table(MergeReport(560, 560, "peft", 0, 0, 10**10, 10**10, 0, 10**10, 0)))
    table_lines(capsys)
    console.print(export_gguf._table(EXPORTED))
    table_lines(capsys)
    export_onnx._show(EXPORTED)
    table_lines(capsys)


def test_parity_with_three_runtimes_and_long_findings(capsys: pytest.CaptureFixture[str]) -> None:
    parity_table.print_report(made({("G1", "llama.cpp"): "fail", ("G4", "onnxruntime"): "not run"}))
    table_lines(capsys)


def test_summary_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"headline": 1.23456e-10, "measured": 2.0, "bound": 1.0, "figure": "x", "unit": "y"}
    gates = [
        {"gate": f"G{n}", "runtime": runtime, "status": "fail", "row": "a gate", "title": "t", **figures}
        for n in range(6)
        for runtime in ("llama.cpp", "onnxruntime", "onnxruntime-genai")
    ]
    results.print(parity_table.summary_table({"gates": gates}))
    table_lines(capsys)


def test_inspect_and_doctor(tiny_canonical: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect._print_view(open_view(tiny_canonical), facts=False)
    table_lines(capsys)
    try:
        doctor.command()
    except BaseException as ended:
        assert type(ended).__name__ == "Exit"  # 3, where a runtime is missing
    table_lines(capsys)
