"""One driver for every module here: its imports are paid once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.survival.driven import Driver


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with Driver(tmp_path_factory.mktemp("logs")) as process:
        yield process
