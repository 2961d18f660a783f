"""The files a runner reads and writes: job.npz in, logits.npz out. No pickle anywhere.

job.npz
    ids      int32 (total,)   token ids of all sequences, one after the other
    lengths  int32 (n,)       length of each sequence, each at least 1, sum = total
    mode     unicode, 0-d     "prefill" (a prompt is one batch), "decode" (token by token with the KV cache) or "both"
    text     uint8 (bytes,)   optional JSON {"texts": [str], "chats": [chat]}, a chat being a list of turns
                              [{"role": str, "content": str, …}] or {"messages": turns, "tools": [object]}
    behaviour uint8 (bytes,)  optional JSON, see behaviour.Request
    long     int32 (length,)  optional: one more sequence, run CHUNK tokens at a time on the KV cache,
    long_at  int32 (k,)       and its positions that are answered, ascending
logits.npz
    logprobs      float32 (total, vocab)   row i = log softmax after seeing this sequence's ids up to and including i
    decoded       float32 (total, vocab)   in mode "both": logprobs are those of prefill, these those of decode
    text_answers  uint8 (bytes,)           optional JSON, see TEXT_ANSWER_KEYS
    behaviour     uint8 (bytes,)           optional JSON, see behaviour.ANSWER_KEYS
    long          float32 (k, vocab)       optional: log softmax at the positions long_at
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.arrays import ProtocolError, read_arrays, write_arrays, write_each
from qalora_runtimes.behaviour import Request

MODES = {"prefill": ("prefill",), "decode": ("decode",), "both": ("prefill", "decode")}  # mode -> passes, in order
PASSES = ("logprobs", "decoded")  # names of the arrays
TEXT_ANSWER_KEYS = {
    "texts": "ids of each text, special tokens in it recognised, BOS only where adds_bos says so",
    "texts_literal": "ids of each text, special tokens in it as plain characters, nothing added; null if not offered",
    "rendered": "each chat through the runtime's own template engine, generation prompt added; null if it failed",
    "rendered_ids": "the ids the runtime would run for that chat; null if it failed",
    "adds_bos": "whether the runtime itself puts BOS before a text",
    "bos_id": "the id of BOS, null if the model has none",
    "errors": "one line for each chat that failed",
}
CHUNK = 512  # tokens of a long sequence that are run at once
MAX_POSITIONS = 1 << 22
MAX_TEXT_BYTES = 128 << 20  # a text for each of 262,144 tokens, twice, takes 25 MB

Ids = NDArray[np.int32]
Logprobs = NDArray[np.float32]
Turns = tuple[Mapping[str, Any], ...]
Chat = Turns | Mapping[str, Any]  # the mapping has "messages" and "tools", as chat templates call them


@dataclass(frozen=True)
class TextRequest:
    """What gate G5 asks: texts to tokenize and chats to render."""

    texts: tuple[str, ...] = ()
    chats: tuple[Chat, ...] = ()


def conversation(chat: Chat) -> dict[str, Any]:
    """A chat as {"messages": [turns]} and, where it has them, "tools"."""
    if isinstance(chat, Mapping):
        return {key: list(value) for key, value in chat.items()}
    return {"messages": list(chat)}


@dataclass(frozen=True)
class LongSequence:
    """ids int32 (length,); at: int32 (k,), ascending positions that are answered. Raises ProtocolError."""

    ids: Ids
    at: Ids

    def __post_init__(self) -> None:
        if self.ids.dtype != np.int32 or self.at.dtype != np.int32 or self.ids.ndim != 1 or self.at.ndim != 1:
            raise ProtocolError("a long sequence and its positions must be one-dimensional int32")
        inside = self.at.size and self.ids.size and self.at[0] >= 0 and self.at[-1] < self.ids.size
        if not inside or self.ids.min() < 0 or (np.diff(self.at) <= 0).any() or self.ids.size > MAX_POSITIONS:
            raise ProtocolError("a long sequence needs ascending positions that lie inside it")

    def chunks(self) -> Iterator[tuple[int, Ids, list[int]]]:
        """(start, ids of a chunk, its positions that are answered, counted from start)"""
        for start in range(0, len(self.ids), CHUNK):
            ids = self.ids[start : start + CHUNK]
            yield start, ids, [int(at) - start for at in self.at if start <= at < start + len(ids)]


@dataclass(frozen=True)
class Job:
    """One run: sequences (each int32 (length,)), the mode, and optionally texts and what to generate."""

    sequences: tuple[Ids, ...]
    mode: str = "prefill"
    text: TextRequest | None = None
    behaviour: Request | None = None
    long: LongSequence | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ProtocolError(f"mode is {self.mode!r}, expected one of {', '.join(MODES)}")
        if not self.sequences or any(sequence.ndim != 1 or not sequence.size for sequence in self.sequences):
            raise ProtocolError("a job needs at least one sequence, and every sequence at least one token")
        if any(sequence.min() < 0 for sequence in self.sequences):
            raise ProtocolError("a job holds a negative token id")
        if self.total > MAX_POSITIONS:
            raise ProtocolError(f"a job of {self.total} positions exceeds the limit of {MAX_POSITIONS}")

    @property
    def passes(self) -> tuple[str, ...]:
        """How every sequence is run, one after the other."""
        return MODES[self.mode]

    @property
    def total(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def longest(self) -> int:
        """Positions that the run needs in a KV cache."""
        generated = 0 if self.behaviour is None else self.behaviour.longest
        long = 0 if self.long is None else len(self.long.ids)
        return max(generated, long, *(len(sequence) for sequence in self.sequences))


def make_job(sequences: Iterable[Sequence[int]], mode: str = "prefill", text: TextRequest | None = None) -> Job:
    return Job(tuple(np.asarray(sequence, dtype=np.int32) for sequence in sequences), mode, text)


def write_job(path: Path, job: Job) -> None:
    arrays: dict[str, Any] = {
        "ids": np.concatenate(job.sequences),
        "lengths": np.array([len(sequence) for sequence in job.sequences], dtype=np.int32),
        "mode": np.array(job.mode),
    }
    if job.text is not None:
        arrays["text"] = _json_bytes({"texts": job.text.texts, "chats": job.text.chats})
    if job.behaviour is not None:
        arrays["behaviour"] = _json_bytes(job.behaviour.as_json())
    if job.long is not None:
        arrays |= {"long": job.long.ids, "long_at": job.long.at}
    write_arrays(path, arrays)


def read_job(path: Path) -> Job:
    """Raises ProtocolError for anything that is not a job within the limits."""
    arrays = read_arrays(path, required={"ids", "lengths", "mode"}, optional={"text", "behaviour", "long", "long_at"})
    ids, lengths, mode = arrays["ids"], arrays["lengths"], arrays["mode"]
    if ids.dtype != np.int32 or lengths.dtype != np.int32 or ids.ndim != 1 or lengths.ndim != 1:
        raise ProtocolError(f"{path}: ids and lengths must be one-dimensional int32")
    if mode.dtype.kind != "U" or mode.ndim:
        raise ProtocolError(f"{path}: mode must be a single string")
    if lengths.size == 0 or lengths.min() < 1 or int(lengths.sum(dtype=np.int64)) != ids.size:
        raise ProtocolError(f"{path}: lengths must be positive and sum to the {ids.size} ids")
    sequences = tuple(np.split(ids, np.cumsum(lengths)[:-1]))
    text = _text_request(_parse_json(path, arrays["text"])) if "text" in arrays else None
    try:
        asked = Request.of(_parse_json(path, arrays["behaviour"])) if "behaviour" in arrays else None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ProtocolError(f"{path}: behaviour is no such request: {error!r}") from error
    if ("long" in arrays) != ("long_at" in arrays):
        raise ProtocolError(f"{path}: long and long_at belong together")
    long = LongSequence(arrays["long"], arrays["long_at"]) if "long" in arrays else None
    return Job(sequences, str(mode), text, asked, long)


@dataclass(frozen=True)
class Answers:
    """logprobs float32 (positions, vocab) of the job's first pass, decoded of its second, text and behaviour: to what
    it asks of them. long: float32 (k, vocab), at the positions of its long sequence.
    """

    logprobs: Logprobs
    decoded: Logprobs | None = None
    text: dict[str, Any] | None = None
    behaviour: dict[str, Any] | None = None
    long: Logprobs | None = None


def write_answers(
    path: Path,
    passes: Iterable[Logprobs],
    text_answers: Mapping[str, Any] | None = None,
    behaviour: Mapping[str, Any] | None = None,
    long: Logprobs | None = None,
) -> None:
    """passes: the rows of each pass of the job, written as they come, one in memory at a time."""
    tables = {"text_answers": text_answers, "behaviour": behaviour}
    said: list[tuple[str, Any]] = [(name, _json_bytes(table)) for name, table in tables.items() if table is not None]
    said += [] if long is None else [("long", long)]
    write_each(path, itertools.chain(zip(PASSES, passes, strict=False), said))


def read_answers(path: Path, *, positions: int) -> Answers:
    """Raises ProtocolError."""
    arrays = read_arrays(path, required={PASSES[0]}, optional={PASSES[1], "text_answers", "behaviour", "long"})
    for name, rows in ((name, arrays[name]) for name in PASSES if name in arrays):
        if rows.dtype != np.float32 or rows.ndim != 2 or len(rows) != positions:
            raise ProtocolError(f"{path}: {name} is {rows.dtype} {rows.shape}, expected float32 ({positions}, V)")
    said = {name: _parse_json(path, arrays[name]) for name in ("text_answers", "behaviour") if name in arrays}
    for name, table in said.items():
        if not isinstance(table, dict):
            raise ProtocolError(f"{path}: {name} must be a JSON object")
    long = arrays.get("long")
    if long is not None and (long.dtype != np.float32 or long.ndim != 2):
        raise ProtocolError(f"{path}: long is {long.dtype} {long.shape}, expected float32 (k, V)")
    return Answers(arrays[PASSES[0]], arrays.get(PASSES[1]), said.get("text_answers"), said.get("behaviour"), long)


def _text_request(raw: Any) -> TextRequest:
    texts, chats = (raw.get("texts", []), raw.get("chats", [])) if isinstance(raw, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(chats, list) or not all(isinstance(t, str) for t in texts):
        raise ProtocolError('text must be {"texts": [string], "chats": [list of turns, or {"messages", "tools"}]}')
    for chat in chats:
        parts = conversation(chat) if isinstance(chat, list) or _lists(chat) else {}
        if not parts.get("messages") or not parts.keys() <= {"messages", "tools"}:
            raise ProtocolError("every chat must be a list of turns, or have messages and perhaps tools")
        if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in parts["messages"]):
            raise ProtocolError("every turn of a chat must be an object with a role")
        if not all(isinstance(tool, dict) for tool in parts.get("tools", [])):
            raise ProtocolError("every tool of a chat must be an object")
    return TextRequest(tuple(texts), tuple(tuple(chat) if isinstance(chat, list) else chat for chat in chats))


def _lists(chat: Any) -> bool:
    return isinstance(chat, dict) and all(isinstance(value, list) for value in chat.values())


def _json_bytes(value: Any) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"), dtype=np.uint8)


def _parse_json(path: Path, raw: NDArray[Any]) -> Any:
    if raw.dtype != np.uint8 or raw.ndim != 1 or raw.size > MAX_TEXT_BYTES:
        raise ProtocolError(f"{path}: JSON must be at most {MAX_TEXT_BYTES} bytes of uint8")
    try:
        return json.loads(raw.tobytes().decode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise ProtocolError(f"{path}: not valid JSON: {error}") from error
