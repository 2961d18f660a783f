"""`run` killed with −9 at any moment and started again ends with the bytes of a run that nobody disturbed."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.survival.driven import OUTPUTS, STAGES, Driver, gates, hashes, left_overs, write_recipe

KILLED = -9
KILLS_PER_STAGE = 2
START = 15  # changes on disk before a resumed run comes to its stage, about


@dataclass(frozen=True)
class Undisturbed:
    """hashes and gates of a run to the end; seconds: how long each stage took; changes: of the file system."""

    recipe: Path
    hashes: dict[str, str]
    gates: list[tuple[str, str, str]]
    seconds: dict[str, float]
    changes: int

    @property
    def out(self) -> Path:
        return self.recipe.with_name("out")


@pytest.fixture(scope="module")
def undisturbed(driver: Driver, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("kill")
    shutil.copytree(tiny_model, folder / "model")
    recipe = write_recipe(folder)
    run = driver.start("run", recipe)
    begun = []
    for stage in STAGES:
        assert run.wait_for(stage), run.said()
        begun.append(time.monotonic())
    assert driver.ended() == 0, run.said()
    begun.append(time.monotonic())
    seconds = {stage: begun[i + 1] - begun[i] for i, stage in enumerate(STAGES)}
    out = folder / "out"
    assert {status for *_, status in gates(out)} == {"pass"}
    assert left_overs(out) == []
    result = Undisturbed(recipe, hashes(out), gates(out), seconds, run.changes())
    assert {
        "base.qalora/manifest.json",
        "adapter/adapter_model.safetensors",
        "merged.qalora/model.safetensors",
        "model.gguf",
        "model.gguf.manifest.json",
        "onnx/onnx/model.onnx_data",
    } <= set(result.hashes)
    return result


@pytest.fixture(autouse=True)
def fresh(undisturbed: Undisturbed) -> None:
    shutil.rmtree(undisturbed.out)


def finish(driver: Driver, undisturbed: Undisturbed) -> None:
    """One run to the end: everything equal, nothing left over; then another, which finds nothing to do."""
    run = driver.start("run", undisturbed.recipe)
    assert driver.ended() == 0, run.said()
    assert hashes(undisturbed.out) == undisturbed.hashes
    assert gates(undisturbed.out) == undisturbed.gates
    assert left_overs(undisturbed.out) == []
    run = driver.start("run", undisturbed.recipe)
    assert driver.ended() == 0, run.said()
    assert run.said().count("up to date") >= len(STAGES)


def delete(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


@pytest.mark.slow
def test_killed_at_random_moments_of_every_stage(driver: Driver, undisturbed: Undisturbed) -> None:
    """A chain: each attempt goes on where the one before was killed."""
    moments = random.Random(20)
    kills = 0
    for stage, output in zip(STAGES, OUTPUTS, strict=True):
        done = tries = 0
        while done < KILLS_PER_STAGE:
            tries += 1
            assert tries < 10 * KILLS_PER_STAGE, f"{stage} ends before it can be killed"
            run = driver.start("run", undisturbed.recipe)
            if not run.wait_for(stage):  # the kill before came after its last byte
                run.kill(group=True)
                driver.ended()
                delete(undisturbed.out / output)
                continue
            time.sleep(moments.random() * undisturbed.seconds[stage] / tries)
            run.kill(group=bool(done % 2))
            code = driver.ended()
            assert code in (KILLED, 0), run.said()
            done += code == KILLED
        kills += done
    assert kills == KILLS_PER_STAGE * len(STAGES)
    finish(driver, undisturbed)


@pytest.mark.slow
def test_killed_between_any_two_changes_on_disk(driver: Driver, undisturbed: Undisturbed) -> None:
    """The narrow places: between two renames, between a file and its manifest, in the middle of deleting a folder."""
    places = random.Random(8)
    kills = in_last_stage = 0
    while in_last_stage < 2:
        run = driver.start("run", undisturbed.recipe, die_at=places.randint(START, undisturbed.changes // 3))
        assert driver.ended() == KILLED, run.said()
        kills += 1
        assert kills < 100, "the chain does not get on"
        in_last_stage += run.started(STAGES[-1])
    assert kills >= 6
    finish(driver, undisturbed)
