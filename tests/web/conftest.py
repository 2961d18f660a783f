"""These tests need Node and npm packages, so they run only when asked for: `make test-web`, `-m web`, or their path."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.opt_in import only_when_asked
from tests.web.node import NodeUnavailableError, install


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only_when_asked(config, items, Path(__file__).parent, "web")


@pytest.fixture(scope="session")
def installed() -> Path:
    """The folder of the pinned npm packages. A machine without Node fails here: no silent skip."""
    try:
        return install()
    except NodeUnavailableError as error:
        pytest.fail(str(error), pytrace=False)
