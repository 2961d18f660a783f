"""Where ONNX Runtime GenAI's own tokenizer gives other ids than Hugging Face's: predicted, text by text.

The prediction is made from the checkpoint's files, never from those that are judged. On ordinary text, that is prose,
conversations and the user's own prompts, a difference is excused only where the user accepted it when exporting.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from qalora_export.formats.onnx.genai_text.reading import GenaiReading
from qalora_export.formats.onnx.genai_text.unicode13 import is_newer
from qalora_export.formats.onnx.genai_text.words import NotPredictableError
from qalora_export.formats.onnx.hosts import genai_tokenizer

Answer = tuple[list[int], str]


class GenaiDifferences(Mapping[int, Answer]):
    """Index of a text -> (ids that GenAI gives it, why they may differ); read when it is asked for.

    Empty where GenAI is not predictable: then its ids must be Hugging Face's.
    """

    def __init__(
        self, reading: Callable[[], GenaiReading | None], texts: Sequence[str], excused: Collection[int]
    ) -> None:
        """reading: made once, when it is needed. excused: indices of the texts that may differ."""
        self._reading, self._texts, self._excused = reading, texts, excused

    def __getitem__(self, index: int) -> Answer:
        reading = self._reading() if index in self._excused else None
        if reading is None:
            raise KeyError(index)
        text = self._texts[index]
        return reading.ids(text), reason(reading, text)

    def __iter__(self) -> Iterator[int]:
        return iter(self._excused if self._reading() else ())

    def __len__(self) -> int:
        return len(self._excused) if self._reading() else 0


def genai_differences(
    folder: Path, asked: Mapping[str, Sequence[str]], ordinary: Mapping[str, Collection[int]]
) -> dict[str, dict[str, Mapping[int, Answer]]]:
    """Table "by_design": kind -> what may differ anyway; "by_permission": kind -> all texts.

    folder: the checkpoint. ordinary: kind -> indices of the texts on which a difference needs the user's permission.
    """
    reading = cache(partial(_reading, folder))
    every = {kind: set(range(len(texts))) for kind, texts in asked.items()}
    exotic = {kind: indices - set(ordinary.get(kind, ())) for kind, indices in every.items()}
    return {
        name: {kind: GenaiDifferences(reading, texts, excused[kind]) for kind, texts in asked.items()}
        for name, excused in (("by_design", exotic), ("by_permission", every))
    }


def _reading(folder: Path) -> GenaiReading | None:
    try:
        return GenaiReading(*genai_tokenizer(folder))
    except NotPredictableError:
        return None


def reason(reading: GenaiReading, text: str) -> str:
    """Why GenAI may give this text other ids."""
    if reading.normalizes and not unicodedata.is_normalized("NFC", text):
        return "GenAI does not normalize to NFC"
    if reading.lacks(text):
        return "GenAI gives a byte without a token the id -1"
    if any(map(is_newer, text)) or "\x85" in text:
        return "GenAI knows the characters of Unicode 13"
    if reading.spaces:
        return "GenAI joins tokens in stretches that end at white space, or after 100 symbols"
    return "GenAI cuts white space and words with matchers of its own"
