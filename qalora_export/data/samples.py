"""Records → token ids and labels: the tokenizer's own chat template, loss on the assistant's answers only.

Which tokens are answers is read off the template, never guessed:

  1. a template with {% generation %} markers says so itself;
  2. otherwise each answer is what the template adds when it is rendered with the answer instead of the generation
     prompt. That holds only if the tokens of the shorter rendering begin those of the longer one, which is checked for
     every answer. White space after the end-of-turn token belongs to the next turn and is not learned.

Text learns every token: tokenizer's own BOS, then the text, then EOS.

A conversation longer than the sequence length or the model's context goes by `too_long`:

    drop       it is left out and counted (as Axolotl does by default)
    truncate   its end is cut off, as TRL and LLaMA-Factory do; left out if nothing to learn is left
    error      the run stops and names the lines

Text is divided into pieces instead; nothing of it is lost.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qalora_export.data import lines
from qalora_export.data.records import Record, iter_records
from qalora_export.data.rendering import AS_TEXT, around, plain_ids, render, require_template
from qalora_export.errors import InputError
from qalora_export.progress import track

logger = logging.getLogger(__name__)
IGNORED = -100  # the label of a token that is not learned (torch cross_entropy's ignore_index)
MARKERS = re.compile(r"{%-?\s*generation\s*-?%}")
SHOWN_LINES = 10
TooLong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True, slots=True)
class Sample:
    """ids and labels have equal length; labels[i] is ids[i] where it is learned, IGNORED elsewhere.

    The first label is always IGNORED: nothing comes before it that could predict it, and samples packed behind one
    another must not predict each other's beginning.
    """

    ids: array[int]  # int32: a data set of a billion tokens takes 8 GB, as Python integers it would take 70
    labels: array[int]
    line: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learned(self) -> int:
        """Tokens that are learned."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(slots=True)
class Account:
    """What became of the records of a file. dropped and truncated: too long; longest: tokens of the longest seen."""

    records: int = 0
    samples: int = 0
    dropped: int = 0
    truncated: int = 0
    longest: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    lines: list[int] = field(default_factory=list)  # of the first that were too long

    def describe(self) -> str:
        """One line for people: "1,000 samples, 3 dropped as too long (lines 7, 8, 12)"."""
        text = f"{self.samples:,} samples, {self.tokens:,} tokens, {self.learned_tokens:,} learned"
        for count, what in ((self.dropped, "dropped"), (self.truncated, "truncated")):
            text += f", {count:,} {what} as too long" if count else ""
        return text + (f" (line{'s' if len(self.lines) > 1 else ''} {self.shown_lines()})" if self.lines else "")

    def shown_lines(self) -> str:
        more = self.dropped + self.truncated - len(self.lines)
        return ", ".join(map(str, self.lines)) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, slots=True)
class SampleSet:
    """The samples of one file, none longer than the limit, and what became of the others."""

    samples: list[Sample]
    account: Account

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)


def load_samples(
    path: Path,
    tokenizer: Any,
    *,
    format: str = "auto",
    sequence_length: int,
    context: int | None = None,
    too_long: TooLong = "drop",
) -> SampleSet:
    """All samples of a data file, none longer than `sequence_length` or the model's `context`, in tokens.

    Raises InputError as records.iter_records does, for a record without an answer, for a missing or unsuitable chat
    template, for samples that are too long where `too_long` is "error", and when none is left.
    """
    limit = min(sequence_length, context or sequence_length)
    found = SampleSet([], account := Account())
    document = _Document(tokenizer, limit)
    for record in track(iter_records(path, format), f"tokenizing {path.name}", lines.count(path)):
        record.need_answer()
        account.records += record.begins
        if record.text is not None:
            found.samples.extend(document.add(record))
            continue
        sample = None if record.oversize else _conversation(record, tokenizer)
        account.longest = max(account.longest, len(sample) if sample else 0)
        if sample is not None and len(sample) <= limit:
            found.samples.append(sample)
            continue
        if len(account.lines) < SHOWN_LINES:
            account.lines.append(record.line)
        kept = _beginning(sample, limit) if too_long == "truncate" and sample is not None else None
        account.truncated += kept is not None
        account.dropped += kept is None
        if kept is not None:
            found.samples.append(kept)
    account.samples = len(found)
    account.tokens = sum(map(len, found))
    account.learned_tokens = sum(sample.learned for sample in found)
    if (account.dropped or account.truncated) and too_long == "error":
        raise _too_long(path, account, limit, sequence_length, context)
    if not found.samples:
        if account.dropped:
            raise _too_long(path, account, limit, sequence_length, context)
        raise InputError("the data set holds no text to learn from", where=path, fix="give longer documents")
    if account.lines:
        logger.warning("%s: %s", path.name, account.describe())
    return found


