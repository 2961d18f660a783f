"""The QA-LoRA layer against slow formulas, autograd in float64, and its own merged form."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qalora_export.errors import InputError
from qalora_export.qalora.function import effective_offset, group_sum
from qalora_export.qalora.layer import QALoraLinear
from tests.qalora.layers import layer_of, naive_weight, random_matrix, trained_layer

SHAPES = [  # bits, group, pool
    (4, 32, None),
    (2, 32, 32),
    (3, 32, 96),
    (8, 64, 64),
    (4, 16, 48),
    (4, 32, 64),
]


def columns_for(group: int, pool: int | None) -> int:
    return 2 * (pool or group)


def merged(layer: QALoraLinear) -> QALoraLinear:
    """The layer as merge writes it: offset_eff in place of offset, no adapter."""
    result = copy.deepcopy(layer)
    result.offset.copy_(layer.effective_offset())
    result.detach_adapter()
    return result


@pytest.mark.parametrize(("bits", "group", "pool"), SHAPES)
def test_forward_equals_numpy_in_float64(bits: int, group: int, pool: int | None) -> None:
    layer = trained_layer(24, columns_for(group, pool), bits=bits, group=group, pool=pool, bias=True)
    x = np.random.default_rng(0).normal(size=(2, 5, layer.in_features))
    a, b = layer.lora_A.detach().double().numpy(), layer.lora_B.detach().double().numpy()
    delta = np.repeat(layer.scaling * b @ a, layer.pool // group, axis=1)
    offset = (layer.offset.double().numpy() + delta).astype(np.float16).astype(np.float64)
    assert np.array_equal(layer.effective_offset().double().numpy(), offset)
    bare = layer_of_offset(layer, offset)
    expected = x @ naive_weight(bare).numpy().T + layer.bias.detach().double().numpy()
    found = layer(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    found32 = layer(torch.from_numpy(x).float()).detach().numpy()
    assert found32.dtype == np.float32
    np.testing.assert_allclose(found32, expected, rtol=1e-4, atol=1e-4)


def layer_of_offset(layer: QALoraLinear, offset: np.ndarray) -> QALoraLinear:
    bare = copy.deepcopy(layer)
    bare.detach_adapter()
    bare.offset.copy_(torch.from_numpy(offset))
    return bare


@pytest.mark.parametrize(("bits", "group", "pool"), SHAPES)
def test_gradients_equal_autograd_of_the_naive_formula_in_float64(bits: int, group: int, pool: int | None) -> None:
    layer = trained_layer(24, columns_for(group, pool), bits=bits, group=group, pool=pool).double()
    x = torch.randn(3, 7, layer.in_features, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 7, 24, dtype=torch.float64)
    y = layer(x)
    y.backward(grad)

    x2 = x.detach().clone().requires_grad_()
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    y2 = x2 @ naive_weight(layer, a, b).T
    y2.backward(grad)
    for found, expected in ((y, y2), (x.grad, x2.grad), (layer.lora_A.grad, a.grad), (layer.lora_B.grad, b.grad)):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_float32_gradients_agree_with_float64() -> None:
    layer = trained_layer(64, 256)
    wide = copy.deepcopy(layer).double()
    x = torch.randn(16, 256)
    layer(x).square().sum().backward()
    wide(x.double()).square().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(layer.lora_A.grad.double(), wide.lora_A.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.lora_B.grad.double(), wide.lora_B.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("bits", "group", "pool"), SHAPES)
def test_merged_forward_is_the_trained_forward_bit_for_bit(bits: int, group: int, pool: int | None) -> None:
    layer = trained_layer(40, columns_for(group, pool), bits=bits, group=group, pool=pool, bias=True)
    after = merged(layer)
    x = torch.randn(3, 11, layer.in_features)
    assert not torch.equal(after.offset, layer.offset)
    assert torch.equal(layer(x), after(x))
    with torch.no_grad():
        assert torch.equal(layer(x), after(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), after(x))
    assert torch.equal(layer(x.bfloat16()), after(x.bfloat16()))
    assert torch.equal(layer(x.double()), after(x.double()))


def test_a_new_adapter_changes_nothing() -> None:
    layer = layer_of(random_matrix(32, 64))
    x = torch.randn(4, 64)
    before = layer(x)
    layer.attach_adapter(8, 16.0)
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.effective_offset(), layer.offset.float())
    layer.detach_adapter()
    assert torch.equal(layer(x), before)


def test_grad_and_no_grad_forward_agree_bit_for_bit() -> None:
    layer = trained_layer()
    x = torch.randn(2, 3, 96)
    with torch.no_grad():
        without = layer(x)
    assert torch.equal(layer(x), without)


def test_only_the_pooled_input_is_saved_for_backward() -> None:
    """Neither the weight nor x: what autograd keeps beside the layer's own tensors is 1/pool of x."""
    layer = trained_layer(48, 96)
    own = {t.data_ptr() for t in (layer.codes, layer.scale, layer.offset, layer.lora_A, layer.lora_B)}
    saved: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(5, 96, requires_grad=True))
    assert saved == [(5, 3)]


