"""These tests fetch packages, so they run only when asked for: `make test-real`, `-m real`, or their path."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    for item in ours:
        item.add_marker(pytest.mark.real)
    paths = [Path(word.partition("::")[0]).resolve() for word in config.args]
    if "real" not in config.option.markexpr and not any(path.is_relative_to(HERE) for path in paths):
        items[:] = [item for item in items if not item.path.is_relative_to(HERE)]
        config.hook.pytest_deselected(items=ours)
