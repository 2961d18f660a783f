"""Blocks of rows: every row once, results in order, errors at once, mapped pages given back."""

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from qalora_export.formats.streaming import AHEAD, BlockHasher, finished, prepared, release, row_blocks


@pytest.mark.parametrize("rows, nbytes, block", [(1, 10, 1), (7, 700, 200), (5, 5, 100), (100, 10_000, 333), (3, 0, 9)])
def test_row_blocks_cover_every_row_once(rows: int, nbytes: int, block: int) -> None:
    covered = [row for rows_ in row_blocks(rows, nbytes, block) for row in range(rows)[rows_]]
    assert covered == list(range(rows))


def test_prepared_keeps_the_order_and_does_not_run_far_ahead() -> None:
    begun: list[int] = []
    gate = threading.Lock()

    def work(item: int) -> int:
        with gate:
            begun.append(item)
        return item * item

    results = prepared(work, iter(range(100)))
    assert next(results) == 0
    assert len(begun) <= AHEAD
    assert [0, *results] == [item * item for item in range(100)]


def test_an_error_in_one_block_reaches_the_consumer() -> None:
    with pytest.raises(ZeroDivisionError):
        list(prepared(lambda item: 1 // (item - 5), range(50)))


def test_finished_hashes_while_the_block_runs(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    with finished({"final": tmp_path / "a"}) as digests:
        assert not digests
    assert digests == {"final": hashlib.sha256(b"x" * 1000).hexdigest()}


def test_an_error_of_the_block_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), finished({"missing": tmp_path / "missing"}):
        raise ValueError("mine")
    with pytest.raises(FileNotFoundError), finished({"missing": tmp_path / "missing"}):
        pass


def test_released_pages_leave_memory_and_stay_readable(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(range(256)) * (1 << 18))  # 64 MiB
    array = np.memmap(tmp_path / "big", dtype=np.uint8, mode="r")
    total = int(array.sum(dtype=np.int64))
    before = _resident_file_bytes()
    release(array[5:].view(np.int8))
    assert before - _resident_file_bytes() > 32 << 20
    assert int(array.sum(dtype=np.int64)) == total
    release(np.zeros(3))  # not mapped: nothing happens


def _resident_file_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def test_digests_are_those_of_hashlib() -> None:
    rng = np.random.default_rng(0)
    tensors = [[rng.integers(0, 256, size, np.uint8) for size in (5, 0, 70_000)] for _ in range(3 * AHEAD)]
    with BlockHasher() as hasher:
        answers = []
        for blocks in tensors:
            for block in blocks:
                hasher.update(block)
            answers.append(hasher.finish())
    expected = [hashlib.sha256(b"".join(block.tobytes() for block in blocks)).hexdigest() for blocks in tensors]
    assert [answer.result() for answer in answers] == expected


def test_a_tensor_without_blocks_has_the_empty_digest() -> None:
    with BlockHasher() as hasher:
        assert hasher.finish().result() == hashlib.sha256().hexdigest()
