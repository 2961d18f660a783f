"""QA-LoRA+: scales trained beside offsets, against the formulas one group at a time and plain autograd."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import InputError
from qalora_export.grid import GroupAffine, differing, unpack_codes
from qalora_export.models.loading import load_model
from qalora_export.qalora.adapter_files import load_adapter
from qalora_export.qalora.attach import attach, quantized_linears
from qalora_export.qalora.export_adapter import export_gguf_adapter
from qalora_export.qalora.layer import QALoraLinear
from qalora_export.qalora.merge import merge
from qalora_export.qalora.scales import centre_and_spread
from qalora_export.recipe import TrainSettings
from tests.models import make_tiny_canonical
from tests.qalora.adapters import own_adapter
from tests.qalora.layers import layer_of, random_matrix

IDS = torch.from_numpy(np.random.default_rng(3).integers(0, 300, (2, 20)))


def layer_with_scales(*, bits: int = 4, pool: int | None = None, matrix: GroupAffine | None = None) -> QALoraLinear:
    """A layer whose adapter moves scales and offsets visibly."""
    layer = layer_of(matrix or random_matrix(24, 128, bits=bits))
    generator = torch.Generator().manual_seed(bits)
    layer.attach_adapter(3, 6.0, pool=pool, scales=True, generator=generator)
    assert layer.scales is not None and layer.lora_B is not None
    for part in (layer.lora_B, layer.scales.B):
        part.data.normal_(0, 0.05, generator=generator)
    return layer


def straight(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`; the gradient passes."""
    return exact + (exact.to(dtype).double() - exact).detach()


