"""Recipes: strict, frozen, helpful about mistakes, and written back as they were read."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.recipe_file import dump_toml, load_recipe

MINIMAL = 'model = "m"\nout = "o"\n'


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nrnak = 3\n", "unknown key 'train.rnak', did you mean 'rank'?"),
        ("[quantise]\nbits = 4\n", "did you mean 'quantize'?"),
        ("[export.gguf]\nlayuot = 'q4_1'\n", "did you mean 'layout'?"),
        ("[[quantize.rules]]\nmatch = '*'\nskpi = true\n", "did you mean 'skip'?"),
        ("[quantize]\nbits = 7\n", "quantize.bits"),
        ("[quantize]\nbits = '4'\n", "quantize.bits"),
        (
            "[verify]\nruntimes = ['llamacpp']\n",
            "verify.runtimes: no runtime is called 'llamacpp', did you mean 'llama.cpp'?",
        ),
        ("[quantize]\nbits = 4.0\n", "quantize.bits: Input should be a valid integer"),
        ("[compare]\nbits = [4, 3.0]\n", "compare.bits: Input should be a valid integer"),
        ("[quantize]\nseed = -1\n", "quantize.seed: Input should be greater than or equal to 0"),
        ("[train]\nseed = 4294967296\n", "train.seed: Input should be less than 4294967296"),
        ("[verify]\nruntimes = ['tensorrt']\n", "known: llama.cpp, onnxruntime, onnxruntime-genai"),
        ("[train]\nrank = 0\n", "train.rank"),
        ("[train]\nrank = 1_000_000_000\n", "train.rank"),
        ("[train]\nepochs = inf\n", "train.epochs: Input should be a finite number"),
        ("[train]\nepochs = 1e308\n", "train.epochs"),
        ("[train]\nlearning_rate = inf\n", "train.learning_rate: Input should be a finite number"),
        ("[train]\nalpha = nan\n", "train.alpha: Input should be a finite number"),
        ("[train]\nmax_steps = 9_223_372_036_854_775_807\n", "train.max_steps"),
        ("[verify]\nmax_kl = inf\n", "verify.max_kl: Input should be a finite number"),
        ("[train\n", "not valid TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(InputError, match=r"recipe\.toml") as caught:
        load_recipe(_write(tmp_path, MINIMAL + text))
    assert expected in str(caught.value)


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recipe not found"):
        load_recipe(tmp_path / "none.toml")


def test_overrides_beat_the_file_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    recipe = load_recipe(str(_write(tmp_path, MINIMAL + "[train]\nrank = 4\ndata = 'd.jsonl'\n")), {"train.rank": 8})
    assert recipe.train.rank == 8
    assert recipe.model == str(tmp_path / "m")
    assert recipe.train.data == str(tmp_path / "d.jsonl")


def test_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, MINIMAL))
    with pytest.raises(ValidationError):
        recipe.train.rank = 3  # type: ignore[misc]


def test_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    text = (
        MINIMAL + "[[quantize.rules]]\nmatch = '*.down_proj'\nbits = 8\n[[quantize.rules]]\nmatch = 'x'\nskip = true\n"
    )
    recipe = load_recipe(_write(tmp_path, text))
    assert load_recipe(_write(tmp_path, dump_toml(recipe))) == recipe


def test_the_sample_recipe_is_valid() -> None:
    recipe = load_recipe(Path(__file__).parent.parent / "samples" / "devices" / "recipe.toml")
    assert recipe.evaluate is not None
    assert recipe.verify.runtimes is not None
    assert len(recipe.verify.runtimes) == 3


DEEP = {
    "lists": "x = " + "[" * 3000 + "]" * 3000,
    "tables": "x = " + "{a=" * 900 + "1" + "}" * 900,
    "dotted key": ".".join("a" * 2000) + " = 1",
    "dotted header": "[" + ".".join("a" * 900) + "]\nb = 1",
    "long number": "x = " + "9" * 5000,
    "key without end": ".".join("a" * 60_000) + " = 1",
}


@pytest.mark.parametrize("case", DEEP)
def test_a_recipe_that_no_parser_likes_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qalora_export.safety.confined.SECONDS", 0.5)
    monkeypatch.setattr("qalora_export.safety.confined.PER_SECOND", 10**6)
    with pytest.raises((InputError, UnsafeInputError)):
        load_recipe(_write(tmp_path, MINIMAL + DEEP[case] + "\n"))


def test_a_huge_file_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UnsafeInputError, match="larger than"):
        load_recipe(_write(tmp_path, MINIMAL + "# " + "x" * 2**20))


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    assert load_recipe(_write(tmp_path, "\ufeff" + MINIMAL)).out == str(tmp_path / "o")
