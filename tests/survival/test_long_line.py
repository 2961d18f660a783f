"""A JSONL line of 50 MB. Given to the tokenizers library as it is, it ends the whole process by SIGABRT: some 200 bytes
of memory a character, and Rust has no exception for memory that is refused. What bounds it here: a line above
lines.MAX_LINE_BYTES is refused before it is parsed, longer texts are tokenized in pieces of lines.PIECE characters.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from qalora_export.data.lines import MAX_LINE_BYTES, PIECE

SIZE = 50_000_000
LIMITED = """
import resource, sys
from pathlib import Path
from qalora_export.models.loading import load_tokenizer
from qalora_export.data.samples import load_samples

def limit():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), hard))

"""
UNBOUNDED = """
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
text = "the lamp " * (int(sys.argv[2]) // 9)
limit()
tokenizer.encode(text)
"""
BOUNDED = """
tokenizer = load_tokenizer(sys.argv[1])
limit()
try:
    print(len(load_samples(Path(sys.argv[2]), tokenizer, sequence_length=128).samples))
except Exception as error:
    print(type(error).__name__, error)
"""


def python(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED + code, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"RUST_BACKTRACE": "0"}
    )


def test_the_library_call_itself_aborts(tiny_model: Path) -> None:
    done = python(UNBOUNDED, tiny_model, SIZE)
    assert done.returncode == -signal.SIGABRT, done.stderr[-500:]
    assert "memory allocation" in done.stderr


def test_the_same_line_in_a_data_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "the lamp " * (SIZE // 9)}) + "\n")
    done = python(BOUNDED, tiny_model, tmp_path / "data.jsonl")
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith("UnsafeInputError a line of 50,000,")


def test_a_longer_text_than_a_piece_is_read(tiny_model: Path, tmp_path: Path) -> None:
    assert MAX_LINE_BYTES > 8 * PIECE
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "the lamp " * (8 * PIECE // 9)}) + "\n")
    done = python(BOUNDED, tiny_model, tmp_path / "data.jsonl")
    assert done.returncode == 0 and int(done.stdout) > 1000, done.stderr[-500:]
