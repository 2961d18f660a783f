"""Exported artifacts of the tiny checkpoint, made once; a test that damages one copies it first."""

from pathlib import Path

import pytest

from qalora_export.verify import plots
from tests.verify.exports import Exported, export_both


@pytest.fixture(scope="session")
def exported(tiny_canonical: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_both(tiny_canonical, tmp_path_factory.mktemp("exported"))


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of everything but the pictures."""
    for name in ("error_by_position", "kl_histogram", "agreement"):
        monkeypatch.setattr(plots, name, lambda *_: "data:image/png;base64,")
