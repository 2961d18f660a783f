"""Right files of every type are right, damaged ones are named: weights alone, no runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.grid.narrow import BFLOAT16
from qalora_export.verify.foreign.artifact import Foreign, Tensor
from qalora_export.verify.foreign.fit import fit
from qalora_export.verify.foreign.gguf_file import open_gguf
from qalora_export.verify.foreign.holding import HELD
from qalora_export.verify.foreign.metadata import complete_config
from qalora_export.verify.foreign.weights import Finding, compared
from tests.verify.foreign.conftest import Plain
from tests.verify.foreign.damages import BY_NAME, damaged
from tests.verify.foreign.files import T, quantized, rewritten

NEED_WEIGHTS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M")  # llama.cpp refuses these without an importance matrix
K_MIX = {"": "Q4_K", "output.weight": "Q6_K", "blk.0.attn_v.weight": "Q6_K", "token_embd.weight": "Q8_0"}
WEIGHTS = sorted(name for name, damage in BY_NAME.items() if damage.part == "weights")


def looked_at(plain: Plain, file: Path) -> tuple[list[Finding], tuple[str, ...]]:
    config, folder = complete_config(plain.model), ModelFolder(plain.model)
    artifact = open_gguf(file, config, set(folder.names()))
    return compared(artifact, folder, {"q_proj": 4, "k_proj": 2}), artifact.absent


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "K mix", "Q2_K", "IQ4_XS"])
def test_right_files_have_nothing_wrong(kind: str, plain: Plain, tmp_path: Path) -> None:
    file = rewritten(plain.gguf, tmp_path / "model.gguf", K_MIX if kind == "K mix" else kind)
    found, absent = looked_at(plain, file)
    assert len(found) == 21
    assert not absent
    assert [finding for finding in found if finding.cause] == []


@pytest.mark.parametrize("kind", ["F16", "K mix"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_damage_is_named(name: str, kind: str, plain: Plain, tmp_path: Path) -> None:
    damage = BY_NAME[name]
    file = damaged(plain.gguf, tmp_path / "model.gguf", K_MIX if kind == "K mix" else kind, damage)
    found, absent = looked_at(plain, file)
    said = [finding.cause for finding in found if finding.cause] + [f"{name} is missing" for name in absent]
    assert any(damage.said in line for line in said), said
    assert len(said) <= 2, said


@pytest.mark.parametrize("kind", sorted(HELD))
def test_what_every_type_holds_by_llama_cpps_own_quantizer(kind: str) -> None:
    """Right numbers are right with and without importance matrices; other numbers never are."""
    random = np.random.default_rng(0)
    numbers = {
        "normal": random.normal(0, 0.02, (32, 512)),
        "heavy": random.standard_t(3, (32, 512)) * 0.02,
        "columns": random.normal(0, 0.02, (32, 512)) * np.exp(random.normal(size=512)),
        "shifted": random.normal(0.05, 0.02, (32, 512)),
    }
    importances = [None, np.exp(random.normal(size=512) * 1.5)]
    for name, values in numbers.items():
        source = values.astype(np.float32)
        for importance in importances[kind in NEED_WEIGHTS :]:
            found = dequantized(source, kind, importance)
            assert fit(tensor_of(found, kind), source).right, name
            if name != "shifted":  # a few levels do not tell numbers apart that are nearly all alike
                assert not fit(tensor_of(found[::-1], kind), source).like, name


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q8_0", "Q4_0"])
def test_a_block_whose_scale_has_another_exponent_is_found(kind: str) -> None:
    source = np.random.default_rng(1).normal(0, 0.02, (32, 512)).astype(np.float32)
    found = dequantized(source, kind, None)
    block = HELD[kind].above or HELD[kind].block
    found[17, block : 2 * block] *= 4
    near = fit(tensor_of(found, kind), source)
    assert (near.blocks, near.at) == (1, (17, block))


def dequantized(source: np.ndarray, kind: str, importance: np.ndarray | None) -> np.ndarray:
    from gguf.quants import dequantize

    return dequantize(quantized(source, T[kind], importance), T[kind])


def tensor_of(values: np.ndarray, kind: str) -> Tensor:
    return Tensor("x.weight", "x", kind, values.shape, lambda rows: values[rows])


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_norms_to_which_a_tool_added_one_in_sixteen_bits_are_the_models(dtype: np.dtype, plain: Plain) -> None:
    """GenAI's builder does so for Gemma; a value beside that is none it could have made."""
    folder, name = ModelFolder(plain.model), "model.norm.weight"
    added = (np.asarray(folder.tensor(name)).astype(np.float32) * np.float32(1.001) + 1).astype(dtype)

    class Source(ModelFolder):
        def tensor(self, name: str) -> np.ndarray:
            return super().tensor(name).astype(np.float32) * np.float32(1.001)

    def looked(values: np.ndarray) -> Finding:
        tensor = Tensor(name, "norm", "F32", values.shape, lambda rows: values[rows], shift=1.0)
        (finding,) = compared(Foreign(plain.model, {name: tensor}), Source(plain.model), {})
        return finding

    values = added.astype(np.float32)
    assert (looked(values).cause, looked(values).kind) == ("", "BF16" if dtype is BFLOAT16 else "F16")
    beside = values.copy()
    beside[7] = np.nextafter(values[7], np.float32(9))
    assert looked(beside).cause


def four_bits(values: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, scales) of MatMulNBits: symmetric 4 bits, whose last block of a row may be short of values."""
    filled = np.pad(values, ((0, 0), (0, -values.shape[1] % group)))
    parts = filled.reshape(len(values), -1, group)
    scales = np.abs(parts).max(-1, keepdims=True) / 7
    found = np.round(parts / scales) * scales
    return found.reshape(len(values), -1)[:, : values.shape[1]].astype(np.float32), scales[..., 0]


def test_a_last_block_that_is_short_of_values_is_looked_at() -> None:
    values = np.random.default_rng(0).normal(size=(16, 192)).astype(np.float32)
    found, _ = four_bits(values, 128)
    tensor = Tensor("w", "w", "int4 g128", values.shape, lambda rows: found[rows])
    assert fit(tensor, values).right
    found[3, 130] += 20
    wrong = fit(tensor, values)
    assert (wrong.blocks, wrong.total_blocks, wrong.at) == (1, 32, (3, 96))


def test_one_block_far_off_is_a_damaged_block_and_no_other_version(plain: Plain) -> None:
    folder, name = ModelFolder(plain.model), "model.layers.1.mlp.up_proj.weight"
    source = np.asarray(folder.tensor(name)).astype(np.float32)
    found, _ = four_bits(source, 32)
    found[0, 32:64] *= 100
    tensor = Tensor(name, name, "int4 g32", found.shape, lambda rows: found[rows])
    (finding,) = compared(Foreign(plain.model, {name: tensor}), folder, {})
    assert finding.fit is not None
    assert finding.fit.cosine < 0.9
    assert finding.cause.startswith("1 of 4096 blocks damaged, worst in row 0 from column 32")
