"""Linear layers in a process of ONNX Runtime's own: right values; a crash, an error, an absent package are messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from qalora_runtimes.arrays import ProtocolError, write_each
from qalora_runtimes.launch import RunnerResult
from qalora_runtimes.onnxruntime_ import linears
from qalora_runtimes.onnxruntime_.linears import run_linears
from qalora_runtimes.process import Ended, Watch

# The third graph kills the process, as a kernel that reads outside its memory does.
CRASHES = """
import os, signal, types
import numpy as np

SessionOptions = types.SimpleNamespace
graphs = []

class InferenceSession:
    def __init__(self, graph, *_, **__):
        graphs.append(graph)
        if len(graphs) == 3:
            os.kill(os.getpid(), signal.SIGSEGV)

    def get_inputs(self):
        return [types.SimpleNamespace(name="x", shape=[1, 2, 2])]

    def get_outputs(self):
        return [types.SimpleNamespace(name="y")]

    def run(self, names, feeds):
        return [np.zeros((1, 2, 2), np.float32)]
"""


def graph_of(weight: np.ndarray) -> bytes:
    """y = x · weight; weight float32 (k, out)."""
    k = len(weight)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, k, k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [numpy_helper.from_array(weight, "w")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


def plant(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`body` is the onnxruntime that the process imports."""
    (folder / "onnxruntime.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_every_graph_is_answered_in_order_and_nothing_is_left(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(k, k + 1)).astype(np.float32) for k in (*range(1, 12), 64)]
    result = run_linears(map(graph_of, weights), tmp_path / "work")
    assert (result.status, result.message) == ("ok", "")
    for weight, values in zip(weights, result.values, strict=True):
        assert values.dtype == np.float32
        assert np.array_equal(values, weight)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["stderr.txt"]


def test_a_segfault_names_the_signal_a_remedy_and_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(CRASHES, tmp_path, monkeypatch)
    result = run_linears([b"0", b"1", b"2", b"3"], tmp_path / "work")
    assert (result.status, result.last, list(result.values)) == ("crashed", 2, [])
    assert "onnxruntime" in result.message
    assert "SIGSEGV" in result.message
    assert "another version" in result.message


def test_a_graph_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    result = run_linears([graph_of(np.eye(2, dtype=np.float32)), b"no graph"], tmp_path)
    assert (result.status, result.last) == ("refused", 1)
    assert "cannot run a linear layer" in result.message


def test_an_absent_package_is_named_with_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("raise ImportError('not here')", tmp_path, monkeypatch)
    result = run_linears([b""], tmp_path / "work")
    assert (result.status, result.last) == ("missing", None)
    assert "pip install onnxruntime" in result.message


def test_a_hanging_graph_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("import time; time.sleep(600)", tmp_path, monkeypatch)
    result = run_linears([b""], tmp_path / "work", watch=Watch(timeout=1))
    assert result.status == "crashed"
    assert "within 1 s" in result.message


@pytest.mark.parametrize("names", [["1", "0"], ["0"], ["0", "1", "2"]])
def test_answers_that_are_not_one_per_graph_in_order_are_refused(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(_module: str, words: list[object], *_: object) -> Ended:
        out = words[words.index("--out") + 1]
        assert isinstance(out, Path)
        write_each(out, ((name, np.zeros((1, 1), np.float32)) for name in names))
        return Ended(0, "")

    monkeypatch.setattr(linears, "run_module", lie)
    with pytest.raises(ProtocolError):
        list(run_linears([b"", b""], tmp_path).values)


def test_the_result_speaks_as_the_other_runners_do() -> None:
    assert {
        "status",
        "message",
    } <= RunnerResult.__dataclass_fields__.keys() & linears.LinearsResult.__dataclass_fields__
