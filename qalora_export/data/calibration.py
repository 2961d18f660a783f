"""Calibration text, in any format of `records`, → token windows."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.data.records import iter_records
from qalora_export.data.rendering import conversation_text, plain_ids
from qalora_export.errors import InputError
from qalora_export.safety.regular import regular_file

MIN_TOKENS = 32


def calibration_windows(path: Path, tokenizer: Any, *, samples: int, length: int, seed: int) -> NDArray[np.int64]:
    """At most `samples` windows of `length` tokens, int64 (n, length), drawn without replacement by `seed`.

    Documents are put one behind the other and cut; every window starts with BOS when the tokenizer has one it adds.
    A text shorter than one window gives one shorter window. Raises InputError as records.iter_records does, for
    conversations without a chat template, and for a text of fewer than 32 tokens.
    """
    regular_file(path, "calibration file", fix="give a text or JSONL file, or use method rtn")
    prefix = _added_prefix(tokenizer)
    ids = array("i")
    for document in _documents(path, tokenizer):
        ids.extend(document)
    if len(ids) < MIN_TOKENS:
        raise InputError(
            f"the calibration text has only {len(ids)} tokens",
            where=path,
            why=f"GPTQ needs at least {MIN_TOKENS}, some ten thousand to be good",
            fix="give more text of the kind the model will read",
        )
    body = min(length - len(prefix), len(ids))
    if body < 1:
        raise InputError(f"a sequence length of {length} leaves no room for text", where=path, fix="raise it")
    windows = np.array(ids[: len(ids) // body * body], dtype=np.int64).reshape(-1, body)
    order = np.random.default_rng(seed).permutation(len(windows))[:samples]
    chosen = windows[np.sort(order)]
    return np.concatenate([np.tile(np.array(prefix, np.int64), (len(chosen), 1)), chosen], axis=1)


def _added_prefix(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("").input_ids)[:1] == [bos] else []


def _documents(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    """The token ids of each record, without the special tokens that the tokenizer adds by itself."""
    for record in iter_records(path):
        yield plain_ids(tokenizer, conversation_text(record, tokenizer) if record.text is None else record.text)
