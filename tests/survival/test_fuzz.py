"""A small share of the fuzzer's cases: every reader, the same damage in every run. The long run is `make fuzz`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.survival.fuzz import imports  # noqa: F401
from tests.survival.fuzz.run import Tally, damaged, run_target
from tests.survival.fuzz.seeds import make_seeds
from tests.survival.fuzz.targets import TARGETS, Target

CASES = int(os.environ.get("QALORA_FUZZ_CASES", "12"))  # of a target with share 1


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "seeds"
    folder.mkdir()
    return make_seeds(folder)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files_are_refused_or_read(target: Target, seeds: Path) -> None:
    """No traceback, no hang, no memory beyond the file's, no damage accepted that a manifest refutes."""
    tally = Tally()
    run_target(target, seeds, seeds.parent / "work", range(max(1, round(CASES * target.share))), 0, tally)
    assert not tally.findings, tally.findings


def test_a_case_is_the_same_damage_in_every_process() -> None:
    target = TARGETS[0]
    raw = b'model = "a"\nout = "b"\n'
    assert damaged(target, raw, 0, 7) == damaged(target, raw, 0, 7)
    assert len({damaged(target, raw, 0, number)[0] for number in range(20)}) > 10


def test_every_target_reads_its_good_files(seeds: Path) -> None:
    """A reader that refuses the good files would prove nothing about damaged ones."""
    from tests.survival.fuzz.run import run_case

    for target in TARGETS:
        if target.name != "arguments":
            outcome = run_case(target, seeds, (seeds / target.file).read_bytes())
            assert outcome.kind == "unchanged", (target.name, outcome)
