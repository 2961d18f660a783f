"""Code blocks and headings of our own Markdown files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PLACE = re.compile(r"\A# (\S+/\S+\.py)\n")


@dataclass(frozen=True)
class Block:
    """One fenced block of Python. place: the file that it is or becomes, from its first line; None: it runs."""

    code: str
    place: str | None


def blocks(document: Path) -> list[Block]:
    found = []
    for code in FENCE.findall(document.read_text(encoding="utf-8")):
        place = PLACE.match(code)
        found.append(Block(code[place.end() :] if place else code, place[1] if place else None))
    return found


def headings(document: Path) -> list[str]:
    """Of every level, in order; lines in fenced blocks are no headings."""
    return HEADING.findall(FENCED.sub("", document.read_text(encoding="utf-8")))
