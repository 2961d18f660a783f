"""Canonical checkpoints: written, read back, and read by the safetensors package as judge."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.manifest import verify_manifest
from qalora_export.checkpoint.model_folder import INDEX
from qalora_export.errors import InputError, QaloraError, UnsafeInputError
from qalora_export.grid import GroupAffine, difference, pack_codes
from tests.checkpoint.files import same_bytes
from tests.qalora.layers import random_matrix

PLAIN = {
    "embed": np.linspace(-3, 3, 60).reshape(6, 10).astype(ml_dtypes.bfloat16),
    "norm": np.array([1.5, -0.0, 65504], np.float16),
    "head": np.array([[np.pi, 1e-42]], np.float32),
    "scalar": np.array(7.0, np.float32),
}
MATRICES = {
    f"layers.{bits}": random_matrix(8, 128, bits=bits, group=group, seed=bits)
    for bits, group in ((2, 32), (3, 64), (4, 128), (8, 16))
}


def write(path: Path, **options: object) -> Path:
    with CanonicalWriter(path, {"architectures": ["X"]}, kind="base", **options) as out:
        for name, tensor in PLAIN.items():
            out.add(name, tensor)
        for name, matrix in MATRICES.items():
            out.add_quantized(name, matrix)
    return path


@pytest.mark.parametrize("shard_bytes", [1, 700, 2**29])
def test_round_trip(tmp_path: Path, shard_bytes: int) -> None:
    opened = CanonicalCheckpoint(write(tmp_path / "c", shard_bytes=shard_bytes))
    assert (tmp_path / "c" / INDEX).exists() == (shard_bytes < 2**29)
    assert sorted(opened.plain_names()) == sorted(PLAIN)
    for name, tensor in PLAIN.items():
        assert same_bytes(np.asarray(opened.tensor(name)), tensor)
    assert opened.modules == {name: (m.bits, m.group_size) for name, m in MATRICES.items()}
    for name, matrix in MATRICES.items():
        assert difference(opened.group_affine(name), matrix).total == 0
    assert verify_manifest(tmp_path / "c") == []


def test_the_safetensors_package_reads_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "c")
    with safe_open(tmp_path / "c" / "model.safetensors", "pt") as file:
        for name, matrix in MATRICES.items():
            assert same_bytes(file.get_tensor(f"{name}.codes").numpy(), pack_codes(matrix.codes, matrix.bits))
            assert same_bytes(file.get_tensor(f"{name}.scale").numpy(), matrix.scale)
            assert same_bytes(file.get_tensor(f"{name}.offset").numpy(), matrix.offset)
        assert str(file.get_tensor("embed").dtype) == "torch.bfloat16"
        assert file.get_tensor("embed").float().numpy().tolist() == PLAIN["embed"].astype(np.float32).tolist()


finite_half = st.integers(0, 2**16 - 1).filter(lambda bits: bits & 0x7C00 != 0x7C00)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    group=st.sampled_from((16, 32, 64, 128)),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    values=st.lists(finite_half, min_size=24, max_size=24),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_of_any_matrix(
    tmp_path: Path, bits: int, group: int, rows: int, groups: int, values: list[int], seed: int
) -> None:
    """Subnormal, zero, largest, negative scales and offsets: 0 differing values."""
    halves = np.array(values, np.uint16).view(np.float16)
    scale, offset = (part[: rows * groups].reshape(rows, groups) for part in (halves[:12], halves[12:]))
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, groups * group)).astype(np.uint8)
    matrix = GroupAffine(codes, scale, offset, bits)
    with CanonicalWriter(tmp_path / "c", {}, kind="base", force=True) as out:
        out.add_quantized("m", matrix)
    assert difference(CanonicalCheckpoint(tmp_path / "c").group_affine("m"), matrix).total == 0


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    left, right = write(tmp_path / "one" / "c"), write(tmp_path / "two" / "c")
    for path in left.iterdir():
        assert path.read_bytes() == (right / path.name).read_bytes()


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), CanonicalWriter(tmp_path / "c", {}, kind="base", shard_bytes=1) as out:
        out.add("a", np.ones(9, np.float32))
        out.add("b", np.ones(9, np.float32))
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_finishing_leaves_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "tokenizer.json"
    with pytest.raises((QaloraError, OSError)), CanonicalWriter(tmp_path / "c", {}, [missing], kind="base") as out:
        out.add("a", np.ones(9, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_cannot_be_written_twice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="written twice"), CanonicalWriter(tmp_path / "c", {}, kind="base") as out:
        out.add("a", np.ones(2, np.float32))
        out.add("a", np.ones(2, np.float32))
    assert list(tmp_path.iterdir()) == []


def edited(path: Path, change: object) -> Path:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))
    return path


def first(config: dict) -> dict:
    return config["modules"]["layers.4"]


WRONG = {
    "other method": (lambda q: q.update(quant_method="gptq"), InputError, "not a canonical checkpoint"),
    "future version": (lambda q: q.update(version=99), InputError, "version 99"),
    "modules is a list": (lambda q: q.update(modules=[]), UnsafeInputError, "not a table"),
    "bits 7": (lambda q: first(q).update(bits=7), UnsafeInputError, "needs bits"),
    "bits 4.0": (lambda q: first(q).update(bits=4.0), UnsafeInputError, "needs bits"),
    "bits of another width": (lambda q: first(q).update(bits=8), UnsafeInputError, "expected"),
    "group of another width": (lambda q: first(q).update(group_size=64), UnsafeInputError, "expected"),
    "group zero": (lambda q: first(q).update(group_size=0), UnsafeInputError, "needs bits"),
    "entry is a number": (lambda q: q["modules"].update({"layers.4": 4}), UnsafeInputError, "needs bits"),
    "module without tensors": (
        lambda q: q["modules"].update({"ghost": {"bits": 4, "group_size": 32}}),
        InputError,
        "no tensor",
    ),
    "plain tensor as module": (
        lambda q: q["modules"].update({"norm": {"bits": 4, "group_size": 32}}),
        InputError,
        "no tensor",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_configurations_that_disagree_with_the_tensors(tmp_path: Path, case: str) -> None:
    change, kind, reason = WRONG[case]
    with pytest.raises(kind, match=reason):
        CanonicalCheckpoint(edited(write(tmp_path / "c"), change))


def test_non_finite_offset_is_refused_by_name(tmp_path: Path) -> None:
    with CanonicalWriter(tmp_path / "c", {}, kind="base") as out:
        matrix = random_matrix(2, 32)
        out.add_quantized("m", matrix)
    path = tmp_path / "c" / "model.safetensors"
    raw = path.read_bytes()
    at = raw.rindex(matrix.offset.tobytes())
    path.write_bytes(raw[:at] + np.array(np.nan, np.float16).tobytes() + raw[at + 2 :])
    with pytest.raises(InputError, match=r"NaN or infinite.*: m"):
        CanonicalCheckpoint(tmp_path / "c").group_affine("m")