def naive(layer: QALoraLinear, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(matrix, scale, offset) in float64, group by group by the docstring of qalora/scales.py; differentiable."""
    codes = torch.from_numpy(unpack_codes(layer.codes.numpy(), layer.bits)).double()
    scales, offsets, columns = [], [], []
    for group in range(layer.in_features // layer.group_size):
        own = codes[:, group * layer.group_size : (group + 1) * layer.group_size]
        pool = group * layer.group_size // layer.pool
        centre = own.mean(1).float().double()
        spread = own.var(1, correction=0).sqrt().clamp_min(1).float().double()
        s, m = layer.scale[:, group].double(), layer.offset[:, group].double()
        scale = straight(s + layer.scaling * (scale_b @ scale_a[:, pool]) / spread, torch.float16)
        offset = straight(m + layer.scaling * (b @ a[:, pool]) - centre * (scale - s), torch.float16)
        scales.append(scale)
        offsets.append(offset)
        columns.append(straight(own * scale[:, None] + offset[:, None], torch.float32))
    return torch.cat(columns, 1), torch.stack(scales, 1), torch.stack(offsets, 1)


def parts(layer: QALoraLinear) -> tuple[Tensor, ...]:
    assert layer.scales is not None and layer.lora_A is not None and layer.lora_B is not None
    return layer.lora_A, layer.lora_B, *layer.scales.pair


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("pool", [None, 64])
def test_matrix_and_gradients_are_those_of_the_formula(bits: int, pool: int | None) -> None:
    layer = layer_with_scales(bits=bits, pool=pool)
    x = torch.randn(5, 7, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    wide = [part.detach().double().requires_grad_() for part in parts(layer)]
    matrix, scale, offset = naive(layer, *wide)
    assert torch.equal(layer.dequantized(torch.float64), matrix.detach())
    assert layer.scales is not None
    found = layer.scales.effective((layer.scale, layer.offset), parts(layer)[:2], layer.scaling, layer.grid)
    assert torch.equal(found[0].double(), scale.detach()) and torch.equal(found[1].double(), offset.detach())
    assert (found[0] != layer.scale).float().mean() > 0.9

    weights = torch.randn(5, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad(((x @ matrix.T) * weights).sum(), [x, *wide])
    own = torch.autograd.grad((layer(x) * weights).sum(), [x, *parts(layer)])
    for mine, theirs in zip(own, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
    with torch.no_grad():
        assert torch.equal(layer(x), x @ matrix.T)


def test_an_update_of_zero_moves_nothing() -> None:
    layer = layer_of(random_matrix(24, 128))
    before = layer.dequantized(torch.float32)
    layer.attach_adapter(4, 8.0, scales=True)
    assert torch.equal(layer.dequantized(torch.float32), before)
    layer.detach_adapter()
    assert layer.scales is None and torch.equal(layer.dequantized(torch.float32), before)


def test_a_group_of_one_code_alone_turns_about_it() -> None:
    """It has no deviation to divide by; its weights are all the offset's."""
    matrix = random_matrix(24, 128)
    matrix.codes[:, :32] = 7
    layer = layer_with_scales(matrix=matrix)
    assert layer.scales is not None
    assert (layer.scales.spread[:, 0] == 1).all() and (layer.scales.centre[:, 0] == 7).all()
    assert layer.dequantized(torch.float32).isfinite().all()


def test_centre_and_spread_are_the_same_bits_in_numpy() -> None:
    for bits in (2, 3, 4, 8):
        matrix = random_matrix(16, 192, bits=bits, group=64)
        layer = layer_of(matrix)
        centre, spread = centre_and_spread(layer.codes, bits, 3)
        codes = matrix.codes.reshape(16, 3, 64).astype(np.int64)
        total, squares = codes.sum(-1), (codes**2).sum(-1)
        variance = (64 * squares - total**2) / 64**2
        assert np.array_equal(centre.numpy(), (total / 64).astype(np.float32))
        assert np.array_equal(spread.numpy(), np.sqrt(variance).clip(1).astype(np.float32))


def test_moving_to_another_dtype_rounds_nothing() -> None:
    layer = layer_with_scales()
    before = layer.dequantized(torch.float32)
    layer.bfloat16()
    assert torch.equal(layer.dequantized(torch.float32), before)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_model_is_the_trained_one_bit_for_bit(
    tiny_model: Path, tmp_path: Path, bits: int, dtype: torch.dtype
) -> None:
    base = make_tiny_canonical(tmp_path / "base", tiny_model, bits=bits, group=64)
    trained = own_adapter(base, tmp_path / "adapter", targets=("*",), pool=128, scales=True)
    report = merge(base, tmp_path / "adapter", tmp_path / "out")
    assert report.scales_trained and 0 < report.changed_scales <= report.offsets
    assert (report.changed_codes, report.changed_other_tensors, report.logits_differing) == (0, 0, 0)
    merged = load_model(tmp_path / "out")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.no_grad():
        assert torch.equal(trained(IDS).logits, merged(IDS).logits)
        assert not torch.equal(load_model(base)(IDS).logits, merged(IDS).logits)


def test_only_scales_and_offsets_of_adapted_modules_change(tiny_canonical: Path, tmp_path: Path) -> None:
    own_adapter(tiny_canonical, tmp_path / "adapter", scales=True)
    merge(tiny_canonical, tmp_path / "adapter", tmp_path / "out", compare_logits=False)
    before, after = CanonicalCheckpoint(tiny_canonical), CanonicalCheckpoint(tmp_path / "out")
    for name in before.modules:
        left, right = before.group_affine(name), after.group_affine(name)
        assert differing(left.codes, right.codes) == 0
        adapted = name.endswith(("q_proj", "down_proj"))
        assert (differing(left.scale, right.scale) > 0) == (differing(left.offset, right.offset) > 0) == adapted


def test_the_files_reload_bit_for_bit(tiny_canonical: Path, tmp_path: Path) -> None:
    """With several pool lengths too, of which the file has the greatest common one."""
    model = load_model(tiny_canonical)
    settings = TrainSettings(rank=4, scales=True, pool=128)
    from qalora_export.qalora.adapter_files import save_adapter

    for name in attach(model, settings):
        scales = model.get_submodule(name).scales
        scales.B.data.normal_(0, 0.02)
    save_adapter(model, tmp_path / "a", base=tiny_canonical, settings=settings)
    again = load_model(tiny_canonical)
    load_adapter(again, tmp_path / "a")
    for name, layer in quantized_linears(model).items():
        other = quantized_linears(again)[name]
        assert all(torch.equal(x, y) for x, y in zip(parts(layer), parts(other), strict=True))
    assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_peft_does_not_load_half_of_it(tiny_canonical: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    own_adapter(tiny_canonical, tmp_path / "a", scales=True)
    with pytest.raises((KeyError, ValueError)):
        peft.PeftConfig.from_pretrained(tmp_path / "a")


def test_neither_do_we_without_the_manifest(tiny_canonical: Path, tmp_path: Path) -> None:
    own_adapter(tiny_canonical, tmp_path / "a", scales=True)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "manifest.json").unlink()
    with pytest.raises(InputError, match="peft_type"):
        merge(tiny_canonical, tmp_path / "b", tmp_path / "out")
    config = tmp_path / "b" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LORA"}))
    with pytest.raises(InputError, match="moves scales and has no manifest"):
        merge(tiny_canonical, tmp_path / "b", tmp_path / "out")


def test_llama_cpp_has_no_adapter_that_does_this(tiny_canonical: Path, tmp_path: Path) -> None:
    own_adapter(tiny_canonical, tmp_path / "a", scales=True)
    with pytest.raises(InputError, match="moves scales"):
        export_gguf_adapter(tiny_canonical, tmp_path / "a", tmp_path / "a.gguf")


def test_a_scale_beyond_float16_is_named(tiny_canonical: Path, tmp_path: Path) -> None:
    own_adapter(tiny_canonical, tmp_path / "a", scales=True, alpha=1e8)
    with pytest.raises(InputError, match=r"merged (scale|offset) does not fit in float16"):
        merge(tiny_canonical, tmp_path / "a", tmp_path / "out")
