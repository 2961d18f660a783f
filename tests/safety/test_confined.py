"""A call in a confined process: the same answer, and an end to what does not end by itself."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from qalora_export.safety.confined import LARGEST, Confined, ConfinedTogether, FailedError, OutOfBoundsError
from qalora_export.safety.lock import single_writer


def echo(*arguments: Any, **options: Any) -> Any:
    return [*arguments, options]


def test_arguments_and_answer_cross_as_they_are() -> None:
    call = Confined(echo)
    assert call("é\n\ud800", 1.5, [None, {"a": True}], key="x" * 200_000) == [
        "é\n\ud800",
        1.5,
        [None, {"a": True}],
        {"key": "x" * 200_000},
    ]
    assert call() == [{}]


def test_an_exception_comes_back_by_name_and_text_and_the_process_goes_on() -> None:
    def divide(by: int) -> float:
        return 1 / by

    call = Confined(divide)
    with pytest.raises(FailedError, match="ZeroDivisionError: division by zero"):
        call(0)
    assert call(2) == 0.5


def evaluate(expression: str) -> Any:
    value = eval(expression)
    return value if isinstance(value, str) else repr(value)[:9]


NEVER = 600.0  # seconds: where something else than time is to end the call, on however slow a machine


@pytest.mark.parametrize(
    ("expression", "seconds", "reason"),
    [
        ("[None for _ in iter(int, 1)]", NEVER, "more memory"),
        ("any(iter(int, 1))", 0.6, "it took more than"),
        ("[10 ** (10 ** 9)]", 0.6, "it took more than"),  # one call in C, deaf to any alarm of Python's
        ("'a' * 10 ** 10", NEVER, "more memory"),
        ("'a' * (70 * 2 ** 20)", NEVER, "its answer has"),
        ("__import__('re').match('(a+)+$', 'a' * 60 + 'b')", 0.6, "it took more than"),
        ("__import__('os').kill(__import__('os').getpid(), 9)", NEVER, "SIGKILL"),
    ],
)
def test_every_way_not_to_end_is_ended(expression: str, seconds: float, reason: str) -> None:
    call = Confined(evaluate, seconds=seconds, memory=4 * LARGEST)
    with pytest.raises(OutOfBoundsError, match=reason):
        call(expression)
    assert call("str(1 + 1)") == "2"  # in a new process where the old one is gone


def test_several_functions_share_a_process_until_one_of_them_breaks_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qalora_export.safety.confined.SECONDS", 0.2)
    together = ConfinedTogether()
    pid, joined = together.add(os.getpid), together.add(lambda *parts, by: by.join(parts))
    first = pid()
    assert joined("a", "b", by="-") == "a-b" and pid() == first != os.getpid()
    forever = together.add(lambda: any(iter(int, 1)))  # the process that runs does not know it
    second = pid()
    assert second != first and not Path(f"/proc/{first}").exists()
    with pytest.raises(OutOfBoundsError, match="took more than"):
        forever()
    assert joined("a", by="") == "a" and pid() not in (first, second)
    with pytest.raises(FailedError, match="TypeError"):
        joined(1, by="")
    third = pid()
    together.close()
    assert not Path(f"/proc/{third}").exists() and pid() != third


def test_the_process_ends_with_its_object() -> None:
    call = Confined(os.getpid)
    pid = call()
    assert Path(f"/proc/{pid}").exists()
    del call
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()


def test_the_process_ends_with_the_one_that_made_it() -> None:
    reading, writing = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.write(writing, str(Confined(os.getpid)()).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(middle, 0)
    pid = int(os.read(reading, 20))
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists() or ") Z" in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("it lives on")


def test_the_process_holds_nothing_that_its_parent_opened(tmp_path: Path) -> None:
    """A copy of a pipe's writing end would keep its reader waiting, and one of a lock's file the lock."""
    reading, writing = os.pipe()
    with single_writer(tmp_path / "out"):
        confined = Confined(lambda: sorted(map(int, os.listdir("/dev/fd"))))
        assert len(confined()) <= 6  # standard streams, the two pipes and the listing itself
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)
    with single_writer(tmp_path / "out"):
        confined.close()
