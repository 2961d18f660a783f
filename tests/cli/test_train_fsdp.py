"""`qalora-export train` under accelerate's FSDP2: two gloo processes that hold half of the model each."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qalora_export.qalora.training.processes import LAUNCH
from tests.cli.test_train import ENVIRONMENT, data, in_process  # noqa: F401 (data is a fixture)
from tests.qalora.training import fsdp_on_cpu
from tests.survival.driven import Attempt, Driver

KILLED = -signal.SIGKILL
PROGRAM = Path(fsdp_on_cpu.__file__)
# The command of the README; here rank 0 alone reads the base.
ACCELERATE = ["-m", "accelerate.commands.launch", *LAUNCH.split()[2:], "--num_processes", "2"]
# What torchrun tells its processes; here rank 0 and 1 read the base.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def start(driver: Driver, folder: Path, *arguments: object, die_at: int | None = None) -> list[Attempt]:
    """Rank 0, which is killed at `die_at`, and rank 1, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return driver.start_together(
        [
            driver.request(
                ("train", *arguments),
                prepare=[fsdp_on_cpu.__name__, str(folder)],
                environment=FSDP | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                die_at=None if rank else die_at,
            )
            for rank in (0, 1)
        ]
    )


def by_fork(driver: Driver, folder: Path, *arguments: object) -> str:
    attempts = start(driver, folder, *arguments)
    codes = [driver.ended() for _ in attempts]
    assert codes == [0, 0], [attempt.said() for attempt in attempts]
    return "".join(attempt.said() for attempt in attempts)


def by_accelerate(_: Driver, folder: Path, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *ACCELERATE, str(PROGRAM), str(folder), "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launch", [by_fork, by_accelerate])
def test_two_shards_train_what_one_process_trains(
    driver: Driver,
    tiny_canonical: Path,
    tmp_path: Path,
    data: list[str],  # noqa: F811
    launch: Callable[..., str],
) -> None:
    scales = launch is by_fork
    in_process(tiny_canonical, tmp_path / "one", data, rank=4, batch_size=8, max_steps=8, scales=scales)
    options = ("--rank", 4, "--batch-size", 2, "--gradient-accumulation", 2, "--gradient-checkpointing")
    options = (*options, "--scales" if scales else "--no-scales")
    printed = launch(driver, tmp_path, tiny_canonical, *data, "--out", tmp_path / "two", *options, "--max-steps", 8)
    reports = [json.loads((tmp_path / f"{name}.training" / "report.json").read_text()) for name in ("one", "two")]
    for curve in ("train_curve", "validation_curve"):
        left, right = (dict(report[curve]) for report in reports)
        assert [right[step] for step in left] == pytest.approx(list(left.values()), rel=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    error = sum(float((one[n].double() - two[n].double()).square().sum()) for n in one)
    assert error <= 1e-6 * sum(float(t.double().square().sum()) for t in one.values())
    assert printed.count("adapter: ") == 1, "only rank 0 talks"

    held = [json.loads((tmp_path / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    assert {"model.layers.0", "model.layers.1"} <= set(held[0]["groups"]), "gathered layer by layer"
    for name, (mine, all_of_it, dtype) in held[0]["parameters"].items():
        if name.startswith("model.layers."):
            assert mine + held[1]["parameters"][name][0] == all_of_it, name
            assert abs(2 * mine - all_of_it) <= all_of_it // 8, name
        if name.endswith((".codes", ".scale", ".offset")):
            assert dtype == ("torch.uint8" if name.endswith(".codes") else "torch.float16")


@pytest.mark.slow
def test_killed_shards_started_again_give_the_same_bytes(
    driver: Driver,
    tiny_canonical: Path,
    tmp_path: Path,
    data: list[str],  # noqa: F811
) -> None:
    options = (tiny_canonical, *data, "--rank", 4, "--batch-size", 2, "--max-steps", 9, "--evaluate-every", 3)
    whole = start(driver, tmp_path, *options, "--out", tmp_path / "whole")
    assert [driver.ended(), driver.ended()] == [0, 0], [attempt.said() for attempt in whole]
    cut = start(driver, tmp_path, *options, "--out", tmp_path / "cut", die_at=whole[0].changes() // 2)
    assert driver.ended() == KILLED, cut[0].said()
    cut[1].kill(group=True)
    assert driver.ended() != 0
    assert not (tmp_path / "cut").exists()
    names = {path.name for path in next(tmp_path.glob("cut.training/checkpoint-*/complete.json")).parent.iterdir()}
    assert "optimizer.bin" in names and not any("pytorch_model" in name for name in names), "the base is not saved"
    by_fork(driver, tmp_path, *options, "--out", tmp_path / "cut")
    assert 3 <= json.loads((tmp_path / "cut.training" / "report.json").read_text())["resumed_from"] < 9
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes(), path.name
