"""Tokenizers that come with a model may hold regular expressions, and those may take for ever: they run confined.

The tokenizers library bounds the backtracking of one match (Oniguruma's retry limit, a panic), not the number of places
where it starts one: `\\s+$` on 100,000 spaces runs for minutes inside one call in Rust, and a replacement may make a
gigabyte of a line. No look at an expression tells which one does. So a tokenizer.json with an expression, or with steps
that may make a text much longer, is loaded, encodes and decodes in a process with limits on time and memory. What the
limits guarantee: a call ends after safety.confined.SECONDS of CPU time and a second for each 100 kB of text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_export.errors import InputError, UnsafeInputError, refused_by
from qalora_export.safety import read_json, sha256_file
from qalora_export.safety.confined import (
    MEMORY,
    SECONDS,
    Confined,
    ConfinedTogether,
    FailedError,
    OutOfBoundsError,
    is_confined,
)

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Steps whose work is linear in the text, and which make it at most some times as long.
PLAIN = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "BertNormalizer", "Prepend"),
    *("Replace", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"),
    *("BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts", "ByteFallback", "Fuse", "WordPiece", "BPEDecoder"),
    *("CTC", "Sequence"),
}
MOST_GROWTH = 64.0  # × the text, by replacements
LOADED_PER_SECOND, MEMORY_PER_BYTE = 1e6, 64  # of tokenizer.json
_loaded = set[str]()  # sha256 of those that came to an end in this process or the one that it was forked from


@dataclass(frozen=True)
class Bounds:
    """Which calls of a tokenizer must be confined."""

    encode: bool
    decode: bool

    @classmethod
    def of(cls, raw: Any) -> Bounds:
        """Those of a parsed tokenizer.json."""
        parts = raw if isinstance(raw, Mapping) else {}
        encode = [*_steps(parts.get("normalizer")), *_steps(parts.get("pre_tokenizer"))]
        return cls(_growth(encode) > MOST_GROWTH, _growth(list(_steps(parts.get("decoder")))) > MOST_GROWTH)


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    if part is None:
        return
    if not isinstance(part, Mapping):
        yield {}
        return
    yield part
    for name in ("normalizers", "pretokenizers", "decoders"):
        steps = part.get(name)
        for step in steps if isinstance(steps, list) else ():
            yield from _steps(step)


def _growth(steps: list[Mapping[str, Any]]) -> float:
    """By how much the steps may lengthen a text; infinite for an expression and for what we do not know."""
    growth = 1.0
    for step in steps:
        pattern = step.get("pattern")
        if step.get("type") not in PLAIN or (pattern is not None and not _is_text(pattern)):
            return float("inf")
        if step["type"] == "Replace" and pattern is not None:
            growth *= max(1.0, len(str(step.get("content"))) / len(pattern["String"]))
        growth *= 1 + len(str(step.get("prepend") or ""))
    return growth


def _is_text(pattern: Any) -> bool:
    return isinstance(pattern, Mapping) and list(pattern) == ["String"] and bool(pattern["String"])


def bounds_of(folder: Path) -> Bounds:
    """Those of the tokenizer.json in `folder`, which is loaded in a confined process first where it needs any.

    Raises UnsafeInputError when that does not come to an end, InputError when the file is no tokenizer.
    """
    path = folder / FILE
    found = Bounds.of(read_json(path))
    if (found.encode or found.decode) and (digest := sha256_file(path)) not in _loaded:
        size = path.stat().st_size  # tokens of its own are normalized while it is loaded
        load = Confined(_load, seconds=SECONDS + size / LOADED_PER_SECOND, memory=MEMORY + MEMORY_PER_BYTE * size)
        _ending(load, folder, "load")(str(path))
        load.close()
        _loaded.add(digest)
    return found


def _load(path: str) -> int:
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(path).get_vocab_size())


def encoder_of(raw: Mapping[str, Any]) -> Callable[..., list[int]]:
    """ids(text, special) by a tokenizer.json that is at hand parsed; confined where its steps need it.

    special: with what the post-processor adds. Raises InputError when it is no tokenizer, UnsafeInputError when a text
    takes more time or memory than a call may.
    """
    bounds, text = Bounds.of(raw), json.dumps(raw)
    encode = _Encoder(text)
    if not bounds.encode:
        with refused_by("tokenizers", where=FILE, doing="read this tokenizer"):
            encode.load()
        return encode
    size = len(text)
    call = Confined(encode, seconds=SECONDS + size / LOADED_PER_SECOND, memory=MEMORY + MEMORY_PER_BYTE * size)
    return _ending(call, None, "encode a text")


class _Encoder:
    """Loaded with the first text, in the process that encodes."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokenizer: Any = None

    def load(self) -> Any:
        from tokenizers import Tokenizer

        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_str(self._text)
        return self._tokenizer

    def __call__(self, text: str, special: bool) -> list[int]:
        return list(self.load().encode(text, add_special_tokens=special).ids)


