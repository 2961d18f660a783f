"""Inner values of a runtime: what was asked for, from its own process, and a clear answer when it cannot be had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from qalora_runtimes.protocol import Job
from qalora_runtimes.scoring import log_softmax
from qalora_runtimes.taps import run_taps

from tests.runtimes.conftest import worst_nmse

NODES = ["embd", "Qcur-0", "l_out-1", "result_output", "no such node"]


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_llama_cpp_shows_nodes_at_every_position(
    mode: str, tiny_gguf: Path, job: Job, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    result = run_taps(
        "llama.cpp", model=tiny_gguf, job=replace(job, mode=mode), names=NODES, workdir=tmp_path, exact=True, threads=1
    )
    assert (result.status, set(result.taps)) == ("ok", set(NODES[:-1]))
    assert {name: value.shape for name, value in result.taps.items()} == {
        "embd": (job.total, 128),
        "Qcur-0": (job.total, 128),
        "l_out-1": (job.total, 128),
        "result_output": expected.shape,
    }
    assert worst_nmse(log_softmax(result.taps["result_output"]), expected) < 1e-9


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_onnx_runtime_shows_outputs_of_a_graph_beside_its_data(
    mode: str, tiny_onnx: Path, job: Job, expected: np.ndarray, tmp_path: Path
) -> None:
    model = onnx.load(tiny_onnx / "model.onnx", load_external_data=False)
    inner = next(node.output[0] for node in model.graph.node if node.op_type == "GroupQueryAttention")
    model.graph.output.append(onnx.ValueInfoProto(name=inner))
    (tmp_path / "tapped.onnx").write_bytes(model.SerializeToString())
    result = run_taps(
        "onnxruntime",
        model=tmp_path / "tapped.onnx",
        job=replace(job, mode=mode),
        names=["logits", inner, "no such value"],
        workdir=tmp_path,
        data=tiny_onnx,
    )
    assert (result.status, set(result.taps)) == ("ok", {"logits", inner})
    assert result.taps[inner].shape == (job.total, 128)
    assert worst_nmse(log_softmax(result.taps["logits"]), expected) < 1e-9


@pytest.mark.parametrize("runtime", ["llama.cpp", "onnxruntime"])
def test_a_file_that_does_not_load_is_a_message(runtime: str, job: Job, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"not a model")
    result = run_taps(runtime, model=tmp_path / "model", job=job, names=["logits"], workdir=tmp_path, threads=1)
    assert (result.status, result.taps) == ("refused", {})
    assert "cannot load" in result.message


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed", ("SIGSEGV", "another version")),
        ("raise ImportError('not here')", "missing", ("pip install onnxruntime",)),
    ],
)
def test_a_crash_and_an_absent_package_are_told_as_by_the_other_runners(
    body: str, status: str, words: tuple[str, ...], job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = run_taps("onnxruntime", model=tmp_path, job=job, names=["logits"], workdir=tmp_path / "work")
    assert (result.status, result.taps) == (status, {})
    assert all(word in result.message for word in words), result.message
