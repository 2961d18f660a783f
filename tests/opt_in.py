"""Tests that need packages from a registry run only when asked for: by their marker, or by their path."""

from __future__ import annotations

from pathlib import Path

import pytest


def only_when_asked(config: pytest.Config, items: list[pytest.Item], folder: Path, marker: str) -> None:
    """Mark the tests below `folder`, and deselect them unless -m or the command line names them."""
    ours = [item for item in items if item.path.is_relative_to(folder)]
    for item in ours:
        item.add_marker(getattr(pytest.mark, marker))
    paths = [Path(word.partition("::")[0]).resolve() for word in config.args]
    if marker not in config.option.markexpr and not any(path.is_relative_to(folder) for path in paths):
        items[:] = [item for item in items if not item.path.is_relative_to(folder)]
        config.hook.pytest_deselected(items=ours)
