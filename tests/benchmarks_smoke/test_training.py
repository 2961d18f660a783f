"""The training benchmarks run: their code on the CPU at a tiny shape, their checks on the kernels, their refusals."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qalora_export.errors import ParityError
from qalora_export.qalora.kernels import dispatch, ops
from tests.benchmarks import grid_training, kernel_checks, quantize_cuda, train_cpu, train_cuda, train_memory
from tests.benchmarks.common import config_of
from tests.benchmarks.variants import VARIANTS, Setup

ROOT = Path(__file__).parents[2]
SMOKE = [
    "--device",
    "cpu",
    "--shape",
    "tiny",
    "--layers",
    "2",
    "--sequence",
    "32",
    "--batch",
    "1",
    "--rounds",
    "1",
    "--steps",
    "1",
    "--warmup",
    "1",
]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    """A setup whose layers run on the kernels, in the interpreter where there is no GPU."""
    monkeypatch.setattr(dispatch, "DEVICES", {"cpu", "cuda"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield Setup(config_of("tiny", layers=2, sequence=32), device)


@pytest.mark.slow
def test_train_cuda_measures_every_variant(tmp_path: Path) -> None:
    """As its user starts it, in a process of its own."""
    out = tmp_path / "deep" / "train.json"
    done = subprocess.run(
        [sys.executable, "tests/benchmarks/train_cuda.py", *SMOKE, "--gradient-checkpointing", "--out", str(out)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert {row["variant"] for row in content["results"]} == set(VARIANTS)
    for row in content["results"]:
        assert row["status"] == "ok"
        assert row["tokens_per_second"] > 0 and row["ours_speedup"] > 0
        assert 0 < row["first_loss"] < 20
    assert not any(content["checks"]["tiny"]["differing_values"].values())
    assert content["hardware"]["cpu"]
    assert all(VARIANTS[name].title[:20] in done.stdout for name in VARIANTS)


@pytest.mark.parametrize("benchmark", [train_cuda, quantize_cuda])
def test_without_cuda_they_say_so_and_exit_3(
    benchmark: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out.json"
    assert benchmark.main(["--out", str(out)]) == 3
    assert "nothing was measured" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", train_memory.COUNTED)
def test_train_memory_counts_what_a_larger_model_holds(name: str) -> None:
    """Three layers and 48 tokens, counted, are what one and two layers over 32 and 64 tokens say they are."""
    setup = Setup(config_of("tiny", layers=3, sequence=64), torch.device("cpu"))
    model = VARIANTS[name].build(setup).train()
    ids = torch.zeros(1, 48, dtype=torch.long)
    said = train_memory.totals(train_memory.count("tiny", name, group=32, rank=16), layers=3, tokens=48, hidden=128)
    assert said["resident"] == train_memory.resident(model)
    assert said["saved"] == train_memory.saved(model, ids, autocast=VARIANTS[name].autocast)


@pytest.mark.slow
def test_train_memory_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.json"
    assert train_memory.main(["--shape", "tiny", "--sequence", "64", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [row["variant"] for row in rows] == ["ours", "ours", "lora", "qlora"]
    ours, _, lora, qlora = (row["bytes"]["saved"] for row in rows)
    assert ours < lora and ours < qlora
    assert "with checkpointing" in capsys.readouterr().out


def test_the_checks_pass_on_the_kernels(kernels: Setup) -> None:
    found = kernel_checks.check_matrices(kernels)
    assert len(found) == (1 + 2 * len(kernel_checks.DTYPES)) * len(kernel_checks.shapes_of(kernels.config))
    loss = kernel_checks.check_loss(kernels, 32)
    assert loss["float32"] == pytest.approx(loss["float32_reference"], rel=1e-6)


def test_the_checks_fail_on_a_wrong_kernel(kernels: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.dequantize

    def wrong(*arguments: object) -> torch.Tensor:
        matrix = right(*arguments)
        matrix[0, 0] += 0.5
        return matrix

    monkeypatch.setattr(ops, "dequantize", wrong)
    with pytest.raises(ParityError, match="disagree"):
        kernel_checks.check_matrices(kernels)


def test_the_loss_check_fails_on_wrong_gradients(kernels: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.group_sum
    monkeypatch.setattr(ops, "group_sum", lambda x, groups, dtype: right(x, groups, dtype) * 1.01)
    with pytest.raises(ParityError, match="float32 reference"):
        kernel_checks.check_loss(kernels, 32)


def test_quantize_cuda_quantizes_the_random_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "quantize.json"
    arguments = ["--shape", "tiny", "--device", "cpu", "--samples", "2", "--sequence", "32", "--out", str(out)]
    assert quantize_cuda.main([*arguments, "--work", str(tmp_path / "work")]) == 0
    result = json.loads(out.read_text())["result"]
    assert (result["layers"], result["calibration_tokens"], result["bits_per_weight"]) == (2, 64, 5.0)
    assert result["seconds"] > 0
    assert list((tmp_path / "work").iterdir()) == []


def test_train_cpu_compares_with_peft(tiny_model: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "cpu.json"
    lines = (ROOT / "samples/devices/train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:4]))
    threads = torch.get_num_threads()
    try:
        assert (
            train_cpu.main(
                [
                    "--model",
                    str(tiny_model),
                    "--data",
                    str(data),
                    "--batch",
                    "2",
                    "--steps",
                    "1",
                    "--threads",
                    "1",
                    "--out",
                    str(out),
                ]
            )
            == 0
        )
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(out.read_text())["results"]
    assert [row["variant"] for row in rows] == ["ours", "PEFT LoRA", "frozen base"]
    assert all(row["steps_per_second"] > 0 for row in rows)


def test_grid_training_trains_and_scores_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a row that an earlier run left in its file."""
    work, out = tmp_path / "work", tmp_path / "grids.json"
    earlier = {"bits_per_weight": 5.0, "before": 6.0, "rate": 0.004, "losses": [4.0, 4.5]}
    out.write_text(json.dumps({"rows": {grid_training.FREE: earlier}}))
    options = ["--smoke", "--grid", "q4_k", "--seeds", "1", "--rate", "0.01", "--work", str(work), "--json", str(out)]
    grid_training.main(options)
    content = json.loads(out.read_text())
    assert content["machine"]["cpu"] and list(content["rows"]) == [grid_training.FREE, "q4_k"]
    row = content["rows"]["q4_k"]
    assert (row["bits_per_weight"], row["rate"], len(row["losses"])) == (4.5, 0.01, 1)
    assert 3 < row["losses"][0] < 12 and 3 < row["before"] < 12
    assert "behind" in capsys.readouterr().out
    assert list(work.iterdir()) == []
