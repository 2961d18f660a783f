"""GELU on llama.cpp's exact path: what the table gives is known for certain, and only that is replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from qalora_runtimes.llama_cpp.activations import ExactGelu, geglu, gelu, looked_up
from qalora_runtimes.protocol import Job
from qalora_runtimes.taps import run_taps

INPUTS = np.concatenate(
    [np.linspace(-12, 12, 20_001), [0.0, -0.0, 10.0, -10.0, np.nextafter(10, 0), 65_504.0, -70_000.0, 1e-8]]
).astype(np.float32)


def table(x: np.ndarray) -> np.ndarray:
    """ggml-cpu/vec.h, ggml_vec_geglu_f32 with GGML_GELU_FP16, without the factor."""
    f = np.clip(x, -10, 10).astype(np.float16).astype(np.float32)
    one, half = np.float32(1), np.float32(0.5)
    y = half * f * (one + np.tanh(np.float32(0.79788456) * f * (one + np.float32(0.044715) * f * f)))
    return np.where(x <= -10, np.float32(0), np.where(x >= 10, x, y.astype(np.float16).astype(np.float32)))


@pytest.mark.parametrize("factor", [1.0, -0.37, 0.0])
def test_every_value_of_the_table_is_known_and_no_other(factor: float) -> None:
    up = np.full_like(INPUTS, factor)
    value = table(INPUTS) * up
    assert looked_up(value, INPUTS, up).all()
    if factor:
        told_apart = (np.abs(INPUTS) < 4) & (np.abs(value) > 1e-3)
        assert not looked_up(value * np.float32(1 + 2**-9), INPUTS, up)[told_apart].any()
    assert not looked_up(np.full_like(value, np.nan), INPUTS, up).any()


def test_the_function_is_transformers_own() -> None:
    import torch

    expected = torch.nn.functional.gelu(torch.from_numpy(INPUTS.astype(np.float64)), approximate="tanh").numpy()
    np.testing.assert_allclose(gelu(INPUTS.astype(np.float64)), expected, rtol=0, atol=1e-12)
    assert geglu(INPUTS, INPUTS).dtype == np.float32


class Stand:
    """Nodes by number."""

    def __init__(self, **values: np.ndarray) -> None:
        self.values, self.written = values, dict[str, np.ndarray]()

    def read(self, node: str) -> np.ndarray | None:
        return self.values[node].copy()

    def write(self, node: str, value: np.ndarray) -> None:
        self.written[node] = value.copy()


def test_only_what_the_table_gave_is_replaced_and_counted() -> None:
    gate, up = np.float32([0.3, -1.7, 2.2]), np.float32([2, 3, -1])
    value = table(gate) * up
    value[1] += 0.25  # a kernel's fault
    nodes = Stand(gate=gate, up=up, out=value)
    watcher = ExactGelu(nodes)  # type: ignore[arg-type]
    assert not watcher.wants(b"ffn_gate-0", b"MUL_MAT")  # a graph without GELU is left alone
    assert watcher.describe() == {}
    assert watcher.wants(b"ffn_geglu-0", b"GEGLU")
    assert watcher.wants(b"ffn_gate-1", b"MUL_MAT")
    watcher.see("gate", b"ffn_gate-1", b"MUL_MAT")  # type: ignore[arg-type]
    watcher.see("up", b"ffn_up-1", b"MUL_MAT")  # type: ignore[arg-type]
    watcher.see("out", b"ffn_geglu-1", b"GEGLU")  # type: ignore[arg-type]
    exact = geglu(gate, up)
    assert nodes.written["out"].tolist() == [exact[0], value[1], exact[2]]
    said = watcher.describe()["GEGLU"]
    assert (said["values"], said["kept"]) == (3, 1)
    assert 0 < said["nmse"] < 1e-6

    watcher.see("out", b"ffn_geglu-2", b"GEGLU")  # type: ignore[arg-type]
    assert watcher.describe()["GEGLU"]["kept"] == 4  # its inputs were not seen: nothing is touched


def test_a_graph_without_it_has_nothing_replaced(tiny_gguf: Path, job: Job, tmp_path: Path) -> None:
    from qalora_runtimes.launch import run_runner
    from qalora_runtimes.protocol import write_job

    write_job(tmp_path / "job.npz", job)
    result = run_runner(
        "llama.cpp", model=tiny_gguf, job=tmp_path / "job.npz", workdir=tmp_path, exact=True, threads=1, vocabulary=369
    )
    assert result.fingerprint["replaced"] == {}
    taps = run_taps(
        "llama.cpp", model=tiny_gguf, job=job, names=["ffn_swiglu-0"], workdir=tmp_path / "t", exact=True, threads=1
    )
    assert taps.status == "ok"
