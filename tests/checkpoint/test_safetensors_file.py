"""The reader against the safetensors package, and against files that lie."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qalora_export.checkpoint.safetensors_file import map_tensor, read_header
from qalora_export.errors import QaloraError, UnsafeInputError
from qalora_export.grid import differing
from tests.checkpoint.files import entry, raw_file

DTYPES = [
    np.float64,
    np.float32,
    np.float16,
    np.int64,
    np.int32,
    np.int16,
    np.int8,
    np.uint64,
    np.uint32,
    np.uint16,
    np.uint8,
    np.bool_,
]


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {str(np.dtype(d)): rng.integers(0, 2, (3, 5)).astype(d) for d in DTYPES}
    tensors |= {"scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.float16)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "m.safetensors")
    assert set(header) == set(tensors)
    for name, expected in tensors.items():
        found = map_tensor(tmp_path / "m.safetensors", header[name])
        assert found.shape == expected.shape
        assert differing(np.asarray(found), expected) == 0


def test_reads_bfloat16(tmp_path: Path) -> None:
    values = np.arange(8, dtype=np.float32).astype(ml_dtypes.bfloat16)
    path = raw_file(tmp_path / "m", {"w": entry("BF16", [2, 4], 0, 16)}, values.tobytes())
    found = map_tensor(path, read_header(path)["w"])
    assert differing(np.asarray(found), values.reshape(2, 4)) == 0


def test_mapped_tensors_are_read_only(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "m", {"w": entry("U8", [4], 0, 4)}, b"abcd")
    with pytest.raises(ValueError, match="read-only"):
        map_tensor(path, read_header(path)["w"])[0] = 1


W = {"w": entry("U8", [4], 0, 4)}
LYING = {
    "empty file": (lambda p: p.write_bytes(b""), "header claims"),
    "seven bytes": (lambda p: p.write_bytes(b"\1" * 7), "header claims"),
    "header longer than the file": (lambda p: raw_file(p, W, b"abcd", length=10**6), "header claims"),
    "header of 2^63 bytes": (lambda p: raw_file(p, W, b"abcd", length=2**63), "header claims"),
    "header of zero bytes": (lambda p: raw_file(p, b""), "header claims"),
    "header is a list": (lambda p: raw_file(p, [1, 2]), "not a JSON object"),
    "truncated data": (lambda p: raw_file(p, W, b"abc"), "its tensors end"),
    "padded data": (lambda p: raw_file(p, W, b"abcde"), "its tensors end"),
    "hole at the start": (lambda p: raw_file(p, {"w": entry("U8", [4], 4, 8)}, b"abcdefgh"), "overlap or leave a hole"),
    "hole between": (
        lambda p: raw_file(p, {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, b"abcde"),
        "overlap or leave a hole",
    ),
    "overlap": (
        lambda p: raw_file(p, {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, b"abcdef"),
        "overlap or leave a hole",
    ),
    "same bytes twice": (
        lambda p: raw_file(p, {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, b"abcd"),
        "overlap or leave a hole",
    ),
    "size disagrees with shape": (lambda p: raw_file(p, {"w": entry("F32", [4], 0, 4)}, b"abcd"), "disagrees"),
    "absurd shape": (lambda p: raw_file(p, {"w": entry("U8", [2**61, 2**61], 0, 4)}, b"abcd"), "disagrees"),
    "shape beyond 2^62": (lambda p: raw_file(p, {"w": entry("U8", [2**70], 0, 4)}, b"abcd"), "not sane"),
    "negative shape": (lambda p: raw_file(p, {"w": entry("U8", [-1, -4], 0, 4)}, b"abcd"), "not sane"),
    "fractional shape": (lambda p: raw_file(p, {"w": entry("U8", [4.0], 0, 4)}, b"abcd"), "not sane"),
    "boolean shape": (lambda p: raw_file(p, {"w": entry("U8", [True], 0, 1)}, b"a"), "not sane"),
    "offsets the wrong way round": (lambda p: raw_file(p, {"w": entry("U8", [4], 4, 0)}, b"abcd"), "disagrees"),
    "three offsets": (lambda p: raw_file(p, {"w": W["w"] | {"data_offsets": [0, 2, 4]}}, b"abcd"), "not sane"),
    "unknown dtype": (lambda p: raw_file(p, {"w": entry("F7", [4], 0, 4)}, b"abcd"), "malformed"),
    "missing field": (lambda p: raw_file(p, {"w": {"dtype": "U8", "shape": [4]}}, b"abcd"), "malformed"),
    "extra field": (lambda p: raw_file(p, {"w": W["w"] | {"path": "/etc"}}, b"abcd"), "malformed"),
    "the same name twice": (
        lambda p: raw_file(
            p,
            b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
            b"abcd",
        ),
        "repeats a key",
    ),
    "deep JSON": (lambda p: raw_file(p, b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nests too deeply"),
}


@pytest.mark.parametrize("case", LYING)
def test_refuses_files_that_lie(tmp_path: Path, case: str) -> None:
    make, reason = LYING[case]
    make(tmp_path / "m.safetensors")
    with pytest.raises(UnsafeInputError, match=reason):
        read_header(tmp_path / "m.safetensors")


def test_dtype_that_is_no_text_is_malformed(tmp_path: Path) -> None:
    raw_file(tmp_path / "m", {"w": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}}, b"abcd")
    with pytest.raises(UnsafeInputError, match="malformed"):
        read_header(tmp_path / "m")


def test_header_size_is_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qalora_export.checkpoint import safetensors_file

    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", 16)
    with pytest.raises(UnsafeInputError, match="header claims"):
        read_header(raw_file(tmp_path / "m", W, b"abcd"))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_refused_or_read_within_the_file(tmp_path: Path, data: st.DataObject) -> None:
    """Flip, cut or insert bytes anywhere: one of our errors, or tensors that lie inside the file."""
    good = raw_file(
        tmp_path / "good",
        {"__metadata__": {"format": "pt"}, "a": entry("F16", [2, 3], 0, 12), "b": entry("U8", [5], 12, 17)},
        bytes(range(17)),
    ).read_bytes()
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(("set", "cut", "insert"))):
            case "set":
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 8))]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        if not raw:
            raw = bytearray(b"\0")
    path = tmp_path / "bad"
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except QaloraError:
        return
    for tensor in header.values():
        assert tensor.begin + tensor.nbytes <= len(raw)
        np.asarray(map_tensor(path, tensor)).sum(dtype=np.float64)
