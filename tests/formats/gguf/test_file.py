"""Our reader of GGUF files against gguf.GGUFReader, and on files made to take its time or its memory."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from qalora_export.errors import UnsafeInputError
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.validate import ARRAY, STRING
from qalora_export.grid import differing
from qalora_export.inspection.view import open_view
from qalora_export.recipe import GgufSettings
from tests.formats.gguf.test_validate import gguf, info, key, text

MEGABYTES = 4 * 2**20


def check_against_the_gguf_package(path: Path) -> None:
    ours, theirs = GgufFile(path), GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, field in fields.items():
        assert ours.metadata[name] == field.contents(), name
        assert [ours.fields[name].kind, ours.fields[name].item] == [*field.types, None][:2]
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.kind, found.shape) == (tensor.tensor_type.name, tuple(tensor.shape[::-1].tolist()))
        assert differing(found.rows.reshape(-1), np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8)) == 0


@pytest.mark.parametrize("layout", ["q4_1", "split"])
def test_what_it_reads_is_what_the_gguf_package_reads(tiny_canonical: Path, tmp_path: Path, layout: str) -> None:
    export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings(layout=layout))
    for path in tmp_path.glob("*.gguf"):
        check_against_the_gguf_package(path)


def test_values_of_every_type_are_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "f", "llama")
    for kind, value in (
        ("uint8", 200),
        ("int8", -3),
        ("uint16", 60000),
        ("int16", -9),
        ("uint32", 2**31),
        ("int32", -1),
    ):
        getattr(writer, f"add_{kind}")(kind, value)
    for kind, value in (("float32", 0.1), ("float64", 0.1), ("uint64", 2**63), ("int64", -5)):
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_bool("yes", True)
    writer.add_string("text", "é 東")
    for name, values in (
        ("floats", [1.5, 2.5]),
        ("numbers", [1, -2]),
        ("flags", [True, False]),
        ("words", ["a", "", "東"]),
    ):
        writer.add_array(name, values)
    writer.add_tensor("t", np.arange(15, dtype=np.float32).reshape(3, 5))
    writer.add_tensor("u", np.ones((2, 3, 7), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_against_the_gguf_package(tmp_path / "f")
    np.testing.assert_array_equal(GgufFile(tmp_path / "f").tensors["t"].values, np.arange(15).reshape(3, 5))


def test_a_tensor_of_blocks_has_no_plain_values(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(gguf([], [info("t", kind=2)], 32))
    with pytest.raises(UnsafeInputError, match="found Q4_0"):
        _ = GgufFile(tmp_path / "f").tensors["t"].values


def array(item: int, count: int, payload: bytes) -> bytes:
    return key("a", ARRAY, struct.pack("<IQ", item, count) + payload)


HUGE = {
    "bytes": array(0, MEGABYTES, bytes(MEGABYTES)),
    "booleans": array(7, MEGABYTES, bytes(MEGABYTES)),
    "floats": array(6, MEGABYTES // 4, os.urandom(MEGABYTES)),
    "empty strings": array(STRING, MEGABYTES // 8, bytes(MEGABYTES)),
    "short strings": array(STRING, MEGABYTES // 11, text("€") * (MEGABYTES // 11)),
    "one string": key("a", STRING, text("x\n" * (MEGABYTES // 2))),
}


@pytest.mark.parametrize("kind", HUGE)
def test_megabytes_of_metadata_are_answered_at_once(tmp_path: Path, kind: str) -> None:
    """gguf.GGUFReader takes minutes and gigabytes for some of these; here a hang would be the suite's time-out."""
    needed = [("general.architecture", STRING, text("llama"))]
    needed += [(f"llama.{name}", 4, struct.pack("<I", 1)) for name in ("block_count", "attention.head_count")]
    (tmp_path / "f.gguf").write_bytes(gguf([*(key(*entry) for entry in needed), HUGE[kind]], []))
    assert len(open_view(tmp_path / "f.gguf").facts["a"]) <= 80


def test_numbers_are_taken_in_one_step_and_made_objects_only_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(gguf([HUGE["bytes"]], []))
    assert isinstance(GgufFile(tmp_path / "f").fields["a"].stored, np.ndarray)
