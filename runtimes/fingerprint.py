"""What ran: machine, CPU flags, peak memory. Standard library only, so it works on any device."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")


def machine() -> dict[str, Any]:
    """{"architecture", "system", "model", "flags", "cores", "python"}; flags empty where the system does not tell."""
    info = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""
    return {
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "model": _first(info, r"model name|Model|Hardware") or platform.processor(),
        "flags": sorted(_first(info, r"flags|Features").split()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def peak_rss_bytes() -> int | None:
    """Largest resident set of this process so far; None where the system has no counter.

    Linux: VmHWM belongs to this program alone, while ru_maxrss also remembers the parent it was forked from.
    """
    if STATUS.exists():
        kibibytes = _first(STATUS.read_text(encoding="utf-8"), "VmHWM").split()
        return int(kibibytes[0]) * 1024 if kibibytes else None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _first(text: str, key: str) -> str:
    match = re.search(rf"^(?:{key})\s*:\s*(.*)$", text, re.MULTILINE)
    return match.group(1).strip() if match else ""
