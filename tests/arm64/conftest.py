"""These tests fetch an arm64 system and emulate it, so they run only when asked for: `make test-arm64`, `-m arm64`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.arm64.machine import Arm64, ArmUnavailableError, install
from tests.opt_in import only_when_asked


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only_when_asked(config, items, Path(__file__).parent, "arm64")


@pytest.fixture(scope="session")
def arm() -> Arm64:
    """An arm64 Python with the pinned runtimes. A machine that cannot have one fails here: no silent skip."""
    try:
        return install()
    except ArmUnavailableError as error:
        pytest.fail(str(error), pytrace=False)
