"""Every stage says how far it is: a counted task that comes to its end, and an ETA in each line of a log."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from qalora_export import progress
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.qalora.merge import merge
from qalora_export.qalora.training.stage import train
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import QuantizeSettings, TrainSettings, VerifySettings
from qalora_export.verify.gates.registry import registered
from qalora_export.verify.report import plots
from qalora_export.verify.stage import verify_parity
from tests.data.files import write
from tests.models import TEXT
from tests.progress_record import Recorded, recorded
from tests.verify.exports import Exported
from tests.verify.fakes import FakeRuntimes

MODULES = 14  # of the tiny model


def ended(tasks: list[Recorded], description: str) -> Recorded:
    """The counted task of that name, which came to its end."""
    found = [task for task in tasks if task.description.startswith(description)]
    assert found, [task.description for task in tasks]
    assert found[0].total and found[0].done == found[0].total and found[0].closed, found[0]
    return found[0]


def test_quantize_train_merge_and_exports(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    data = str(write(tmp_path / "data.jsonl", *[{"prompt": f"turn on {n}", "completion": "on"} for n in range(6)]))
    settings = TrainSettings(data=data, validation=data, rank=2, max_steps=3, batch_size=2, sequence_length=64)
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    with recorded() as tasks:
        quantize(tiny_model, base, QuantizeSettings(calibration=str(tmp_path / "text.txt"), calibration_samples=2))
        assert ended(tasks, "quantize (gptq)").total == MODULES
        ended(tasks, "copy what is not quantized")
    with recorded() as tasks:
        train(base, adapter, settings)
        assert ended(tasks, "tokenizing data.jsonl").total == 6
        shown = ended(tasks, "training")
        assert shown.total == 3 and shown.updates >= 3
        assert ended(tasks, "validation, batches").total == 3
        assert any("validation loss" in detail for detail in shown.details)
    with recorded() as tasks:
        merge(base, adapter, merged)
        assert ended(tasks, "merge").total == MODULES
        ended(tasks, "read back")
        assert any(task.description.startswith("comparing the logits") and task.closed for task in tasks)
    with recorded() as tasks:
        export_gguf(merged, tmp_path / "m.gguf")
        ended(tasks, "write")
        assert ended(tasks, "read back").total == MODULES
    with recorded() as tasks:
        quantize(tmp_path / "m.gguf", tmp_path / "again", QuantizeSettings(method="rtn"))
        assert ended(tasks, "quantize (import-gguf)").total == MODULES
    with recorded() as tasks:
        export_onnx(merged, tmp_path / "onnx")
        ended(tasks, "export onnx")
        assert ended(tasks, "read back").total == MODULES


def test_verify_parity_counts_its_gates_around_everything_else(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("error_by_position", "kl_histogram", "agreement"):
        monkeypatch.setattr(plots, name, lambda *_: "data:image/png;base64,")
    settings, fake = VerifySettings(threads=1, runtimes=("onnxruntime",)), FakeRuntimes(exported.checkpoint)
    with recorded() as tasks:
        verify_parity(exported.checkpoint, tmp_path / "report", settings, onnx=exported.onnx, launch=fake, cache=False)
    assert ended(tasks, "verify-parity, gates").total == len(registered())
    assert ended(tasks, "base.qalora in PyTorch, layers").total == 2
    runs = [task.description for task in tasks if task.description.startswith("onnxruntime: ")]
    assert {"onnxruntime: exact", "onnxruntime: shipped", "onnxruntime: bytes"} <= set(runs)


class Clock:
    """time.monotonic that a test moves on."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_line_in_a_log_tells_how_far_the_whole_and_the_part_are(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    lines = progress.Lines(interval=1e9)
    before = progress.report_to(lines)
    try:
        gates = progress.track(range(6), "verify-parity, gates")
        assert next(gates) == 0
        assert lines.line() == "verify-parity, gates: 0/6, 0 s elapsed, ETA unknown"
        clock.now = 60.0
        assert next(gates) == 1
        with progress.status("llama.cpp: exact path"), progress.task("llama.cpp: exact", 1000) as run:
            clock.now = 90.0
            run.update(250)
            assert lines.line() == (
                "verify-parity, gates 1/6, ETA 7 min 30 s · llama.cpp: exact: 250/1000, 30 s elapsed, ETA 1 min 30 s"
            )
        gates.close()  # type: ignore[attr-defined]
        assert lines.line() == ""
    finally:
        progress.report_to(before)


def test_without_a_terminal_a_line_a_minute_goes_to_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread's own clock is the event it waits for: here every wait is over at once, as often as asked."""
    caplog.set_level(logging.INFO, logger="qalora_export")
    waited = list[float]()

    class Minutes:
        def __init__(self) -> None:
            self.ended = False

        def wait(self, seconds: float) -> bool:
            waited.append(seconds)
            return len(waited) > 3

        def set(self) -> None:
            self.ended = True

    lines: Any = progress.Lines()
    monkeypatch.setattr(progress.threading, "Thread", lambda **_: type("Now", (), {"start": lambda self: None})())
    opened = lines.start("training", 400, 0)
    opened.update(100, "loss 1.5")
    lines._beat(Minutes())
    opened.close()
    assert waited == [60.0] * 4
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and all(text.startswith("training: 100/400, ") and "ETA" in text for text in said)
