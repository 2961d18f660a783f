"""Records → token ids and labels: the tokenizer's own chat template, loss on the assistant's answers only.

Which tokens are answers is read off the template, never guessed:

  1. a template with {% generation %} markers says so itself;
  2. otherwise each answer is what the template adds when it is rendered with the answer instead of the generation
     prompt. That holds only if the tokens of the shorter rendering begin those of the longer one, which is checked for
     every answer. White space after the end-of-turn token belongs to the next turn and is not learned.

Plain text learns every token: tokenizer's own BOS, then the text, then EOS.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_export.data.records import Messages, Record, read_records
from qalora_export.errors import InputError
from qalora_export.progress import track

IGNORED = -100  # the label of a token that is not learned (torch cross_entropy's ignore_index)
MARKERS = re.compile(r"{%-?\s*generation\s*-?%}")
SHOWN_LINES = 10


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


def load_samples(
    path: Path, tokenizer: Any, *, format: str = "auto", sequence_length: int, context: int | None = None
) -> list[Sample]:
    """All samples of a data file, none longer than `sequence_length` or the model's `context`, in tokens.

    A chat or instruction sample that is longer is refused, since cutting it would cut an answer; a text document is
    divided into pieces, nothing is dropped. Raises InputError as data.read_records does, and for a missing or
    unsuitable chat template.
    """
    samples: list[Sample] = []
    records = read_records(path, format)
    for record in track(records, f"tokenizing {path.name}", total=len(records)):
        if record.text is not None:
            samples += _pieces(record, tokenizer, min(sequence_length, context or sequence_length))
        else:
            samples.append(_conversation(path, record, tokenizer))
    if not samples:
        raise InputError("the data set holds no text to learn from", where=path, fix="give longer documents")
    _refuse_long(path, samples, sequence_length, context)
    return samples


def _pieces(record: Record, tokenizer: Any, length: int) -> list[Sample]:
    ids = list(tokenizer(record.text)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    # A last piece of one token predicts nothing.
    return [_sample(piece, [True] * len(piece), record.line) for piece in pieces if len(piece) > 1]


def _sample(ids: list[int], learned: list[bool], line: int) -> Sample:
    labels = [token if keep else IGNORED for token, keep in zip(ids, [False, *learned[1:]], strict=True)]
    return Sample(array("i", ids), array("i", labels), line)


def _conversation(path: Path, record: Record, tokenizer: Any) -> Sample:
    where = f"{path}, line {record.line}"
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template",
            where=where,
            why="chat and instruction data are rendered with the model's own template",
            fix="put chat_template.jinja into the model's folder, or render the conversations yourself "
            'into {"text": "..."} lines and pass --format text (every token is then learned)',
        )
    render = _marked if MARKERS.search(tokenizer.get_chat_template()) else _by_prefix
    ids, learned = render(record.messages, tokenizer, where)
    sample = _sample(ids, learned, record.line)
    if all(label == IGNORED for label in sample.labels):
        raise InputError("the chat template shows nothing of the answer", where=where, fix="check the chat template")
    return sample


def _marked(messages: Messages, tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    """Mask from the template's {% generation %} blocks."""
    encoded = render(messages, tokenizer, where, return_assistant_tokens_mask=True)
    return list(encoded["input_ids"]), [bool(keep) for keep in encoded["assistant_masks"]]


def _by_prefix(messages: Messages, tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    """Mask from renderings that end before and after each answer."""
    ids = list(render(messages, tokenizer, where)["input_ids"])
    learned = [False] * len(ids)
    for index, (role, _) in enumerate(messages):
        if role != "assistant":
            continue
        if index == 0:
            raise InputError(
                "a conversation cannot begin with the assistant",
                where=where,
                why="this chat template has no {% generation %} markers, so an answer is found by what comes before it",
                fix="put a user or system message first",
            )
        before = list(render(messages[:index], tokenizer, where, add_generation_prompt=True)["input_ids"])
        last = index == len(messages) - 1
        after = ids if last else list(render(messages[: index + 1], tokenizer, where)["input_ids"])
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise InputError(
                f"cannot tell which tokens are answer {index + 1}",
                where=where,
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


def render(messages: Messages, tokenizer: Any, where: str, **options: Any) -> Any:
    """apply_chat_template (Transformers runs it in Jinja's immutable sandbox) with errors that name the line."""
    from jinja2.exceptions import TemplateError

    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
    except (TemplateError, ValueError) as error:
        raise InputError(
            "the chat template refuses the conversation",
            where=where,
            why=str(error),
            fix="check the order of roles the model's template expects",
        ) from error


def _refuse_long(path: Path, samples: list[Sample], sequence_length: int, context: int | None) -> None:
    limit = min(sequence_length, context or sequence_length)
    long = [sample for sample in samples if len(sample) > limit]
    if not long:
        return
    lines = ", ".join(str(sample.line) for sample in long[:SHOWN_LINES])
    more = f" and {len(long) - SHOWN_LINES} more" if len(long) > SHOWN_LINES else ""
    longest = max(len(sample) for sample in long)
    fits = longest <= (context or longest)
    name = "sequence_length" if limit == sequence_length else "the model's context"
    raise InputError(
        f"{len(long)} of {len(samples)} samples are longer than {name}, {limit} tokens",
        where=f"{path}, line{'s' if len(long) > 1 else ''} {lines}{more}",
        why=f"the longest has {longest}; cutting it would cut the answer it should learn",
        fix=f"pass --sequence-length {longest} or more, or shorten these lines"
        if fits
        else f"shorten or remove these lines; the model's context is {context} tokens",
    )
