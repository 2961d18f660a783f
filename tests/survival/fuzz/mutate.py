"""Ways to damage bytes: any bytes, JSON, lines of JSON. Each takes a seeded generator and says what it did.

A mutator is (random, bytes) → (bytes, what). It is deterministic in the generator's state and needs no valid input: one
that cannot parse what it is given, because another mutator was there before, falls back to plain bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Mutator = Callable[[Random, bytes], tuple[bytes, str]]

SIZES = (0, 1, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = (
    "",
    "x",
    "..",
    "../x",
    "/etc/passwd",
    "/dev/zero",
    "a\0b",
    "\x1b[31m",
    "[/b]",
    "\ud800",
    "\u202ex",
    "é東🙂",
    "a/b\\c",
    "x" * 300,
    "{{ 1 }}",
    "%s%n{0}",
    "NaN",
    "-1",
    "1e999",
    "\n",
    "F16",
    "__class__",
)
NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    5,
    31,
    33,
    127,
    65537,
    2**31 - 1,
    2**31,
    2**62,
    2**63,
    2**64,
    10**40,
    -(2**63),
    0.5,
    -0.0,
    1e-320,
    1e300,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
)
LITERALS = (None, True, False)


def hostile_value(random: Random) -> Any:
    kind = random.randrange(10)
    if kind < 4:
        return random.choice(NUMBERS)
    if kind < 7:
        return random.choice(TEXTS)
    if kind < 8:
        return random.choice(LITERALS)
    if kind < 9:
        return random.choice(([], {}, [[]], [0], [2**62, 2**62], [None], {"a": 1}, {"": {}}, [{}], ["x", 1]))
    return _nested(random.choice((3, 60, 900)), random.random() < 0.5)


def _nested(depth: int, table: bool) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"a": value} if table else [value]
    return value


# ---------------------------------------------------------------------------------------------------------- any bytes


def spot(random: Random, length: int) -> int:
    """A position, more often near the beginning or the end: headers stand there, and the directory of a zip."""
    near = min(length, 3000)
    kind = random.randrange(4)
    if kind == 0:
        return random.randrange(max(1, min(near, 64)))
    if kind == 1:
        return random.randrange(max(1, near))
    if kind == 2:
        return max(0, length - 1 - random.randrange(max(1, near)))
    return random.randrange(max(1, length))


def any_bytes(random: Random, raw: bytes) -> tuple[bytes, str]:
    """A bit, a byte, a number, a deletion, an insertion, a repetition, a splice, a truncation, nothing left at all."""
    at = spot(random, len(raw))
    kind = random.randrange(10)
    if not raw or kind == 0:
        added = random.choice((b"\0", b"\xff", b"{", b"[" * 2000, b"\n", bytes(random.randbytes(9)), b"\xef\xbb\xbf"))
        return raw[:at] + added + raw[at:], f"bytes: {added[:9]!r} inserted at {at}"
    if kind == 1:
        return raw[:at] + bytes([raw[at] ^ 1 << random.randrange(8)]) + raw[at + 1 :], f"bytes: bit flipped at {at}"
    if kind == 2:
        value = random.randrange(256)
        return raw[:at] + bytes([value]) + raw[at + 1 :], f"bytes: {value} at {at}"
    if kind in (3, 4):
        width = random.choice((2, 4, 8))
        value = random.choice(SIZES) % 2 ** (8 * width)
        return raw[:at] + value.to_bytes(width, "little") + raw[at + width :], f"bytes: u{8 * width} {value} at {at}"
    if kind == 5:
        count = random.choice((1, 2, 4, 8, 9, 100, 1000))
        return raw[:at] + raw[at + count :], f"bytes: {count} deleted at {at}"
    if kind == 6:
        return raw[:at], f"bytes: cut at {at}"
    if kind == 7:
        count = random.choice((1, 8, 64, 500))
        return raw[: at + count] + raw[at:], f"bytes: {count} repeated at {at}"
    if kind == 8:
        other, count = spot(random, len(raw)), random.choice((4, 8, 64))
        return raw[:at] + raw[other : other + count] + raw[at + count :], f"bytes: {count} of {other} put at {at}"
    ends = random.choice((b"", raw + raw, raw + bytes(random.randrange(1, 99)), bytes(len(raw))))
    return ends, f"bytes: all replaced by {len(ends)}"


# --------------------------------------------------------------------------------------------------------------- JSON


def places(value: Any, path: tuple[Any, ...] = (), depth: int = 12) -> list[tuple[Any, ...]]:
    """Paths to the values in parsed JSON, a dozen of each list and table."""
    found = [path]
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, item in items[:12] + items[-2:] if depth else ():
        found += places(item, (*path, key), depth - 1)
    return found


def change_json(random: Random, value: Any) -> tuple[Any, str]:
    """Replace, remove, rename, repeat or exchange one part of parsed JSON, in place where it has a parent."""
    path = random.choice(places(value))
    new = hostile_value(random)
    if not path:
        return new, f"json: all = {str(new)[:60]!r}"
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, name = path[-1], ".".join(map(str, path))[:120]
    kind = random.randrange(10)
    if kind < 5:
        parent[key] = new
        return value, f"json: {name} = {str(new)[:60]!r}"
    if kind == 5:
        parent[key] = _other_type(parent[key])
        return value, f"json: {name} as another type, {str(parent[key])[:60]!r}"
    if kind == 6:
        del parent[key]
        return value, f"json: {name} removed"
    if kind == 7 and isinstance(parent, dict):
        parent[str(new)[:400]] = parent.pop(key)
        return value, f"json: {name} renamed {str(new)[:60]!r}"
    if kind == 8 and isinstance(parent, list):
        parent.insert(random.randrange(len(parent) + 1), parent[key])
        return value, f"json: {name} repeated"
    other = random.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key], parent[other] = parent[other], parent[key]
    return value, f"json: {name} exchanged with {other}"


def _other_type(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, dict) else {str(index): item for index, item in enumerate(value)}


def json_text(random: Random, raw: bytes) -> tuple[bytes, str]:
    """One structural change of a JSON document, or of its text: a repeated key, deep nesting, long numbers."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return any_bytes(random, raw)
    kind = random.randrange(12)
    if kind == 0 and isinstance(value, dict) and value:
        key = random.choice(list(value))
        text = raw.strip().removesuffix(b"}") + b"," + json.dumps({key: hostile_value(random)}).encode()[1:]
        return text, f"json: key {key!r} repeated"
    if kind == 1:
        extra = random.choice((b"[" * 5000, b'{"a":' * 5000, b"1" * 5000, b'"' + b"x" * 100_000 + b'"', b"\\ud800"))
        at = spot(random, len(raw))
        return raw[:at] + extra + raw[at:], f"json: {extra[:5]!r}… × {len(extra)} at {at}"
    value, what = change_json(random, value)
    return json.dumps(value, ensure_ascii=random.random() < 0.7).encode("utf-8", "surrogatepass"), what


LINES = (b"", b"null", b"[]", b"\0", b"\xff\xfe", b"{}", b'"x"', b"\r", b"\x1b[2J", b"[" * 4000)


def json_lines(random: Random, raw: bytes) -> tuple[bytes, str]:
    """One line changed as JSON, or lines that are empty, repeated, joined, endless."""
    lines = raw.split(b"\n")
    at = random.randrange(len(lines))
    kind = random.randrange(10)
    if kind == 0:
        lines[at] = random.choice(LINES)
        return b"\n".join(lines), f"lines: {at} = {lines[at][:9]!r}"
    if kind == 1:
        return b"\n".join([*lines[:at], *lines[at:], *lines[at:]]), f"lines: repeated from {at}"
    if kind == 2:
        end = random.choice((b"\r\n", b"\r", b"", b"\xe2\x80\xa8", b"\n\n"))
        return end.join(lines), f"lines: joined by {end!r}"
    lines[at], what = json_text(random, lines[at])
    return b"\n".join(lines), f"line {at}: {what}"
