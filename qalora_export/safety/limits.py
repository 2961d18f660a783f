"""Sizes are checked against the real file before anything is allocated."""

import json
from pathlib import Path
from typing import Any

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety.regular import regular_file

MAX_HEADER_BYTES = 100 * 1024 * 1024  # the safetensors format caps its header here
MAX_JSON_BYTES = 256 * 1024 * 1024  # tokenizer.json of a 256k vocabulary is about 35 MB


def read_json(path: Path) -> Any:
    """Parse a JSON file of bounded size.

    Raises InputError when it is missing or does not parse, UnsafeInputError when it is too large, nests too deeply or
    repeats a key (two readers could disagree about which one counts).
    """
    regular_file(path, fix="check the path; is this the folder of a model?")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UnsafeInputError(f"JSON file is larger than {MAX_JSON_BYTES} bytes", where=path)
    return parse_json(path.read_bytes(), where=path)


def parse_json(raw: bytes, *, where: object) -> Any:
    """Parse JSON bytes, with or without a byte order mark; errors as in read_json."""
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _unique(pairs, where))
    except ValueError as error:  # not UTF-8, not JSON, or an integer of more digits than Python converts
        raise InputError("not valid JSON", where=where, why=str(error), fix="fetch the file again") from error
    except RecursionError as error:
        raise UnsafeInputError("JSON nests too deeply", where=where) from error


def _unique(pairs: list[tuple[str, Any]], where: object) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise UnsafeInputError("a JSON object repeats a key", where=where)
    return result
