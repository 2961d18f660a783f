"""python -m tests.survival.fuzz --cases 100000 --seed 0

Damages every kind of file and lets its reader loose on it. Exit 0 when every case ended in an answer or one of our
errors. A finding is printed with the command that repeats it: `--target NAME --case N` (with the same seed).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(name, value)

from tests.survival.fuzz.run import Outcome, Tally, damaged, run_case, run_target
from tests.survival.fuzz.seeds import make_seeds
from tests.survival.fuzz.targets import TARGETS, Target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only targets whose name contains this")
    parser.add_argument("--case", type=int, help="only this case of the one --target, with its traceback")
    parser.add_argument("--seeds", type=Path, help="keep the good files here between runs")
    options = parser.parse_args()
    chosen = [t for t in TARGETS if not options.target or any(n == t.name for n in options.target)]
    chosen = chosen or [t for t in TARGETS if any(n in t.name for n in options.target)]
    import tests.survival.fuzz.imports  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        seeds = options.seeds or Path(temporary) / "seeds"
        if not seeds.exists():
            make_seeds(seeds)
        if options.case is not None:
            return repeat(chosen[0], seeds, Path(temporary) / "work", options.seed, options.case)
        return fuzz(chosen, seeds, Path(temporary) / "work", options.cases, options.seed)


def fuzz(targets: list[Target], seeds: Path, work: Path, cases: int, seed: int) -> int:
    total, began = sum(target.share for target in targets), time.monotonic()
    tally = Tally()
    for target in targets:
        own, start = Tally(), time.monotonic()
        run_target(target, seeds, work, range(max(1, round(cases * target.share / total))), seed, own)
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(own.counts.items()))
        print(f"{target.name:32} {time.monotonic() - start:6.1f} s  {counts}", flush=True)
        for times, case, outcome in own.findings.values():
            print(f"  {times} × {outcome.kind}: {outcome.signature}\n    {case} --seed {seed}", flush=True)
            print("    " + outcome.detail[-1500:].replace("\n", "\n    "), flush=True)
        tally.counts.update(own.counts)
        tally.findings |= own.findings
    bad = sum(count for kind, count in tally.counts.items() if not Outcome(kind).good)
    print(f"{tally.counts.total()} cases in {time.monotonic() - began:.0f} s: {dict(sorted(tally.counts.items()))}")
    print(f"{bad} bad, of {len(tally.findings)} kinds")
    return 1 if bad else 0


def repeat(target: Target, seeds: Path, work: Path, seed: int, number: int) -> int:
    """One case in this process; then which of its changes are needed for the same outcome."""
    shutil.copytree(seeds, work, symlinks=True)
    os.chdir(work)
    good = (work / target.file).read_bytes() if (work / target.file).exists() else b""
    raw, said = damaged(target, good, seed, number)
    outcome = run_case(target, work, raw)
    print(outcome.kind, outcome.signature, *said, outcome.detail, sep="\n")
    for change in range(len(said) if len(said) > 1 and not outcome.good else 0):
        alone = damaged(target, good, seed, number, only={change})[0]
        if run_case(target, work, alone).kind == outcome.kind:
            print(f"enough: {said[change]}")
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())
