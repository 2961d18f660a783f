"""Each benchmark of exports and runtimes runs on a tiny model and writes its JSON. Times are never asserted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.onnx_decode import with_float_zero_points, without_offset
from tests.benchmarks.quantizers import beaten

ROWS = {
    "hash_inputs": {f"{what} from {place}" for what in ("read", "sha256") for place in ("memory", "disk")},
    "export_streaming": {"gguf q4_1", "gguf split", "onnx", "gguf q2_k"},
    "llama_layouts": {"q4_1", "q4_k", "q4_k_m", "split", "split, rank 16", "split, F16 lm_head", "Q4_0", "Q4_K_M"},
    "q4_k_m": {"ours, q4_k_m", "ours, Q6_K", "Q4_K_M", "Q4_K_M, imatrix"},
    "patch_size": {"g32, model.gguf", "g32, onnx", "g32, split.gguf"},
    "quantizers": {"llama.cpp Q5_K, imatrix"},
    "onnx_decode": {f"g{g}, {name}" for g in (32, 64, 128) for name in ("split", "limit", "float zero_points")},
}


MORE = {
    "export_streaming": ["--formats", *sorted(ROWS["export_streaming"])],  # each format is a process
    "quantizers": ["--only", "llama.cpp"],  # GPTQ takes longer than all of the others together
}


def run(name: str, tmp_path: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        f"tests.benchmarks.{name}",
        "--smoke",
        "--work",
        str(tmp_path / "work"),
        "--json",
        str(tmp_path / "found.json"),
        *MORE.get(name, []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list((tmp_path / "work").iterdir()), "the benchmark leaves its models behind"
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["benchmark"] == name
    assert content["machine"]["cpu"] and content["machine"]["cores"] and content["machine"]["packages"]["numpy"]
    return content


@pytest.mark.parametrize("name", list(ROWS))
def test_benchmark_runs(name: str, tmp_path: Path) -> None:
    rows = run(name, tmp_path)["rows"]
    assert set(rows) == ROWS[name]
    if name == "export_streaming":  # memory is no time, it may be asserted; 0 would mean that it is not measured
        assert all(0 < row["peak_above_imports_bytes"] < 2**28 for row in rows.values())


@pytest.mark.slow
def test_verify_scaling_runs_and_the_random_model_passes(tmp_path: Path) -> None:
    rows = run("verify_scaling", tmp_path)["rows"]
    assert rows["tiny"]["exit_code"] == 0, rows["tiny"]["gates"]
    assert {"G0 bytes", "G1 weights", "PyTorch reference", "runs of llama.cpp"} <= set(rows["tiny"]["stages"])


def test_variants_of_the_graph_are_what_their_names_say(tiny_canonical: Path, tmp_path: Path) -> None:
    """On one layer's numbers: without the offset the model is another one, with float zero points it is close."""
    import onnxruntime

    from qalora_export.formats.onnx.export import export_onnx
    from qalora_export.recipe import OnnxSettings

    export_onnx(tiny_canonical, tmp_path / "onnx", OnnxSettings(accuracy_level=1))
    folder = tmp_path / "onnx"
    graphs = [(folder / "onnx/model.onnx").read_bytes(), without_offset(folder), with_float_zero_points(folder)]
    logits = []
    for graph in graphs:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder / "onnx"))
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        feed: dict[str, np.ndarray] = {"input_ids": np.array([[5]]), "attention_mask": np.ones((1, 1), np.int64)}
        feed |= {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in session.get_inputs()
            if i.name not in feed
        }
        logits.append(session.run(["logits"], feed)[0].astype(np.float64))
    exact, limit, floats = logits
    assert ((floats - exact) ** 2).sum() < 1e-6 * (exact**2).sum()
    assert ((limit - exact) ** 2).sum() > 1e-2 * (exact**2).sum()


def test_a_quantizer_is_held_against_the_best_of_ours_that_is_no_larger() -> None:
    sizes = {
        "ours, a": (2.5, 0.2),
        "ours, b": (3.0, 0.1),
        "ours RTN": (2.9, 0.4),
        "hqq": (2.9, 0.4),
        "tiny": (2.0, 1.0),
    }
    rows = {name: {"bits_per_weight": bits, "kl": kl} for name, (bits, kl) in sizes.items()}
    assert beaten(rows) == {"hqq": ("ours, a", 0.5)}
