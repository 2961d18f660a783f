"""The comparison's data is what its script makes, and no question of one split is in another."""

import json
from pathlib import Path

from qalora_export.cli.compare import QUICK, quick_methods
from qalora_export.comparison.methods import METHODS
from qalora_export.recipe_file import load_recipe
from samples.compare import make_task

SAMPLE = Path(make_task.__file__).parent


def test_the_committed_files_are_what_the_script_makes() -> None:
    splits = make_task.make()
    for split, rows in splits.items():
        assert [json.loads(line) for line in (SAMPLE / f"{split}.jsonl").read_text().splitlines()] == rows
    asked = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(asked)) == len(asked)


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
    assert recipe.compare.bits == (4, 3, 2)


def test_a_first_look_trains_no_variants() -> None:
    found = quick_methods()
    left_out = [method for method in METHODS if method not in found]
    assert {method.rpartition("-")[2] for method in left_out if not method.startswith("lq-")} == {
        *("mixed", "coarse", "plain", "refit")
    }
    recipe = load_recipe(SAMPLE / "recipe.toml", dict(QUICK) | {"compare.methods": found})
    assert recipe.compare.bits == (4,) and not recipe.compare.prove and not recipe.compare.speed
