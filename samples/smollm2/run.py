"""`make real`: fetch SmolLM2, take it over, teach it, export it, prove it; then say what it took.

    python -m samples.smollm2.run [--out build/smollm2]

Prints seconds per stage, CPU seconds, the largest memory of this process (that of each runtime is in report.json), the
score before and after, and every gate. Writes the same to result.json in the output folder. Exit codes are those of
`qalora-export`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import qalora_export as q
from qalora_export.errors import QaloraError
from samples.smollm2.fetch import fetch

RECIPE = Path(__file__).parent / "recipe.toml"
RESULT = "result.json"
KIB_IN_MIB = 1024  # ru_maxrss counts KiB on Linux


class Stages:
    """Seconds and report of every stage that ran; a stage that was up to date is not in it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.reports: dict[str, Any] = {}
        self._last = time.monotonic()

    def ended(self, name: str, report: Any) -> None:
        now = time.monotonic()
        self.seconds[name], self.reports[name], self._last = round(now - self._last, 1), report, now


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("qalora_export").setLevel(logging.INFO)
    fetch()
    recipe = q.load_recipe(RECIPE)
    recipe = recipe.model_copy(update={"out": str(args.out)}) if args.out else recipe
    stages, code = Stages(), 0
    try:
        q.run(recipe, on_stage=stages.ended)
    except QaloraError as error:
        print(error, file=sys.stderr)
        code = int(error.code)
    result = summary(stages)
    print(json.dumps(result, indent=1))
    (Path(recipe.out) / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return code


def summary(stages: Stages) -> dict[str, Any]:
    """What the stages that ran measured."""
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": stages.seconds,
        "cpu_seconds": {"this process": _cpu(resource.RUSAGE_SELF), "runtimes": _cpu(resource.RUSAGE_CHILDREN)},
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // KIB_IN_MIB,
    }
    for name in ("evaluate base", "evaluate merged"):
        if score := stages.reports.get(name):
            found[name] = f"{score.exact}/{score.total}"
    if report := stages.reports.get("verify-parity"):
        found["verdict"] = report.verdict
        found["gates"] = {
            f"{entry.gate} {entry.runtime}": {
                "status": entry.status,
                "checks": {check.figure: [check.measured, check.bound] for check in entry.checks},
            }
            for entry in report.entries
        }
    return found


def _cpu(who: int) -> float:
    used = resource.getrusage(who)
    return round(used.ru_utime + used.ru_stime, 1)


if __name__ == "__main__":
    sys.exit(main())
