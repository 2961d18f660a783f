"""How much memory this process has used."""

from __future__ import annotations

import re
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far; 0 where the system has no counter.

    The same counter as qalora_runtimes.fingerprint, which may not import from here: on Linux VmHWM, which belongs to
    this program alone, while ru_maxrss also remembers the parent it was forked from.
    """
    if STATUS.exists():
        found = re.search(r"^VmHWM:\s*(\d+) kB", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
