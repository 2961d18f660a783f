"""Damage that knows a container: safetensors, GGUF, protocol buffers (ONNX), zip archives of numpy arrays."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Iterator
from random import Random

from tests.survival.fuzz.mutate import NUMBERS, SIZES, TEXTS, any_bytes, change_json, json_text, spot


def safetensors(random: Random, raw: bytes) -> tuple[bytes, str]:
    """The header as JSON, its length, or the bytes behind it."""
    length = int.from_bytes(raw[:8], "little")
    kind = random.randrange(8)
    try:
        header = json.loads(raw[8 : 8 + length])
    except (ValueError, RecursionError):
        return any_bytes(random, raw)
    if kind == 0:
        claimed = random.choice((*SIZES, length - 1, length + 1, len(raw), len(raw) - 8)) % 2**64
        return claimed.to_bytes(8, "little") + raw[8:], f"safetensors: header length {claimed}"
    if kind == 1:
        begin = 8 + length
        body, what = any_bytes(random, raw[begin:])
        return raw[:begin] + body, f"safetensors: body, {what}"
    header, what = change_json(random, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * random.choice((0, 0, 7))
    return len(text).to_bytes(8, "little") + text + raw[8 + length :], f"safetensors: {what}"


# --------------------------------------------------------------------------------------------------------------- GGUF

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


def _gguf_fields(raw: bytes) -> Iterator[tuple[int, int, str]]:
    """(offset, width, what) of the numbers and strings in the header of a GGUF; width 0: u64 length, then bytes."""
    yield from ((0, 4, "magic"), (4, 4, "version"), (8, 8, "tensor count"), (16, 8, "key count"))
    tensors, keys = struct.unpack_from("<QQ", raw, 8)
    at = 24
    for _ in range(keys):
        yield at, 0, "key"
        at += 8 + int.from_bytes(raw[at : at + 8], "little")
        yield at, 4, "value type"
        kind = int.from_bytes(raw[at : at + 4], "little")
        at += 4
        count, inner = 1, kind
        if kind == ARRAY:
            yield from ((at, 4, "element type"), (at + 4, 8, "element count"))
            inner, count = struct.unpack_from("<IQ", raw, at)
            at += 12
        for index in range(count):
            width = 0 if inner == STRING else SCALARS[inner]
            if index < 4 or index == count - 1:
                yield at, width, "value"
            at += width or 8 + int.from_bytes(raw[at : at + 8], "little")
            _inside(raw, at)
        _inside(raw, at)
    for _ in range(tensors):
        yield at, 0, "tensor name"
        at += 8 + int.from_bytes(raw[at : at + 8], "little")
        yield at, 4, "rank"
        rank = int.from_bytes(raw[at : at + 4], "little")
        at += 4
        for _ in range(rank):
            yield at, 8, "extent"
            at += 8
            _inside(raw, at)
        yield from ((at, 4, "tensor type"), (at + 4, 8, "tensor offset"))
        at += 12
        _inside(raw, at)
    yield at, 0, "data"


def _inside(raw: bytes, at: int) -> None:
    if at > len(raw):
        raise ValueError("a count or length that was damaged before")


def gguf(random: Random, raw: bytes) -> tuple[bytes, str]:
    """A count, type, length, extent, offset or string of the header; a field repeated or lost; the data."""
    try:
        fields = list(_gguf_fields(raw))
    except (struct.error, KeyError, ValueError):
        return any_bytes(random, raw)
    what_kind = random.choice(sorted({what for _, _, what in fields}))
    at, width, what = random.choice([field for field in fields if field[2] == what_kind])
    end = at + (width or 8 + int.from_bytes(raw[at : at + 8], "little"))
    if what == "data":
        return raw[:at] + any_bytes(random, raw[at:])[0], "gguf: data"
    if random.random() < 0.1:
        return raw[:end] + raw[at:], f"gguf: {what} at {at} repeated"
    if width == 0 and random.random() < 0.6:
        text = random.choice(TEXTS).encode("utf-8", "surrogatepass")
        return raw[:at] + len(text).to_bytes(8, "little") + text + raw[end:], f"gguf: {what} at {at} is {text[:30]!r}"
    width = width or 8
    now = int.from_bytes(raw[at : at + width], "little")
    value = random.choice((*SIZES, *range(40), now + 1, now - 1, now ^ 1, 2 * now)) % 2 ** (8 * width)
    return raw[:at] + value.to_bytes(width, "little") + raw[at + width :], f"gguf: {what} at {at}: {now} → {value}"


# ---------------------------------------------------------------------------------------------------- protocol buffers


def _varint(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128 or shift > 63:
            return value, at


def _fields(raw: bytes) -> list[tuple[int, int, int | bytes]]:
    """(number, wire type, value) of a message. Raises ValueError or IndexError when these bytes are none."""
    at, found = 0, []
    while at < len(raw):
        tag, at = _read_varint(raw, at)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire == 0:
            value, at = _read_varint(raw, at)
        elif wire == 2:
            size, at = _read_varint(raw, at)
            value, at = raw[at : at + size], at + size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = raw[at : at + size], at + size
        else:
            raise ValueError("no message")
        if number == 0 or at > len(raw):
            raise ValueError("no message")
        found.append((number, wire, value))
    return found


def _joined(fields: list[tuple[int, int, int | bytes]]) -> bytes:
    out = bytearray()
    for number, wire, value in fields:
        out += _varint(number << 3 | wire)
        if isinstance(value, int):
            out += _varint(value)
        else:
            out += (_varint(len(value)) if wire == 2 else b"") + value
    return bytes(out)


def protobuf(random: Random, raw: bytes, depth: int = 0) -> tuple[bytes, str]:
    """One field of a message, at any depth: another number or text, repeated, lost, under another number."""
    try:
        fields = _fields(raw)
    except (ValueError, IndexError):
        fields = []
    if not fields:
        text = random.choice((*TEXTS, *map(str, NUMBERS)))
        return text.encode("utf-8", "surrogatepass"), f"text {text[:30]!r}"
    at = random.randrange(len(fields))
    number, wire, value = fields[at]
    kind = random.randrange(12)
    if isinstance(value, bytes) and wire == 2 and kind < 9 and depth < 8:
        inner, what = protobuf(random, value, depth + 1)
        fields[at], what = (number, wire, inner), f"{number}[{at}].{what}"
    elif isinstance(value, int) and kind < 9:
        new = random.choice((*SIZES, *range(25), value + 1, value - 1, -1, -(2**31)))
        fields[at], what = (number, wire, new), f"{number}[{at}]: {value} → {new}"
    elif kind == 9:
        fields.insert(random.randrange(len(fields) + 1), fields[at])
        what = f"{number}[{at}] repeated"
    elif kind == 10:
        del fields[at]
        what = f"{number}[{at}] lost"
    else:
        other = random.randrange(1, 30)
        fields[at], what = (other, wire, value), f"{number}[{at}] under {other}"
    return _joined(fields), what if depth else f"protobuf: {what}"


# ------------------------------------------------------------------------------------------------------------ npz

HEADERS = (
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1099511627776), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (0, 4611686018427387904), }",
    "{'descr': '<U4000000000', 'fortran_order': False, 'shape': (), }",
    "{'descr': [('a', '<f4'), ('a', '|O')], 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<f4'}",
    "__import__('os').system('true')",
    "[" * 2000,
    "{'descr': '<c16', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': (True,), }",
)


def npz(random: Random, raw: bytes) -> tuple[bytes, str]:
    """A member of the archive: its npy header, its bytes, its name; members that are repeated, lost or bombs."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:
        return any_bytes(random, raw)
    if not members:
        return any_bytes(random, raw)
    at = random.randrange(len(members))
    name, content = members[at]
    kind = random.randrange(7)
    if kind < 2:
        text = random.choice(HEADERS).encode()
        members[at] = (
            name,
            b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text + b"\n" + content[-64:],
        )
        what = f"header of {name} is {text[:60]!r}"
    elif kind == 2:
        members[at], what = (name, any_bytes(random, content)[0]), f"bytes of {name}"
    elif kind == 3:
        members[at], what = (random.choice(("../x", "x", "a/", "a\0", name.upper())), content), f"{name} renamed"
    elif kind == 4:
        del members[at]
        what = f"{name} lost"
    elif kind == 5:
        members.append((name, content))
        what = f"{name} repeated"
    else:
        members[at], what = (name, content + bytes(50_000_000)), f"{name} is a bomb"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for member in members:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of the duplicate names we are after
                archive.writestr(*member)
    damaged = out.getvalue()
    if random.random() < 0.2:
        place = spot(random, len(damaged))
        damaged = damaged[:place] + bytes([damaged[place] ^ 1 << random.randrange(8)]) + damaged[place + 1 :]
        what += f", bit flipped at {place}"
    return damaged, f"npz: {what}"


def stored(random: Random, raw: bytes) -> tuple[bytes, str]:
    """Inside an archive of stored members (a patch, a file of answers): its table in JSON, or the bytes of another."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:
        return any_bytes(random, raw)
    name = random.choice(list(members))
    members[name], what = (json_text if name.endswith(".json") else any_bytes)(random, members[name])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue(), f"{name}: {what}"
