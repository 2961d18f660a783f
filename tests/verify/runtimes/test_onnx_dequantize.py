"""Gate G1 of ONNX in a process of its own: the same weights however they are divided, and no crash takes us with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from qalora_runtimes.onnxruntime_.linears import LinearsResult, run_linears

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import ExitCode, RuntimeUnavailableError, UnsafeInputError
from qalora_export.recipe import VerifySettings
from qalora_export.verify.report.parity_report import ParityReport
from qalora_export.verify.runtimes import onnx_dequantize as runtime
from qalora_export.verify.runtimes.onnx_dequantize import runtime_dequantized
from qalora_export.verify.stage import verify_parity
from tests.verify.exports import Exported
from tests.verify.fakes import FakeRuntimes

FIRST = "model.layers.0.mlp.down_proj"  # in the order of the file
SEGFAULT = "import os, signal\nclass SessionOptions: pass\ndef InferenceSession(*_, **__): "
SEGFAULT += "os.kill(os.getpid(), signal.SIGSEGV)"


def plant(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`body` is the onnxruntime that processes started from now on import."""
    (folder / "planted").mkdir()
    (folder / "planted" / "onnxruntime.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(folder / "planted"))


@pytest.mark.parametrize("batch_bytes", [1 << 30, 300_000])
def test_weights_are_those_of_the_checkpoint_in_one_process_or_several(
    batch_bytes: int, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []

    def run(graphs: object, workdir: Path) -> LinearsResult:
        started.append(workdir)
        return run_linears(graphs, workdir)

    monkeypatch.setattr(runtime, "BATCH_BYTES", batch_bytes)
    checkpoint = CanonicalCheckpoint(exported.checkpoint)
    found = []
    for module, matrix in runtime_dequantized(exported.onnx, tmp_path, run=run):
        found.append(module)
        assert np.array_equal(matrix.view(np.int32), checkpoint.group_affine(module).dequantize().view(np.int32))
    assert found == list(checkpoint.modules)
    assert (len(started) > 1) == (batch_bytes < 1 << 30)


def test_our_own_process_does_not_load_the_runtime(exported: Exported, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path\n"
    code += "from qalora_export.verify.runtimes.onnx_dequantize import runtime_dequantized\n"
    code += f"print(len(list(runtime_dequantized(Path({str(exported.onnx)!r}), Path({str(tmp_path)!r})))))\n"
    code += "print('onnxruntime' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(CanonicalCheckpoint(exported.checkpoint).modules)), "False", "False"]


def verify(exported: Exported, out: Path) -> ParityReport:
    settings = VerifySettings(threads=1, runtimes=("onnxruntime",))
    fake = FakeRuntimes(exported.checkpoint)
    return verify_parity(
        exported.checkpoint, out, settings, onnx=exported.onnx, launch=fake, taps=fake.taps, bisect=False
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (SEGFAULT, ("SIGSEGV", "another version", FIRST)),
        ("raise ImportError('not here')", ("not installed", "pip install onnxruntime")),
    ],
)
def test_a_crash_or_an_absent_package_is_exit_3_for_g1_alone(
    body: str, words: tuple[str, ...], exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(body, tmp_path, monkeypatch)
    report = verify(exported, tmp_path / "report")
    assert report.exit_code == ExitCode.RUNTIME_UNAVAILABLE
    (entry,) = [entry for entry in report.entries if entry.status != "pass"]
    assert (entry.gate, entry.status) == ("G1", "not run")
    assert all(word in entry.detail for word in words), entry.detail


def test_an_answer_of_another_shape_or_type_is_refused(exported: Exported, tmp_path: Path) -> None:
    for wrong in (np.zeros((1, 1), np.float32), np.zeros((256, 128), np.float64)):
        with pytest.raises(RuntimeUnavailableError, match=f"answered {wrong.dtype}.*{FIRST}"):
            next(runtime_dequantized(exported.onnx, tmp_path, run=lambda *_, w=wrong: LinearsResult("ok", values=[w])))


def test_codes_of_another_rank_are_refused(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = runtime.read_back(exported.onnx)
    contents.initializers[f"{FIRST}.codes"].dims[:] = [7]
    monkeypatch.setattr(runtime, "read_back", lambda _: contents)
    with pytest.raises(UnsafeInputError, match=FIRST):
        next(runtime_dequantized(exported.onnx, tmp_path))
