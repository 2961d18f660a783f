"""Everything that an artifact holds, accounted for: each entry against the one that a fresh export would write.

The expected side is a fresh export of the checkpoint with the artifact's own options, made in memory; the found side
comes from the independent readers. The two are compared entry by entry, whatever an entry is (a metadata key, a node,
an attribute, a file), so what nobody thought of is a difference like any other.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MACHINE = "sine of this machine"


@dataclass(frozen=True)
class Account:
    """entries: how many were compared. differences: one line for each that is missing, not expected, or another one.

    options: what the export was asked for, read from the artifact. harmless: what differs and steers nothing, with the
    reason. other_bytes: files that are not byte for byte those of a fresh export; excuse: why that may be so, and ""
    where it may not. unproven: differences in what other versions of the tools may make otherwise: neither right nor
    wrong.
    """

    entries: int
    differences: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    other_bytes: tuple[str, ...] = ()
    excuse: str = ""
    unproven: tuple[str, ...] = ()

    def describe(self) -> str:
        """One sentence for a report."""
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        same = "byte for byte what a fresh export gives"
        if self.other_bytes:
            same = f"{', '.join(self.other_bytes)} not {same}" + (f" ({self.excuse})" if self.excuse else "")
        known = f"; steering nothing: {', '.join(self.harmless)}" if self.harmless else ""
        return f"{self.entries} entries accounted for ({options}); {same}{known}"


def tools(*packages: str) -> dict[str, str]:
    """What the bytes of an export follow from beside checkpoint and settings: versions of packages, and whose sine.

    numpy computes float32 sines with the instructions of the machine, and tables of them may differ in the last bit.
    """
    return {name: importlib.metadata.version(name) for name in packages} | {MACHINE: _sine()}


def _sine() -> str:
    introspect = getattr(np.lib, "introspect", None)  # from numpy 2.1 on
    if introspect is None:
        return platform.machine()
    found = introspect.opt_func_info(func_name="^sin$", signature="float32")  # numpy's names of instruction sets
    kinds = sorted({str(kind["current"]) for kinds in found.values() for kind in kinds.values()})
    return ", ".join([platform.machine(), *kinds])


def other_tools(recorded: Mapping[str, Any], now: Mapping[str, str]) -> str:
    """Which of the tools an artifact was made with are others here, in words; "" when all are the same.

    recorded: the table `made_with` of its manifest; an artifact without one may have been made with any.
    """
    if not recorded:
        return "nothing says which versions made it"
    changed = [
        f"{name} {recorded.get(name, 'of an unknown version')} made it, here is {version}"
        for name, version in now.items()
        if recorded.get(name) != version
    ]
    return "; ".join(changed)
