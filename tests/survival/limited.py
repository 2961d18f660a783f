"""A process whose files may not grow, as on a full disk."""

from __future__ import annotations

import resource
import signal


def prepare(limit: str) -> None:
    """The system refuses every byte beyond `limit` of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