def require_declared_ids(tokenizer: Any, folder: Path) -> None:
    """Raise InputError when Transformers numbers a token behind all others although tokenizer_config.json says its id.

    InternLM2's tokenizer.json has other names at those ids than its config, so <|im_start|> of the chat template would
    lie beyond the embedding. What was meant is not to be guessed: renaming changes what every text becomes.
    """
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    declared = settings.get("added_tokens_decoder") if isinstance(settings, Mapping) else None
    for index, item in declared.items() if isinstance(declared, Mapping) else ():
        text = item.get("content") if isinstance(item, Mapping) else None
        if not isinstance(text, str) or not str(index).isdecimal():
            continue
        found, there = tokenizer.convert_tokens_to_ids(text), tokenizer.convert_ids_to_tokens(int(index))
        if there not in (None, text) and isinstance(found, int) and found > int(index):
            raise InputError(
                f"token {text!r} gets id {found}, {SETTINGS} says {index}",
                where=f"{folder}: tokenizer",
                why=f"{FILE} has {there!r} at {index}, so Transformers adds the other one behind all tokens, where the "
                "model has no row for it",
                fix=f"if the model was trained with {text!r}, rename {there!r} in {FILE} and list it in added_tokens "
                "there",
            )


def bind(tokenizer: Any, bounds: Bounds, folder: Path, process: ConfinedTogether) -> None:
    """Confine the calls of a Transformers tokenizer that need it, in place; encodings are then plain lists."""
    kind, calls = type(tokenizer), dict[str, Any]()
    if bounds.encode:
        original = tokenizer._encode_plus
        encode = _Call(tokenizer, original, folder, "encode a text", process)

        def _encode_plus(_: Any, text: Any, text_pair: Any = None, return_tensors: Any = None, **options: Any) -> Any:
            from transformers import BatchEncoding

            if is_confined():  # a template that is rendered, whose marks need more of the encoding than the ids
                return original(text, text_pair, return_tensors=return_tensors, **options)
            return BatchEncoding(encode(text, text_pair, **options), tensor_type=return_tensors)

        calls["_encode_plus"] = _encode_plus
    if bounds.decode:
        decode = _Call(tokenizer, tokenizer._decode, folder, "decode tokens", process)
        calls["_decode"] = lambda _, *arguments, **options: decode(*arguments, **options)
    if calls:
        tokenizer.__class__ = type(kind.__name__, (kind,), calls)


class _Call:
    """A method of a tokenizer, confined; the process starts anew when tokens were added since."""

    def __init__(self, tokenizer: Any, method: Any, folder: Path, doing: str, process: ConfinedTogether) -> None:
        def plain(*arguments: Any, **options: Any) -> Any:
            found = method(*arguments, **options)
            return dict(found) if isinstance(found, Mapping) else found

        self._backend, self._process = tokenizer.backend_tokenizer, process
        self._call, self._tokens = _ending(process.add(plain), folder, doing), self._count()

    def _count(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if (tokens := self._count()) != self._tokens:
            self._tokens = tokens
            self._process.close()
        return self._call(*arguments, **options)


def _ending(call: Callable[..., Any], folder: Path | None, doing: str) -> Callable[..., Any]:
    def bounded(*arguments: Any, **options: Any) -> Any:
        where = FILE if folder is None else f"{folder}: tokenizer"
        try:
            return call(*arguments, **options)
        except FailedError as error:
            raise InputError(
                f"the tokenizer cannot {doing}", where=where, why=str(error), fix="fetch the model again"
            ) from error
        except OutOfBoundsError as error:
            raise UnsafeInputError(
                f"the tokenizer cannot {doing} in bounded time and memory",
                where=where,
                why=f"{error}; its tokenizer.json holds regular expressions or replacements",
                fix="they came with the model: look at them, or fetch the model again",
            ) from error

    return bounded
