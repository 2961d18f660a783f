"""Exported artifacts of the tiny checkpoint, made once; a test that damages one copies it first."""

from pathlib import Path

import pytest

from tests.verify.exports import Exported, export_both


@pytest.fixture(scope="session")
def exported(tiny_canonical: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_both(tiny_canonical, tmp_path_factory.mktemp("exported"))
