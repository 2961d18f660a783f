"""How much memory there is: the machine's numbers, or a smaller limit of the control group that a container sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from qalora_export import memory

MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    9000 kB\nSwapTotal:       4000 kB\n"


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def test_the_machine_alone(group: Path) -> None:
    assert (memory.total_bytes(), memory.available_bytes()) == (20000 * 1024, 9000 * 1024)
    (group / "memory.max").write_text("max\n")  # a group without a limit
    assert (memory.total_bytes(), memory.available_bytes()) == (20000 * 1024, 9000 * 1024)


def test_a_control_group_holds_less(group: Path) -> None:
    (group / "memory.max").write_text("8000000\n")
    (group / "memory.current").write_text("5000000\n")
    (group / "memory.stat").write_text("anon 4000000\nfile 1000000\ninactive_file 600000\n")
    assert (memory.total_bytes(), memory.available_bytes()) == (8_000_000, 3_600_000)


def test_nobody_knows(group: Path) -> None:
    (group / "meminfo").unlink()
    assert (memory.total_bytes(), memory.available_bytes()) == (None, None)


def test_sizes_are_readable() -> None:
    assert [memory.bytes_text(count) for count in (0, 2000, 2**20, 3 * 2**29)] == [
        "0 KiB",
        "2 KiB",
        "1.0 MiB",
        "1.5 GiB",
    ]
