"""Write the data of the comparison: text of another kind than the base's, and puzzles that it learns in part.

    python -m samples.compare.make_task --out samples/compare        # fetches the text by package name, passages.py

The devices sample is solved by every method (300 of 300), so it tells none apart. Here each kind of puzzle has its own
difficulty, and 16-bit LoRA itself stays below 100 %. A score over 200 answers still moves by several per cent with the
seed; what settles a claim is the loss on held-out text, tens of thousands of tokens. Both are learned in one training,
half of its tokens each. No puzzle of one split is in another. The puzzles are CC0: do with them what you like.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

SIZES = {"train": 4200, "validation": 150, "test": 200}
SEED = 20261130
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    "red",
    "blue",
    "green",
    "north",
    "south",
    "east",
    "west",
    "apple",
    "pear",
    "plum",
    "iron",
    "gold",
    "oak",
    "elm",
)


def add(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(10, 100), draw.randrange(10, 100)
    return f"Add {a} and {b}.", str(a + b)


def largest(draw: random.Random) -> tuple[str, str]:
    numbers = [draw.randrange(100, 1000) for _ in range(3)]
    return f"Which is the largest of {numbers[0]}, {numbers[1]} and {numbers[2]}?", str(max(numbers))


def backwards(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(WORDS, draw.randrange(3, 6))
    return f"Say backwards: {' '.join(words)}", " ".join(reversed(words))


def letters(draw: random.Random) -> tuple[str, str]:
    word = "".join(draw.choice(LETTERS) for _ in range(draw.randrange(3, 6)))
    return f"Spell {word}.", "-".join(word)


def count(draw: random.Random) -> tuple[str, str]:
    words = [draw.choice(WORDS[:4]) for _ in range(draw.randrange(3, 9))]
    wanted = draw.choice(words)
    return f"How often does {wanted} come in: {' '.join(words)}", str(words.count(wanted))


def clock(draw: random.Random) -> tuple[str, str]:
    hour, minute, later = draw.randrange(24), draw.randrange(60), draw.randrange(5, 60, 5)
    total = 60 * hour + minute + later
    return f"{later} minutes after {hour:02}:{minute:02}?", f"{total // 60 % 24:02}:{total % 60:02}"


KINDS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (add, largest, backwards, letters, count, clock)


def make(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """Split -> records with prompt and completion, kinds in turn."""
    draw, seen = random.Random(seed), set[str]()
    splits: dict[str, list[dict[str, str]]] = {}
    for split, size in SIZES.items():
        rows: list[dict[str, str]] = []
        while len(rows) < size:
            prompt, answer = KINDS[len(rows) % len(KINDS)](draw)
            if prompt not in seen:
                seen.add(prompt)
                rows.append({"prompt": prompt, "completion": answer})
        splits[split] = rows
    return splits


def mixed(puzzles: list[dict[str, str]], texts: list[dict[str, str]]) -> list[dict[str, str]]:
    """Both in one file, the puzzles in their order with the texts evenly between them."""
    places = [(index / len(rows), row) for rows in (puzzles, texts) for index, row in enumerate(rows)]
    return [row for _, row in sorted(places, key=lambda place: place[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    from samples.compare import passages  # needs the network

    puzzles, texts = make(), {split: [{"text": text} for text in found] for split, found in passages.make().items()}
    files = {
        "train": mixed(puzzles["train"], texts["train"]),
        "validation": mixed(puzzles["validation"], texts["validation"]),
        "test": puzzles["test"],
        "text": texts["held_out"],
    }
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
