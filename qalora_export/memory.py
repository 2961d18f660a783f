"""How much memory this process has used, how much there is, and how a number of bytes is told."""

from __future__ import annotations

import re
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def bytes_text(count: float) -> str:
    """Bytes with one digit behind the point and a unit."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 2**10:.0f} KiB"


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


def total_bytes() -> int | None:
    """Memory this process may use at most, swap included: the machine's, or its control group's; None if unknown."""
    machine = _meminfo("MemTotal"), _meminfo("SwapTotal")
    limit = _cgroup("memory.max")
    if machine[0] is None:
        return limit
    whole = machine[0] + (machine[1] or 0)
    return whole if limit is None else min(whole, limit)


def available_bytes() -> int | None:
    """Memory that is free or can be freed now; None if unknown."""
    free, limit, used = _meminfo("MemAvailable"), _cgroup("memory.max"), _cgroup("memory.current")
    if limit is None or used is None:
        return free
    room = max(0, limit - used + (_cgroup_stat("inactive_file") or 0))
    return room if free is None else min(free, room)


def _meminfo(key: str) -> int | None:
    return _counter(MEMINFO, rf"^{key}:\s*(\d+) kB", 1024)


def _cgroup(name: str) -> int | None:
    """A number of this process's control group (version 2, as containers see it); None where there is no limit."""
    return _counter(CGROUP / name, r"^(\d+)$", 1)


def _cgroup_stat(key: str) -> int | None:
    return _counter(CGROUP / "memory.stat", rf"^{key} (\d+)$", 1)


def _counter(path: Path, pattern: str, unit: int) -> int | None:
    try:
        found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * unit if found else None
