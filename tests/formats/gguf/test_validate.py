"""The header validator refuses every lie before a reader allocates for it."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora_export.errors import InputError, QaloraError, UnsafeInputError
from qalora_export.formats.gguf.read import read_back
from qalora_export.formats.gguf.validate import read_header
from tests.verify.exports import Exported


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def info(name: str, dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(
    keys: list[bytes],
    tensors: list[bytes],
    data: int = 0,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    count, key_count = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, count, key_count) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


GOOD = gguf([key("a", 4, struct.pack("<I", 1)), key("b", 8, text("x"))], [info("t"), info("u", offset=128)], 256)
U32 = struct.pack("<I", 1)
FAULTS = {
    "magic": (gguf([], [], magic=b"GGML"), "magic"),
    "version": (gguf([], [], version=9), "version 9"),
    "tensor count": (gguf([], [], counts=(2**60, 0)), "claims"),
    "key count": (gguf([], [], counts=(0, 2**60)), "claims"),
    "key twice": (gguf([key("a", 4, U32)] * 2, []), "repeated"),
    "key without name": (gguf([key("", 4, U32)], []), "empty"),
    "type unknown": (gguf([key("a", 99, U32)], []), "unknown type"),
    "boolean 7": (gguf([key("a", 7, b"\x07")], []), "boolean"),
    "string longer than the file": (gguf([text("a") + struct.pack("<IQ", 8, 2**40)], []), "string"),
    "array longer than the file": (gguf([text("a") + struct.pack("<IIQ", 9, 4, 2**60)], []), "claims"),
    "strings more than the file": (gguf([text("a") + struct.pack("<IIQ", 9, 8, 2**50)], []), "claims"),
    "array of arrays": (gguf([text("a") + struct.pack("<IIQ", 9, 9, 1)], []), "unknown type 9"),
    "too many keys": (gguf([key(f"k{i}", 0, b"x") for i in range(2**14 + 1)], []), "16385 keys"),
    "too many tensors": (gguf([], [info("t")] * (2**16 + 1)), "65537 tensors"),
    "array of booleans 7": (gguf([key("a", 9, struct.pack("<IQ", 7, 2) + b"\x01\x07")], []), "boolean with value 7"),
    "alignment of a gigabyte": (gguf([key("general.alignment", 4, struct.pack("<I", 2**30))], []), "power of two"),
    "rows of 2^62": (gguf([], [info("t", dims=(2**62,) * 4)], 128), "ends at"),
    "not utf-8": (gguf([struct.pack("<Q", 1) + b"\xff" + struct.pack("<I", 4) + U32], []), "UTF-8"),
    "alignment": (gguf([key("general.alignment", 4, struct.pack("<I", 24))], []), "power of two"),
    "tensor twice": (gguf([], [info("t"), info("t", offset=128)], 256), "repeated"),
    "tensor type": (gguf([], [info("t", kind=999)], 128), "type 999"),
    "rank 0": (gguf([], [info("t", dims=())], 128), "0 dimensions"),
    "rank 9": (gguf([], [info("t", dims=(1,) * 9)], 128), "9 dimensions"),
    "empty tensor": (gguf([], [info("t", dims=(0,))], 128), "does not fit"),
    "rows of half a block": (gguf([], [info("t", dims=(16, 2), kind=3)], 128), "does not fit"),
    "beyond the end": (gguf([], [info("t", dims=(64,))], 128), "ends at"),
    "product beyond 2^64": (gguf([], [info("t", dims=(2**32, 2**32, 2**32))], 128), "ends at"),
    "overlap": (gguf([], [info("t"), info("u", offset=64)], 256), "expected 128"),
    "hole": (gguf([], [info("t"), info("u", offset=256)], 512), "expected 128"),
    "unaligned": (gguf([], [info("t", offset=4)], 256), "expected 0"),
    "padding at the end": (gguf([], [info("t")], 4096), "after the last"),
    "long name": (gguf([], [info("t" * 64)], 128), "64 bytes"),
}


def test_a_good_file_passes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(GOOD)
    infos = read_header(tmp_path / "f").tensors
    assert [(i.name, i.shape, i.nbytes) for i in infos] == [("t", (32,), 128), ("u", (32,), 128)]
    assert infos[1].begin - infos[0].begin == 128


def test_the_gguf_packages_own_files_pass(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "f", "llama")
    writer.add_array("floats", [1.5, 2.5])
    writer.add_array("words", ["a", "b"])
    writer.add_bool("flag", True)
    writer.add_tensor("t", np.ones((3, 5), np.float32))
    writer.add_tensor("u", np.ones((2, 7), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert [info.shape for info in read_header(tmp_path / "f").tensors] == [(3, 5), (2, 7)]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str) -> None:
    raw, said = FAULTS[fault]
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(UnsafeInputError, match=said):
        read_header(tmp_path / "f")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        read_header(tmp_path / "f")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(GOOD) - 1))
def test_every_truncation_is_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "f"
    path.write_bytes(GOOD[:length])
    with pytest.raises(UnsafeInputError):
        read_header(path)


@pytest.fixture(scope="module")
def content(exported: Exported) -> bytes:
    return exported.gguf.read_bytes()


@settings(max_examples=40, deadline=None)
@given(position=st.integers(0, 2000), value=st.integers(0, 255), tail=st.booleans())
def test_a_flipped_byte_gives_an_answer_or_one_of_our_errors(
    content: bytes, tmp_path_factory: pytest.TempPathFactory, position: int, value: int, tail: bool
) -> None:
    """Header bytes, and with `tail` the bytes where tensor infos lie: never another exception, never a hang."""
    damaged = bytearray(content)
    start = content.find(b"token_embd.weight") - 8 if tail else 0
    damaged[start + position] = value
    path = tmp_path_factory.mktemp("flip") / "f"
    path.write_bytes(damaged)
    try:
        contents = read_back(path)
        for module in list(contents.modules)[:2]:
            contents.group_affine(module)
    except QaloraError:
        return
    assert contents.types
