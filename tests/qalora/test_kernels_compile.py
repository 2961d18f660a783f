"""The kernels compile to machine code for NVIDIA GPUs, and to the instructions they were written for, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MadeOnce

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(made_once: MadeOnce) -> list[dict[str, object]]:
    lines = (made_once("kernels", compile_kernels) / "rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def compile_kernels(folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    done = subprocess.run(
        [sys.executable, "tests/qalora/compile_kernels.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "rows.jsonl").write_text(done.stdout)


def instructions(rows: list[dict[str, object]], kernel: str) -> list[dict[str, int]]:
    found = [row["instructions"] for row in rows if str(row["kernel"]).startswith(kernel)]
    assert len(found) >= 2
    return found


@pytest.mark.slow
def test_every_kernel_becomes_machine_code_without_spills(rows: list[dict[str, object]]) -> None:
    for row in rows:
        assert row["cubin_bytes"] > 1000, row
        assert row["instructions"]["ld.local"] == row["instructions"]["st.local"] == 0, row


@pytest.mark.slow
def test_dequantize_writes_16_bytes_at_a_time_and_rounds_in_hardware(rows: list[dict[str, object]]) -> None:
    for found in instructions(rows, "dequantize") + instructions(rows, "adapted dequantize"):
        assert found["st.global.v4"] == 4  # 4096 bf16 numbers by 128 threads
        assert found["cvt.rn.bf16x2.f32"] == 16  # to nearest, ties to even, two at a time


@pytest.mark.slow
def test_the_other_kernels_use_the_units_they_mean(rows: list[dict[str, object]]) -> None:
    for found in instructions(rows, "fused_linear 4 *bf16"):
        assert found["mma"] > 0
    for found in instructions(rows, "fused_linear 4 *fp32"):
        assert found["mma"] == 0  # float32 products, not TF32
    for found in instructions(rows, "effective_offset") + instructions(rows, "adapted dequantize"):
        assert found["fma.rn.f64"] > 0
        assert found["cvt.rn.f16.f32"] > 0  # through float32, as torch rounds
