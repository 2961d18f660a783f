"""Verbs on a real terminal of 80 columns: tables and bars fit, nothing but style steers it, the cursor comes back."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.cells import cell_len

from tests.cli import several
from tests.cli.several import ENDED, joined
from tests.conftest import ROOT
from tests.qalora.adapters import own_adapter

COLUMNS = 80
TABLE_OR_BAR = re.compile("[│┃┏┡└├┳╇┴━]")
STYLE = re.compile(r"\x1b\[[0-9;]*m")
CURSOR = re.compile(r"\x1b\[(?:\?25[lh]|[0-9]*[AK])")  # hide, show, up, erase: what a progress bar needs


def on_a_terminal(*commands: tuple[object, ...]) -> list[tuple[str, str]]:
    """Exit code of each command, and everything that it says to its terminal; one interpreter runs them all."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", several.__name__, *joined([list(map(str, words)) for words in commands])],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=environment | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    assert process.wait() == 0, said
    parts = re.split(f"{ENDED}(.+?)\r\n", said.decode("utf-8"))
    return list(zip(parts[1::2], parts[::2], strict=False))


@pytest.mark.slow
def test_a_line_of_commands(tiny_model: Path, tiny_canonical: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a folder with a long name that no table has room for, however it is broken"
    folder.mkdir()
    data = folder / "data.jsonl"
    turns = '[{"role": "user", "content": "on"}, {"role": "assistant", "content": "done"}]'
    data.write_text(f'{{"messages": {turns}}}\n', encoding="utf-8")
    base, adapter = folder / "base.qalora", folder / "adapter"
    shutil.copytree(tiny_canonical, base)
    own_adapter(base, adapter)
    commands: tuple[tuple[object, ...], ...] = (
        ("quantize", tiny_model, "--out", folder / "new.qalora", "--method", "rtn"),
        ("train", base, "--data", data, "--out", folder / "trained", "--max-steps", 1, "--rank", 2),
        ("merge", base, adapter, "--out", folder / "merged.qalora"),
        ("export", "gguf", base, "--out", folder / "model.gguf"),
        ("evaluate", base, "--data", data, "--max-new-tokens", 2),
        ("inspect", folder / "model.gguf", base),
    )
    for command, (code, said) in zip(commands, on_a_terminal(*commands), strict=True):
        assert code == "0", said
        assert said.count("\x1b[?25l") == said.count("\x1b[?25h"), f"{command[0]} leaves the cursor hidden"
        plain = CURSOR.sub("", STYLE.sub("", said))
        assert not [c for c in plain if not c.isprintable() and c not in "\r\n"], command
        drawn = [line for line in re.split(r"[\r\n]+", plain) if TABLE_OR_BAR.search(line)]
        assert drawn, said
        assert all(cell_len(line) <= COLUMNS for line in drawn), drawn
