"""What differs between two nested values: one line for each, with its path and both values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np

CLIP = 70
ABSENT = "absent"


def differences(expected: Any, found: Any, name: str) -> Iterator[str]:
    """One line for each value that differs: tables key by key at any depth, everything else as a whole."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in (*expected, *(key for key in found if key not in expected)):
            inner = f"{name}{'' if name.endswith(' ') else '.'}{key}" if name else str(key)
            if key not in found or key not in expected:
                yield f"{inner}: {explain(expected.get(key, ABSENT), found.get(key, ABSENT))}"
            else:
                yield from differences(expected[key], found[key], inner)
    elif not same(expected, found):
        yield f"{name}: {explain(expected, found)}"


def same(expected: Any, found: Any) -> bool:
    """Equal in value and type, at any depth: 1, 1.0 and true are three things in JSON."""
    if type(expected) is not type(found):
        return False
    if isinstance(expected, list | tuple):
        return len(expected) == len(found) and all(map(same, expected, found))
    if isinstance(expected, Mapping):
        return expected.keys() == set(found) and all(same(value, found[key]) for key, value in expected.items())
    if isinstance(expected, np.ndarray):
        return same((expected.dtype, expected.shape, expected.tobytes()), (found.dtype, found.shape, found.tobytes()))
    return repr(expected) == repr(found) if isinstance(expected, float) else bool(expected == found)


def explain(expected: Any, found: Any) -> str:
    """Both values; for lists and tables, those of the first place that differs."""
    expected, found = (value.tolist() if isinstance(value, np.ndarray) else value for value in (expected, found))
    if isinstance(expected, list) and isinstance(found, list):
        pairs = zip_longest(expected, found, fillvalue=ABSENT)
        index, (want, got) = next(((i, pair) for i, pair in enumerate(pairs) if not same(*pair)), (0, ("", "")))
        return f"item {index}: expected {clip(want)}, found {clip(got)} ({len(expected)} expected, {len(found)} found)"
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        keys = (*expected, *(key for key in found if key not in expected))
        key = next((key for key in keys if not same(expected.get(key, ABSENT), found.get(key, ABSENT))), "")
        return f"{key}: {explain(expected.get(key, ABSENT), found.get(key, ABSENT))}"
    return f"expected {clip(expected)}, found {clip(found)}"


def clip(value: Any) -> str:
    """A value as text of one short line."""
    try:
        text = str(value) if isinstance(value, np.floating) else repr(value)
    except RecursionError:
        return "a value that nests too deeply to be shown"
    return text if len(text) <= CLIP else text[:CLIP] + "…"
