"""Before anything is timed: the kernels against torch at the shapes of the model, its loss against the float32 path.

And the kernels' own speed: dequantize against a device copy of the same bytes, the fused product against cuBLAS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from qalora_export.errors import ParityError
from qalora_export.qalora.dequant import dequantize, dequantize_torch
from qalora_export.qalora.function import effective_offset
from qalora_export.qalora.kernels import dispatch, ops
from qalora_export.qalora.layer import QALoraLinear
from tests.benchmarks.common import interleaved
from tests.benchmarks.variants import Setup, fill_packed, ours

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BF16_LOSS_TOLERANCE = 0.01  # relative; bf16 activations in 32 random layers, not the kernels, make the difference
FP32_LOSS_TOLERANCE = 1e-5  # the matrices are equal bit for bit; cuBLAS may choose another order
GRADIENT_TOLERANCE = 1e-3  # relative, float32: group sums in another order


@contextlib.contextmanager
def torch_path() -> Iterator[None]:
    """Without the kernels."""
    devices = set(dispatch.DEVICES)
    dispatch.DEVICES.clear()
    try:
        yield
    finally:
        dispatch.DEVICES.update(devices)


def shapes_of(config: Any) -> list[tuple[int, int]]:
    """The distinct (out, in) of the decoder's linear layers."""
    head = config.hidden_size // config.num_attention_heads
    hidden, keys = config.hidden_size, head * config.num_key_value_heads
    inter = config.intermediate_size
    return sorted({(hidden, hidden), (keys, hidden), (inter, hidden), (hidden, inter)})


def packed_layer(setup: Setup, out: int, columns: int) -> QALoraLinear:
    layer = QALoraLinear(columns, out, bits=setup.bits, group_size=setup.group, device=setup.device)
    fill_packed(layer)
    layer.offset.add_(torch.randn(layer.offset.shape, device=setup.device).half() * 0.01)
    layer.attach_adapter(setup.rank, setup.alpha)
    layer.lora_B.data.normal_(0, 0.01)
    return layer.requires_grad_(False)


def check_matrices(setup: Setup) -> dict[str, int]:
    """Values that differ between kernels and torch, by shape and dtype. Raises ParityError unless all are 0."""
    found: dict[str, int] = {}
    for out, columns in shapes_of(setup.config):
        layer = packed_layer(setup, out, columns)
        with torch_path():
            expected = effective_offset(layer.offset, layer.lora_A, layer.lora_B, layer.scaling)
        offset = effective_offset(layer.offset, layer.lora_A, layer.lora_B, layer.scaling)
        found[f"{out}x{columns} offset"] = int((offset != expected).sum())
        for dtype in DTYPES:
            wanted = dequantize_torch(layer.codes, layer.scale, expected, layer.bits, dtype)
            name = f"{out}x{columns} {str(dtype).removeprefix('torch.')}"
            found[name] = int((layer.dequantized(dtype) != wanted).sum())
            merged = dequantize(layer.codes, layer.scale, expected, layer.bits, dtype)
            found[f"{name} merged"] = int((merged != wanted).sum())
    if any(found.values()):
        raise ParityError("the kernels and torch disagree", why=str(found))
    return found


def check_loss(setup: Setup, sequence: int) -> dict[str, float]:
    """Loss and adapter gradients of two layers of the model: kernels in float32 and bf16 against torch in float32."""
    config = type(setup.config)(**setup.config.to_dict() | {"num_hidden_layers": 2})
    small = dataclasses.replace(setup, config=config, dtype=torch.float32)
    model = ours(small)
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * 1e-3)
    ids = torch.randint(0, config.vocab_size, (1, min(sequence, 512)), generator=generator).to(setup.device)
    with torch_path():
        reference, expected = _loss_and_gradient(model, ids)
    kernels, found = _loss_and_gradient(model, ids)
    low, _ = _loss_and_gradient(model.to(torch.bfloat16), ids)
    result = {
        "float32_reference": reference,
        "float32": kernels,
        "bf16": low,
        "gradient_relative_error": float((found - expected).norm() / expected.norm()),
    }
    if (
        abs(kernels - reference) > FP32_LOSS_TOLERANCE * reference
        or abs(low - reference) > BF16_LOSS_TOLERANCE * reference
        or not result["gradient_relative_error"] <= GRADIENT_TOLERANCE
    ):
        raise ParityError("the loss is not that of the float32 reference path", why=str(result))
    return result


def _loss_and_gradient(model: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad])


def bandwidth(setup: Setup, repeats: int) -> dict[str, Any]:
    """GB/s (bytes read + written) of dequantizing the largest matrix to bf16, and of a copy that moves as many bytes.

    Several matrices in turn, so that the GPU's cache holds none of them, and often enough that waiting for the device
    does not show.
    """
    out, columns = max(shapes_of(setup.config), key=lambda shape: shape[0] * shape[1])
    layers = [packed_layer(setup, out, columns) for _ in range(4)]
    first, rounds = layers[0], 8 if setup.device.type == "cuda" else 1
    moved = sum(tensor.nbytes for tensor in first.packed) + 2 * out * columns
    sources = [torch.empty(moved // 2, dtype=torch.uint8, device=setup.device) for _ in layers]
    works = {
        "dequantize": lambda layer, source: dequantize(*layer.packed, layer.bits, torch.bfloat16),
        "adapted": lambda layer, source: layer.dequantized(torch.bfloat16),
        "copy": lambda layer, source: source.clone(),
    }

    def run(work: Callable[[QALoraLinear, torch.Tensor], torch.Tensor]) -> None:
        for _ in range(rounds):
            for layer, source in zip(layers, sources, strict=True):
                work(layer, source)

    times = interleaved({name: functools.partial(run, work) for name, work in works.items()}, setup.device, repeats)
    speed = {name: rounds * len(layers) * moved / value.wall / 1e9 for name, value in times.items()}
    return {
        "matrix": [out, columns],
        "bytes": moved,
        "kernels": dispatch.applies(first.codes),
        **{f"{name}_gb_per_s": value for name, value in speed.items()},
        "fraction_of_copy": speed["dequantize"] / speed["copy"],
        "adapted_fraction_of_copy": speed["adapted"] / speed["copy"],
    }


def crossover(setup: Setup, repeats: int, rows: tuple[int, ...] = (1, 8, 16, 32, 64, 128, 256)) -> list[dict[str, Any]]:
    """Microseconds of the fused product and of dequantize + matmul by rows of x; empty where no kernels run."""
    out, columns = max(shapes_of(setup.config), key=lambda shape: shape[0] * shape[1])
    layer = packed_layer(setup, out, columns)
    if not dispatch.applies(layer.codes):
        return []
    parts = (*layer.packed, layer.bits)
    found = []
    for count in rows:
        x = torch.randn(count, columns, device=setup.device, dtype=torch.bfloat16)
        times = interleaved(
            {
                "fused": lambda x=x: ops.fused_linear(x, *parts),
                "separate": lambda x=x: F.linear(x, dequantize(*parts, torch.bfloat16)),
            },
            setup.device,
            repeats,
        )
        found.append({"rows": count} | {f"{name}_us": 1e6 * value.wall for name, value in times.items()})
    return found