def _beginning(sample: Sample, limit: int) -> Sample | None:
    """The first `limit` tokens, or None if nothing of them is learned."""
    cut = Sample(sample.ids[:limit], sample.labels[:limit], sample.line)
    return cut if cut.learned else None


class _Document:
    """Running text as samples of `length` tokens. A document may arrive in several records."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._before, self._after = around(tokenizer)
        self._end = tokenizer.eos_token_id
        self._ids = array("i")
        self._line = 0

    def add(self, record: Record) -> Iterator[Sample]:
        assert record.text is not None
        if record.begins:
            self._ids = array("i", self._before)
        if not self._ids or record.begins:
            self._line = record.line
        self._ids.extend(plain_ids(self._tokenizer, record.text))
        if record.ends:
            self._ids.extend(self._after)
            if self._end is not None and self._ids[-1] != self._end:
                self._ids.append(self._end)
        whole = len(self._ids) if record.ends else len(self._ids) // self._length * self._length
        for start in range(0, whole, self._length):
            piece = self._ids[start : min(start + self._length, whole)]
            if len(piece) > 1:  # a last piece of one token predicts nothing
                yield Sample(piece, array("i", [IGNORED]) + piece[1:], self._line)
            self._line = record.line
        self._ids = self._ids[whole:]


def _sample(ids: list[int], learned: list[bool], line: int) -> Sample:
    labels = [token if keep else IGNORED for token, keep in zip(ids, learned, strict=True)]
    labels[:1] = [IGNORED for _ in labels[:1]]  # nothing predicts the first; a template may render no token at all
    return Sample(array("i", ids), array("i", labels), line)


def _conversation(record: Record, tokenizer: Any) -> Sample:
    require_template(record, tokenizer, otherwise=f"{AS_TEXT} and pass --format text (every token is then learned)")
    marked = MARKERS.search(tokenizer.get_chat_template()) and not record.unlearned
    ids, learned = (_marked if marked else _by_prefix)(record, tokenizer)
    sample = _sample(ids, learned, record.line)
    if not sample.learned:
        raise InputError(
            "the chat template shows nothing of the answer", where=record.where, fix="check the chat template"
        )
    return sample


def _rendered(record: Record, tokenizer: Any, **options: Any) -> Any:
    return render(record, tokenizer, tokenize=True, return_dict=True, **options)


def _marked(record: Record, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Mask from the template's {% generation %} blocks."""
    encoded = _rendered(record, tokenizer, return_assistant_tokens_mask=True)
    return list(encoded["input_ids"]), [bool(keep) for keep in encoded["assistant_masks"]]


def _by_prefix(record: Record, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Mask from renderings that end before and after each answer."""
    ids = list(_rendered(record, tokenizer)["input_ids"])
    learned = [False] * len(ids)
    for index in record.answers:
        if index == 0:
            raise InputError(
                "a conversation cannot begin with the assistant",
                where=record.where,
                why="this chat template has no {% generation %} markers, so an answer is found by what comes before it",
                fix="put a user or system message first",
            )
        before = list(_rendered(record, tokenizer, until=index, add_generation_prompt=True)["input_ids"])
        last = index == len(record.messages) - 1
        after = ids if last else list(_rendered(record, tokenizer, until=index + 1)["input_ids"])
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise InputError(
                f"cannot tell which tokens are answer {index + 1}",
                where=record.where,
                why="the template renders earlier turns differently once later ones follow, or the "
                "answer's first characters merge with the prompt into one token",
                fix="begin the answer with a visible character, keep one answer per line, or add "
                "{% generation %} markers to the chat template",
            )
        for position in range(len(before), _end_of_turn(after, len(before), tokenizer)):
            learned[position] = True
    return ids, learned


def _end_of_turn(ids: list[int], begin: int, tokenizer: Any) -> int:
    """End of the answer that starts at `begin`: white space after its last control token is left out."""
    control = tokenizer.added_tokens_decoder
    last = max((i for i in range(begin, len(ids)) if ids[i] in control), default=None)
    if last is None or tokenizer.decode(ids[last + 1 :]).strip():
        return len(ids)
    return last + 1


def _too_long(path: Path, account: Account, limit: int, sequence_length: int, context: int | None) -> InputError:
    long = account.dropped + account.truncated
    longest = account.longest
    fits = limit < longest <= (context or longest)
    name = "sequence_length" if limit == sequence_length else "the model's context"
    how = (
        f"pass --sequence-length {longest} or more, or shorten these lines"
        if fits
        else (
            f"shorten or remove these lines; the model's context is {context} tokens"
            if context
            else "shorten these lines"
        )
    )
    return InputError(
        f"{long} of {account.records} samples are longer than {name}, {limit} tokens",
        where=f"{path}, line{'s' if long > 1 else ''} {account.shown_lines()}",
        why=f"the longest has {longest}" if longest > limit else "they are beyond what any model reads at once",
        fix=f'{how}; too_long = "drop" leaves them out and counts them' if account.samples else how,
    )
