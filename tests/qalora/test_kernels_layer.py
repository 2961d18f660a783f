"""The layer on the kernels: same numbers as on torch, nothing large saved, one matrix at a time, one compiled graph."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qalora_export.qalora import function as function_module
from qalora_export.qalora.kernels import dispatch, ops
from qalora_export.qalora.layer import QALoraLinear
from tests.qalora.layers import trained_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Results = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels take tensors of the CPU as well (in the interpreter)."""
    monkeypatch.setattr(dispatch, "DEVICES", {"cpu", "cuda"})
    yield
    torch.compiler.reset()


def step(layer: nn.Module, x: Tensor, run: object = None) -> Results:
    """Output, dx, dA and dB of one step with a fixed output gradient."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x) if run is None else run(x)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype))
    return y.detach(), x.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()


def on_torch(layer: nn.Module, x: Tensor) -> Results:
    devices = dispatch.DEVICES
    dispatch.DEVICES = set()
    try:
        return step(layer, x)
    finally:
        dispatch.DEVICES = devices


@pytest.mark.parametrize(("bits", "group", "pool"), [(4, 32, None), (3, 16, 48), (2, 64, 128), (8, 32, 32)])
def test_kernels_and_torch_take_the_same_step(on_kernels: None, bits: int, group: int, pool: int | None) -> None:
    columns = 3 * (pool or group)
    layer = trained_layer(40, columns, bits=bits, group=group, pool=pool, bias=True).to(DEVICE)
    x = torch.randn(2, 5, columns, device=DEVICE)
    found, expected = step(layer, x), on_torch(layer, x)
    assert torch.equal(found[0], expected[0])  # the same matrix, so the same product
    assert torch.equal(found[1], expected[1])
    for mine, theirs in zip(found[2:], expected[2:], strict=True):  # group sums may add in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    low = step(layer, x.bfloat16())
    assert torch.equal(low[0], on_torch(layer, x.bfloat16())[0])
    assert (low[0].dtype, low[2].dtype) == (torch.bfloat16, torch.float32)


def test_merged_layer_is_the_trained_layer_bit_for_bit(on_kernels: None) -> None:
    layer = trained_layer(40, 96).to(DEVICE)
    after = copy.deepcopy(layer)
    after.offset.copy_(layer.effective_offset())
    after.detach_adapter()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(7, 96, device=DEVICE, dtype=dtype)
        assert torch.equal(layer(x), after(x))


def test_gradient_checkpointing_and_compile_take_the_same_step(on_kernels: None) -> None:
    layer = trained_layer(40, 96).to(DEVICE)
    x = torch.randn(4, 96, device=DEVICE)
    plain = step(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (lambda x: checkpoint(layer, x, use_reentrant=False), compiled):
        for found, expected in zip(step(layer, x, run), plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(step(layer, x, run)[0], plain[0])


def test_the_compiled_graph_holds_the_ops(on_kernels: None) -> None:
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        names.extend(
            str(node.target)
            for module in graph.modules()
            if isinstance(module, torch.fx.GraphModule)
            for node in module.graph.nodes
            if node.op == "call_function"
        )
        return graph

    with torch.no_grad():
        torch.compile(trained_layer().to(DEVICE), fullgraph=True, backend=backend)(torch.randn(2, 96, device=DEVICE))
    assert any("qalora.dequantize" in name for name in names)


def tower(depth: int = 3) -> nn.Sequential:
    return nn.Sequential(*[trained_layer(64, 64, seed=seed) for seed in range(depth)]).to(DEVICE)


def test_bytes_saved_for_backward_are_the_pooled_inputs(on_kernels: None) -> None:
    """Beside tensors the modules hold anyway: x/g per layer, in the dtype of x."""
    model = tower()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(6, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True))
    assert saved == [6 * (64 // 32) * 2] * 3


def test_one_dequantized_matrix_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a matrix is made, every earlier one is gone, in forward and in backward."""
    made: list[weakref.ref[Tensor]] = []
    original = function_module.dequantize

    def watched(*arguments: object) -> Tensor:
        assert all(reference() is None for reference in made)
        weight = original(*arguments)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(function_module, "dequantize", watched)
    model = tower()
    model(torch.randn(6, 64, device=DEVICE, requires_grad=True)).square().sum().backward()
    assert len(made) == 6


def test_few_rows_take_the_fused_kernel_when_asked(on_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = ops.fused_linear
    monkeypatch.setattr(ops, "fused_linear", lambda x, *rest: calls.append(x.shape[0]) or original(x, *rest))
    monkeypatch.setattr(dispatch, "fused_rows", 0)
    layer = trained_layer(40, 96).to(DEVICE)
    x = torch.randn(5, 96, device=DEVICE)
    with torch.no_grad():
        plain = layer(x)
        assert calls == []
        monkeypatch.setattr(dispatch, "fused_rows", 4)
        torch.testing.assert_close(layer(x[:4]), plain[:4], rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x), plain)
    assert calls == [4]
    step(layer, x[:4])
    assert calls == [4, 4]


def test_cpu_tensors_take_torch() -> None:
    assert not dispatch.applies(torch.zeros(1))


def test_a_gpu_without_triton_is_told_once_what_it_costs(
    on_kernels: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "TRITON", False)
    monkeypatch.setattr(dispatch, "_warned", False)
    layer = QALoraLinear(64, 8, bits=4, group_size=32).to(DEVICE)
    with caplog.at_level(logging.WARNING):
        layer(torch.randn(2, 64, device=DEVICE))
        layer(torch.randn(2, 64, device=DEVICE))
    assert sum("Triton is not installed" in record.message for record in caplog.records) == 1
