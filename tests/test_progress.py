"""Progress: silent for a library, a line a minute in a log, bars on a terminal."""

from __future__ import annotations

import io
import logging
import re
import threading
from collections.abc import Iterator

import pytest

from qalora_export import console as shown
from qalora_export import progress
from qalora_export.progress import Lines, duration, report_to, status, task, track


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Lines as often as the clock allows, instead of one a minute."""
    caplog.set_level(logging.INFO, logger="qalora_export")
    before = report_to(Lines(interval=0.001))
    yield caplog
    report_to(before)


def wait_for(caplog: pytest.LogCaptureFixture, pattern: str) -> None:
    ended = threading.Event()
    for _ in range(5000):
        if any(re.search(pattern, record.getMessage()) for record in caplog.records):
            return
        ended.wait(0.002)
    raise AssertionError(f"no line {pattern!r}: {[record.getMessage() for record in caplog.records]}")


def test_a_library_call_prints_nothing_and_starts_no_thread(capfd: pytest.CaptureFixture[str]) -> None:
    with status("outer"):
        assert list(track([1, 2, 3], "inner")) == [1, 2, 3]
        assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    assert capfd.readouterr() == ("", "")


def test_lines_tell_done_total_and_eta_while_one_item_takes_long(lines: pytest.LogCaptureFixture) -> None:
    for item in track(["a", "b", "c", "d"], "quantize"):
        if item == "a":
            wait_for(lines, r"^quantize: 0/4, \d+ s elapsed, ETA unknown$")
        if item == "c":
            wait_for(lines, r"^quantize: 2/4, \d+ s elapsed, ETA \d+ s$")


def test_lines_speak_of_the_innermost_task_and_end_with_it(lines: pytest.LogCaptureFixture) -> None:
    with status("reference"):
        with task("layers", total=10, done=4) as layers:
            layers.update(5, "loss 1.5")
            wait_for(lines, r"^layers: 5/10, .*, loss 1\.5$")
        lines.clear()
        wait_for(lines, r"^reference: \d+ s elapsed$")
    for thread in threading.enumerate():
        if thread.name == "progress":
            thread.join(10)
            assert not thread.is_alive()


def test_eta_counts_only_what_this_run_has_done() -> None:
    resumed = Lines().start("training", 100, done=90)
    assert resumed.line().endswith("ETA unknown")  # type: ignore[attr-defined]
    resumed.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (192, "3 min 12 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bars_nest_and_show_file_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = shown.SafeConsole(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(shown, "console", screen)
    before = report_to(shown.Bars())
    try:
        with status("llama.cpp: logits"):
            assert list(track(iter("abc"), "tokenizing [/b].jsonl\x1b]0;x", total=3)) == list("abc")
    finally:
        report_to(before)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "3/3" in text
    assert "[/b].jsonl\\x1b" in text
    assert "\x1b]0;x" not in text


def test_track_ends_its_task_when_the_loop_is_left() -> None:
    reporter = Lines()
    before = report_to(reporter)
    try:
        items = track([1, 2], "left")
        next(items)
        items.close()  # type: ignore[attr-defined]
        assert not reporter._open
    finally:
        report_to(before)
    assert progress._reporter is before
