"""`qalora-export train` under accelerate's FSDP2: two gloo processes that hold half of the model each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from qalora_export.qalora.training.processes import LAUNCH
from tests.cli.test_train import ENVIRONMENT, TORCHRUN, data, in_process  # noqa: F401 (data is a fixture)

PROGRAM = Path(__file__).parents[1] / "qalora" / "training" / "fsdp_on_cpu.py"
FSDP = ENVIRONMENT | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # torchrun: rank 0 and 1 read the base
# The command of the README; here rank 0 alone reads the base.
ACCELERATE = ["-m", "accelerate.commands.launch", *LAUNCH.split()[2:], "--num_processes", "2"]


def command(folder: Path, *arguments: object, launcher: list[str] = TORCHRUN) -> list[str]:
    return [sys.executable, *launcher, str(PROGRAM), str(folder), "train", *map(str, arguments)]


def sharded(folder: Path, *arguments: object, launcher: list[str] = TORCHRUN) -> str:
    done = subprocess.run(
        command(folder, *arguments, launcher=launcher),
        capture_output=True,
        text=True,
        timeout=900,
        env=FSDP if launcher is TORCHRUN else ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_two_shards_train_what_one_process_trains(
    tiny_canonical: Path,
    tmp_path: Path,
    data: list[str],  # noqa: F811
    launcher: list[str],
) -> None:
    in_process(tiny_canonical, tmp_path / "one", data, rank=4, batch_size=8, max_steps=8)
    printed = sharded(
        tmp_path,
        tiny_canonical,
        *data,
        "--out",
        tmp_path / "two",
        "--rank",
        4,
        "--batch-size",
        2,
        "--gradient-accumulation",
        2,
        "--gradient-checkpointing",
        "--max-steps",
        8,
        launcher=launcher,
    )
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
    tiny_canonical: Path,
    tmp_path: Path,
    data: list[str],  # noqa: F811
) -> None:
    options = (tiny_canonical, *data, "--rank", 4, "--batch-size", 2, "--max-steps", 40, "--evaluate-every", 3)
    sharded(tmp_path, *options, "--out", tmp_path / "whole")
    process = psutil.Popen(
        command(tmp_path, *options, "--out", tmp_path / "cut"),
        env=FSDP,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("cut.training/checkpoint-*/complete.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    family = [process, *process.children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    assert not (tmp_path / "cut").exists()
    names = {path.name for path in next(tmp_path.glob("cut.training/checkpoint-*/complete.json")).parent.iterdir()}
    assert "optimizer.bin" in names and not any("pytorch_model" in name for name in names), "the base is not saved"
    sharded(tmp_path, *options, "--out", tmp_path / "cut")
    assert json.loads((tmp_path / "cut.training" / "report.json").read_text())["resumed_from"] >= 3
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes(), path.name
