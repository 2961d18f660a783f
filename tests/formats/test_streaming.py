"""Blocks of rows: every row once, results in order, errors at once, mapped pages given back."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qalora_export.formats import contents, streaming
from qalora_export.formats.gguf import writer
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.formats.streaming import AHEAD, BlockHasher, HashedFile, prepared, release, row_blocks, synced
from qalora_export.recipe import GgufSettings
from qalora_export.safety import sha256_file


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


def test_what_is_left_lying_waits_for_no_thread() -> None:
    """The garbage collector may close it while a thread is being started: to join another one there never ends."""
    go = threading.Event()
    rescue = threading.Timer(60, go.set)  # so that a fault is a failure and no hang
    rescue.start()
    results = prepared(lambda item: item if not item else go.wait(), range(100))
    assert next(results) == 0
    results.close()
    assert not go.is_set()
    rescue.cancel()
    go.set()


def test_an_error_in_one_block_reaches_the_consumer() -> None:
    with pytest.raises(ZeroDivisionError):
        list(prepared(lambda item: 1 // (item - 5), range(50)))


def test_a_hashed_file_holds_the_bytes_and_is_sent_to_the_disk_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = threading.Event()
    monkeypatch.setattr(streaming, "SENT_BYTES", 1000)
    monkeypatch.setattr(streaming.os, "fsync", lambda _: sent.set())
    pieces = [bytes([number]) * 700 for number in range(3 * AHEAD)]
    with HashedFile(tmp_path / "a") as file:
        for place, piece in enumerate(pieces):
            assert file.tell() == 700 * place
            file.write(memoryview(piece) if place % 2 else piece)
            assert place < 1 or sent.wait(60)
    whole = b"".join(pieces)
    assert (tmp_path / "a").read_bytes() == whole
    assert file.sha256 == hashlib.sha256(whole).hexdigest()


def test_a_write_that_the_disk_lost_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(streaming, "SENT_BYTES", 10)
    monkeypatch.setattr(streaming.os, "fsync", lost)
    with pytest.raises(OSError, match="Input/output"), HashedFile(tmp_path / "a") as file:
        file.write(b"x" * 20)


def test_an_error_of_the_block_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), synced([tmp_path / "missing"]):
        raise ValueError("mine")
    with pytest.raises(FileNotFoundError), synced([tmp_path / "missing"]):
        pass


@pytest.mark.parametrize("layout", ["q4_1", "split", "onnx"])
def test_threads_write_the_bytes_that_one_thread_writes(
    layout: str, tiny_canonical: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file, manifest included, of an export by many threads in small blocks, and by one in whole tensors."""

    def export(folder: Path) -> dict[str, str]:
        if layout == "onnx":
            export_onnx(tiny_canonical, folder / "onnx")
        else:
            export_gguf(tiny_canonical, folder / "model.gguf", GgufSettings(layout=layout))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}

    def blocks(rows: int, nbytes: int, _: int = 0) -> Iterator[slice]:
        return row_blocks(rows, nbytes, 1000)

    with monkeypatch.context() as patch:
        for module in (streaming, writer, contents):
            patch.setattr(module, "row_blocks", blocks)
        threaded = export(tmp_path / "threads")
    with monkeypatch.context() as patch:
        for module in (writer, contents):
            patch.setattr(module, "prepared", map)
            patch.setattr(module, "row_blocks", lambda rows, *_: [slice(0, rows)])
        serial = export(tmp_path / "one")
    assert threaded == serial
    assert len(threaded) >= 2


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
    blocks = [rng.integers(0, 256, size, np.uint8) for size in (5, 0, 70_000) * AHEAD]
    with BlockHasher() as hasher:
        for block in blocks:
            hasher.update(block.data)
    assert hasher.sha256 == hashlib.sha256(b"".join(block.tobytes() for block in blocks)).hexdigest()
    with BlockHasher() as idle:
        pass
    assert idle.sha256 == hashlib.sha256().hexdigest()
