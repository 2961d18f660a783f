"""The README's table of planted faults: `python -m tests.faults.table`."""

from __future__ import annotations

import sys

from tests.faults.cases import FAULTS, Fault

NAMED = {"G4": "the positions after the first token"}


def rows() -> list[tuple[str, str, str, str]]:
    """(fault, runtimes it is planted for, gates that turn red, what is named)."""
    return [(fault.name, ", ".join(fault.plant), ", ".join(fault.gates), _named(fault)) for fault in FAULTS]


def _named(fault: Fault) -> str:
    place = fault.place_for(next(iter(fault.plant))).strip(": ")
    named = NAMED.get(fault.gates[0], f"`{place}`")
    return f"{named}; bisect: `{fault.bisect}`" if fault.bisect and fault.bisect != place else named


def markdown() -> str:
    lines = ["| planted fault | in | caught by | named |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
