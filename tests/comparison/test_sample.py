"""The comparison's data is what its script makes, and no question or passage of one split is in another."""

import json
from pathlib import Path

from qalora_export.cli.compare import QUICK, quick_methods
from qalora_export.comparison.methods import METHODS
from qalora_export.recipe_file import load_recipe
from samples.compare import make_task, passages

SAMPLE = Path(make_task.__file__).parent


def _rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (SAMPLE / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_the_committed_puzzles_are_what_the_script_makes() -> None:
    splits = make_task.make()
    for split, rows in splits.items():
        assert [row for row in _rows(split) if "text" not in row] == rows
    asked = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(asked)) == len(asked)


def test_every_split_has_passages_of_its_own_evenly_between_the_puzzles() -> None:
    found = {split: [row["text"] for row in _rows(split) if "text" in row] for split in ("train", "validation", "text")}
    assert {split: len(texts) for split, texts in found.items()} == {
        "train": passages.SIZES["train"],
        "validation": passages.SIZES["validation"],
        "text": passages.SIZES["held_out"],
    }
    every = [text for texts in found.values() for text in texts]
    assert len(set(every)) == len(every)
    half = _rows("train")[: len(_rows("train")) // 2]
    assert sum("text" in row for row in half) == passages.SIZES["train"] // 2


def test_neighbouring_verses_make_a_passage() -> None:
    verses = ["a" * 200, "b" * 90, "c" * 20, "d" * 400]
    assert list(passages.passages(verses)) == ["a" * 200 + " " + "b" * 90, "c" * 20, "d" * 400]


def test_answers_are_right() -> None:
    for row in make_task.make()["test"]:
        words = row["prompt"].rstrip(".?").split()
        if words[0] == "Add":
            assert int(row["completion"]) == int(words[1]) + int(words[3])
        if words[0] == "Say":
            assert row["completion"].split() == words[2:][::-1]


def test_its_recipe_is_one() -> None:
    recipe = load_recipe(SAMPLE / "recipe.toml")
    assert recipe.evaluate is not None and Path(recipe.evaluate.data) == SAMPLE / "test.jsonl"
    assert recipe.compare.bits == (4, 3, 2) and recipe.compare.text == str(SAMPLE / "text.jsonl")


def test_a_first_look_trains_no_variants() -> None:
    found = quick_methods()
    left_out = [method for method in METHODS if method not in found]
    assert {method.rpartition("-")[2] for method in left_out if not method.startswith("lq-")} == {
        *("mixed", "coarse", "plain", "refit")
    }
    trained = [method for method in found if METHODS[method].trained]
    assert trained == ["lora", "qlora", "qlora+gptq", "qlora+k-quants", "qa-lora", "qa-lora+"]
    recipe = load_recipe(SAMPLE / "recipe.toml", dict(QUICK) | {"compare.methods": found})
    assert recipe.compare.bits == (4,) and not recipe.compare.prove and not recipe.compare.speed
