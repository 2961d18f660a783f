"""What it costs to hold a stage's input against its manifest: sha256 of a large file, beside reading it.

    python -m tests.benchmarks.hash_inputs --work /tmp/hash-bench

One file of random bytes, 1 GiB by default, from memory (the page cache, where a file lies that a stage reads next) and
from the disk (pages given back first). Best of `--repeats`. "read" is the same loop of the same blocks without a hash.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qalora_export.safety import sha256_file
from tests.benchmarks.machine import RESULTS, machine

BLOCK = 1 << 18  # what hashlib.file_digest reads at a time


def main() -> None:
    options = _arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    found = {"benchmark": "hash_inputs", "machine": machine(), "bytes": options.bytes, "rows": {}}
    path = options.work / "input"
    try:
        _write_random(path, options.bytes)
        for place in ("memory", "disk"):
            for name, step in (("read", _read), ("sha256", sha256_file)):
                found["rows"][f"{name} from {place}"] = _measured(step, path, place, options)
    finally:
        path.unlink(missing_ok=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def table(found: dict[str, Any]) -> str:
    lines = ["| | GB/s | seconds per GB |", "|---|---:|---:|"]
    for name, row in found["rows"].items():
        lines.append(f"| {name} | {row['gb_per_second']:.2f} | {1 / row['gb_per_second']:.2f} |")
    return "\n".join(lines)


def _measured(step: Callable[[Path], object], path: Path, place: str, options: argparse.Namespace) -> dict[str, float]:
    seconds = []
    for _ in range(options.repeats):
        if place == "disk":
            _drop(path)
        else:
            _read(path)
        start = time.perf_counter()
        step(path)
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "gb_per_second": options.bytes / min(seconds) / 1e9}


def _read(path: Path) -> None:
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _drop(path: Path) -> None:
    """Give the file's pages back, so that the next read is of the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_random(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for start in range(0, size, 1 << 24):
            file.write(os.urandom(min(1 << 24, size - start)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/hash-bench"))
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a small file, once: does it still run?")
    parser.add_argument("--json", type=Path, default=RESULTS / "hash_inputs.json")
    options = parser.parse_args()
    if options.smoke:
        options.bytes, options.repeats = 1 << 20, 1
    return options


if __name__ == "__main__":
    main()
