"""What ran: machine, CPU flags, peak memory. Standard library only, so it works on any device."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")
# What the kernel, or an emulator in its place, tells a program that it may use: asm/hwcap.h of Linux for arm64. The
# flags by which runtimes choose kernels; /proc/cpuinfo under an emulator is still that of the machine below.
AT_HWCAP, AT_HWCAP2 = 16, 26
HWCAP = {"asimd": 1, "fphp": 9, "asimdhp": 10, "asimdrdm": 12, "fcma": 14, "asimddp": 20, "sve": 22, "asimdfhm": 23}
HWCAP2 = {"sve2": 1, "svei8mm": 9, "svebf16": 12, "i8mm": 13, "bf16": 14, "sme": 23}


def machine() -> dict[str, Any]:
    """{"architecture", "system", "model", "flags", "cores", "python"}; flags: those that a program can use here, empty
    where the system does not tell.
    """
    info = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""
    architecture = platform.machine()
    return {
        "architecture": architecture,
        "system": f"{platform.system()} {platform.release()}",
        "model": model_of(info, architecture) or platform.processor(),
        "flags": arm_flags() if architecture == "aarch64" else sorted(_first(info, r"flags|Features").split()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def model_of(info: str, architecture: str) -> str:
    """The processor by /proc/cpuinfo, "" where it is not told. Arm cores say their number alone."""
    name = _first(info, r"model name|Model|Hardware")
    if architecture == "aarch64" and _first(info, "vendor_id"):  # a key of x86
        return f"emulated on {name}"
    implementer, part = (_first(info, key) for key in ("CPU implementer", "CPU part"))
    return name or (f"Arm implementer {implementer}, part {part}" if part else "")


def arm_flags() -> list[str]:
    """Flags of HWCAP and HWCAP2 by their names in /proc/cpuinfo; empty where the C library cannot be asked."""
    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):
        return []
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    words = ((HWCAP, getauxval(AT_HWCAP)), (HWCAP2, getauxval(AT_HWCAP2)))
    return sorted(name for names, word in words for name, bit in names.items() if word >> bit & 1)


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
