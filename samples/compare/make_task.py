"""Write the data of the comparison: small string and number puzzles that a 7.5 M-parameter model learns in part.

    python samples/compare/make_task.py --out samples/compare

The devices sample is solved by every method (300 of 300), so it tells none apart. Here each kind of puzzle has its own
difficulty, and 16-bit LoRA itself stays below 100 %. No puzzle of one split is in another. CC0: do with it what you
like.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

SIZES = {"train": 3000, "validation": 150, "test": 200}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    for split, rows in make().items():
        (args.out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