def test_offset_is_the_same_for_any_order_of_summation() -> None:
    """float64 hides the order: permuting the rank dimension moves no float16."""
    layer = trained_layer(256, 1024, rank=16)
    order = torch.randperm(16)
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    shuffled = effective_offset(layer.offset, a[order], b[:, order], layer.scaling)
    assert torch.equal(shuffled, effective_offset(layer.offset, a, b, layer.scaling))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16), nn.Module.double])
def test_casts_leave_scale_offset_and_adapter_alone(cast: object) -> None:
    layer = trained_layer(bias=True)
    layer(torch.randn(2, 96)).sum().backward()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    grad = layer.lora_A.grad.clone()
    cast(nn.Sequential(layer))
    for name in ("codes", "scale", "offset"):
        assert getattr(layer, name).dtype == before[name].dtype
        assert torch.equal(getattr(layer, name), before[name])
    assert torch.equal(layer.lora_A.float(), before["lora_A"])
    assert torch.equal(layer.lora_B.float(), before["lora_B"])
    assert torch.equal(layer.lora_A.grad.float(), grad)


def test_casting_on_the_meta_device_keeps_dtypes() -> None:
    layer = QALoraLinear(64, 32, bits=4, group_size=32, device="meta").bfloat16()
    assert (layer.codes.dtype, layer.scale.dtype) == (torch.uint8, torch.float16)
    assert layer.to_empty(device="cpu").offset.shape == (32, 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    layer = trained_layer()
    x = torch.randn(4, 96, requires_grad=True)
    layer(x).square().sum().backward()
    plain = [t.grad.clone() for t in (x, layer.lora_A, layer.lora_B)]
    layer.zero_grad()
    x.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for found, expected in zip((x, layer.lora_A, layer.lora_B), plain, strict=True):
        assert torch.equal(found.grad, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend: str) -> None:
    layer = trained_layer(bias=True)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(4, 96, requires_grad=True)
    assert torch.equal(compiled(x), layer(x))
    layer.zero_grad()
    compiled(x).square().sum().backward()
    found = layer.lora_A.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, layer.lora_A.grad, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))
    torch.compiler.reset()


def test_autocast_trains_the_adapter_in_float32() -> None:
    layer = trained_layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(8, 96))
    y.float().square().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    assert layer.lora_A.grad.isfinite().all()


def test_frozen_layers_pass_gradients_to_their_input() -> None:
    layer = layer_of(random_matrix(32, 64))
    x = torch.randn(4, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad.double(), naive_weight(layer).sum(0).expand(4, -1), rtol=1e-5, atol=1e-5)


def test_group_sum_keeps_float64_and_widens_bfloat16() -> None:
    x = torch.randn(2, 64, dtype=torch.float64)
    assert torch.equal(group_sum(x, 2), x.view(2, 2, 32).sum(-1))
    assert group_sum(x.bfloat16(), 2).dtype == torch.float32


@pytest.mark.parametrize("pool", [16, 48])
def test_pool_that_does_not_fit_is_refused(pool: int) -> None:
    layer = layer_of(random_matrix(32, 64))
    with pytest.raises(InputError, match="pool"):
        layer.attach_adapter(4, 8.0, pool=pool)


def test_in_features_must_divide_into_groups() -> None:
    with pytest.raises(InputError, match="groups"):
        QALoraLinear(100, 8, bits=4, group_size=32)


@pytest.mark.parametrize("rows", [2, 64])
def test_both_orders_of_the_adapter_gradients_agree_with_autograd(rows: int) -> None:
    """16 pools, rank 2: past d_offset; 2 pools, rank 8: by way of it."""
    for columns, rank in ((512, 2), (64, 8)):
        layer = trained_layer(24, columns, rank=rank).double()
        x = torch.randn(rows, columns, dtype=torch.float64)
        a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
        layer(x).square().sum().backward()
        (x @ naive_weight(layer, a, b).T).square().sum().backward()
        torch.testing.assert_close(layer.lora_A.grad, a.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.lora_B.grad, b.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("columns", "asked", "pool"), [(576, 128, 64), (640, 128, 128), (192, 128, 64), (576, 192, 192)]
)
def test_a_pool_that_does_not_divide_the_width_is_its_greatest_divisor_that_does(
    columns: int, asked: int, pool: int
) -> None:
    layer = layer_of(random_matrix(32, columns, group=64))
    layer.attach_adapter(4, 8.0, pool=asked)
    assert layer.pool == pool
