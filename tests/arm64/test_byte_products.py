"""ONNX Runtime's products of codes in bytes on Arm; without i8mm they are those of unsigned_bytes.py, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qalora_export.verify.kernels.arithmetic import BACKWARD
from qalora_export.verify.kernels.mlas import INT8_LEVEL, UNSIGNED
from qalora_export.verify.kernels.products import deviation
from tests.arm64 import on_the_device
from tests.arm64.machine import CPUS, Arm64
from tests.verify.kernels.test_unsigned_bytes import SHAPES, documented
from tests.verify.kernels.unsigned_bytes import Bytes, activations, product

OUT = 64  # columns that the kernel takes eight at a time


def write_graph(path: Path, of: Bytes) -> None:
    out, blocks, block = of.codes.shape
    stored = {"codes": of.codes, "scale": of.scale, "zero": of.zero}
    sizes = {"K": blocks * block, "N": out, "bits": 8, "block_size": block, "accuracy_level": INT8_LEVEL}
    node = helper.make_node("MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft", **sizes)
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])
        for name, width in (("x", blocks * block), ("y", out))
    )
    graph = helper.make_graph(
        [node], "product", [x], [y], [numpy_helper.from_array(a, name) for name, a in stored.items()]
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)


@pytest.mark.parametrize("cpu", [cpu for cpu, flags in CPUS.items() if "asimddp" in flags])
def test_products_of_bytes(cpu: str, arm: Arm64, tmp_path: Path) -> None:
    made = {}
    for number, (features, block, positions, outlier) in enumerate(SHAPES):
        of = Bytes.random(OUT, features, block, seed=number)
        x = activations(positions, features, outlier=outlier, seed=number)
        write_graph(tmp_path / f"{number}.onnx", of)
        np.save(tmp_path / f"{number}.x.npy", x)
        made[number] = of, x
    arm.python(cpu, [on_the_device.__file__, tmp_path], wheel=tmp_path)
    for number, (of, x) in made.items():
        y = np.load(tmp_path / f"{number}.y.npy")
        found = deviation(documented(of), x, y)
        assert found.backward <= BACKWARD, found
        if "i8mm" in CPUS[cpu]:
            assert found.way != UNSIGNED.format(of.codes.shape[2])
        else:
            assert np.array_equal(y, product(x, of))
