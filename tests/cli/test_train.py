"""`qalora-export train` as a user starts it: one process, two under torchrun, killed with -9 and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qalora_export.cli.main import main
from qalora_export.qalora.training.stage import train
from qalora_export.recipe import TrainSettings
from tests.qalora.training.runs import write_commands
from tests.survival.driven import Driver

MODULE = ["-m", "qalora_export.cli", "train"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# The same number of threads everywhere: sums in another order round differently.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": str(torch.get_num_threads()),
    "COLUMNS": "200",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    return [
        "--data",
        str(write_commands(folder / "train.jsonl", 0, 32)),
        "--validation",
        str(write_commands(folder / "validation.jsonl", 40, 45)),
    ]


def cli(*arguments: object, launcher: list[str] = []) -> subprocess.CompletedProcess[str]:  # noqa: B006
    command = [sys.executable, *launcher, *MODULE, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def in_process(base: Path, out: Path, data: list[str], **settings: object) -> None:
    train(base, out, TrainSettings.model_validate({"data": data[1], "validation": data[3], **settings}))


def test_every_setting_is_an_option() -> None:
    text = cli("--help").stdout
    missing = [name for name in TrainSettings.model_fields if f"--{name.replace('_', '-')}" not in text]
    assert not missing
    assert "torchrun --nproc_per_node" in text and "--dry-run" in text


def test_dry_run_prints_the_plan_and_writes_nothing(
    tiny_canonical: Path, tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["train", str(tiny_canonical), *data, "--out", str(tmp_path / "adapter"), "--rank", "4", "--dry-run"])
    assert done.value.code == 0
    printed = capsys.readouterr().err
    for phrase in ("trainable parameters", "packed weights", "activations", "total", "32 samples"):
        assert phrase in printed
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line_with_exit_code_2(
    tiny_canonical: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "output": "b"}\n{"prompt": "a"\n')
    with pytest.raises(SystemExit) as done:
        main(["train", str(tiny_canonical), "--data", str(bad), "--out", str(tmp_path / "adapter")])
    assert done.value.code == 2
    printed = capsys.readouterr().err
    assert "error: not valid JSON" in printed and "bad.jsonl, line 2" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes(
    driver: Driver, tiny_canonical: Path, tmp_path: Path, data: list[str]
) -> None:
    """Killed with -9 half way through its changes on disk."""
    options = (tiny_canonical, *data, "--rank", 4, "--batch-size", 4, "--max-steps", 12, "--evaluate-every", 3)
    whole = driver.start("train", *options, "--out", tmp_path / "whole")
    assert driver.ended() == 0, whole.said()
    cut = driver.start("train", *options, "--out", tmp_path / "cut", die_at=whole.changes() // 2)
    assert driver.ended() == -signal.SIGKILL and not (tmp_path / "cut").exists(), cut.said()
    again = driver.start("train", *options, "--out", tmp_path / "cut")
    assert driver.ended() == 0, again.said()
    assert 3 <= json.loads((tmp_path / "cut.training" / "report.json").read_text())["resumed_from"] < 12
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes(), path.name
    assert "next: qalora-export merge" in again.said()


@pytest.mark.slow
def test_two_processes_equal_one(tiny_canonical: Path, tmp_path: Path, data: list[str]) -> None:
    """Data parallel over gloo: half the batch in each process, the same losses and adapter to rounding."""
    in_process(tiny_canonical, tmp_path / "one", data, rank=4, batch_size=8, max_steps=8)
    options = ["--rank", 4, "--batch-size", 4, "--max-steps", 8]
    result = cli(tiny_canonical, *data, "--out", tmp_path / "two", *options, launcher=TORCHRUN)
    assert result.returncode == 0, result.stderr
    reports = [json.loads((tmp_path / f"{name}.training" / "report.json").read_text()) for name in ("one", "two")]
    assert [report["processes"] for report in reports] == [1, 2]
    for curve in ("train_curve", "validation_curve"):
        left, right = (dict(report[curve]) for report in reports)
        assert left.keys() == right.keys()
        # Sums in another order move an offset by at most one fp16 step, and a flipped step moves the loss by 1e-5.
        assert [right[step] for step in left] == pytest.approx(list(left.values()), rel=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    error = sum(float((one[n].double() - two[n].double()).square().sum()) for n in one)
    assert error <= 1e-6 * sum(float(t.double().square().sum()) for t in one.values())
    assert result.stderr.count("adapter: ") == 1, "only rank 0 talks"
    assert len(list((tmp_path / "two.training" / "tensorboard").iterdir())) == 1, "only rank 0 writes"
