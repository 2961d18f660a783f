"""Sizes are checked against the real file before anything is allocated."""

import codecs
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety.regular import regular_file

MAX_HEADER_BYTES = 100 * 1024 * 1024  # the safetensors format caps its header here
MAX_JSON_BYTES = 256 * 1024 * 1024  # tokenizer.json of a 256k vocabulary is about 35 MB
MAX_NESTING = 100  # no file of a model has 20; what walks through a value calls itself for each level


def read_json(path: Path) -> Any:
    """Parse a JSON file of bounded size.

    Raises InputError when it is missing, does not parse or holds half a character, UnsafeInputError when it is too
    large, nests too deeply or repeats a key (two readers could disagree about which one counts).
    """
    regular_file(path, fix="check the path; is this the folder of a model?")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UnsafeInputError(f"JSON file is larger than {MAX_JSON_BYTES} bytes", where=path)
    return parse_json(path.read_bytes(), where=path)


def byte_order_mark(where: object) -> InputError:
    """The refusal of a model's file that begins with one. Texts of the user (recipe, data, prompts) may have it."""
    return InputError(
        "the file begins with a byte order mark",
        where=where,
        why="Transformers and the runtimes would refuse it or take it for text",
        fix="save it as UTF-8 without a byte order mark",
    )


def parse_json(raw: bytes, *, where: object) -> Any:
    """Parse JSON bytes; errors as in read_json."""
    if raw.startswith(codecs.BOM_UTF8):
        raise byte_order_mark(where)
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, where))
    except ValueError as error:  # not UTF-8, not JSON, or an integer of more digits than Python converts
        raise InputError("not valid JSON", where=where, why=str(error), fix="fetch the file again") from error
    except RecursionError as error:
        raise UnsafeInputError("JSON nests too deeply", where=where) from error
    _check_depth(content, where)
    if b"\\ud" in raw.lower():
        _check_characters(content, where)
    return content


def _check_depth(content: Any, where: object) -> None:
    """Level by level: a value that parses may still be too deep for a function that calls itself."""
    level: list[Any] = [[content]]
    depth = 0
    while level := [part for outer in level for part in _parts(outer) if isinstance(part, dict | list)]:
        depth += 1
        if depth > MAX_NESTING:
            raise UnsafeInputError("JSON nests too deeply", where=where, why=f"more than {MAX_NESTING} levels")


def _parts(outer: Any) -> Iterable[Any]:
    return outer.values() if isinstance(outer, dict) else outer


def _check_characters(content: Any, where: object) -> None:
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            "JSON holds half a character", where=where, why="a surrogate without the other half is not valid Unicode"
        ) from error


def _unique(pairs: list[tuple[str, Any]], where: object) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise UnsafeInputError("a JSON object repeats a key", where=where)
    return result
