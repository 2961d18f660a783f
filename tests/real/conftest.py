"""These tests fetch packages, so they run only when asked for: `make test-real`, `-m real`, or their path."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.opt_in import only_when_asked


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only_when_asked(config, items, Path(__file__).parent, "real")
