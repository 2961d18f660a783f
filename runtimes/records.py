"""What a runner package says about itself, in its __init__.py; launch.RUNNERS finds every one by looking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Runner:
    """module: run with `python -m`. package: on PyPI. artifact: what --model must be. taps: the module that shows the
    values inside a graph, if the runtime does. remedies: by signal name, what is known of this runtime, in place of
    launch.REMEDIES.
    """

    module: str
    package: str
    artifact: str
    taps: str | None = None
    remedies: Mapping[str, str] = field(default_factory=dict)
