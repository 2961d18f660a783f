from __future__ import annotations

import pytest

from qalora_export.verify.report import plots


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of everything but the pictures."""
    for name in ("error_by_position", "kl_histogram", "agreement"):
        monkeypatch.setattr(plots, name, lambda *_: "data:image/png;base64,")
