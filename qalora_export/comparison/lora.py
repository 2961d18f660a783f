"""Low-rank adapters beside frozen weights: PEFT's LoRA on 16-bit layers, and QLoRA's on bitsandbytes' NF4.

    y = x Wᵀ + α/r · x Aᵀ Bᵀ           A (r, in), B (out, r)

QLoRA (arXiv 2305.14314): W in NF4 with block size 64 and double quantization; the adapter stays beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qalora_export.comparison.needs import BITSANDBYTES, PEFT, imported
from qalora_export.recipe import TrainSettings

PAGED = "paged_adamw_32bit"  # QLoRA's optimizer (arXiv 2305.14314, §3); on a CPU bitsandbytes pages nothing
# NF4: 4-bit codes, an 8-bit scale per 64 weights, a float32 scale and its mean per 256 of those (the same).
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def to_nf4(model: nn.Module, modules: Iterable[str]) -> None:
    """Put bitsandbytes' 4-bit layers, double quantization on, in place of the named linear layers."""
    bitsandbytes = imported(BITSANDBYTES)
    for name in modules:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        packed.bias = linear.bias
        # bitsandbytes 0.50, processors with AVX-512 BF16: after the first evaluation the weights stay in an order for
        # inference, whose product has no gradient: training goes on without most of its gradients, and without a word
        # (tests/comparison/test_lora.py).
        packed.support_avx512bf16_for_cpu = False
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed.to(linear.weight.device))  # this packs
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks the model, not the layer


def add_adapters(model: nn.Module, modules: list[str], settings: TrainSettings, seed: int) -> None:
    """Freeze `model` and give the named layers PEFT's LoRA, float32: A Kaiming uniform, B zero."""
    peft = imported(PEFT)
    model.requires_grad_(False)
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=modules, lora_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)


def adapted(model: nn.Module) -> dict[str, Any]:
    """Every layer with an adapter of PEFT's, by its name in the model without adapters."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """W + α/r · B A of a layer with an adapter, float32 (out, in); NF4 weights are dequantized first."""
    base = layer.get_base_layer()
    weight = base.weight
    if hasattr(weight, "quant_state"):
        weight = imported(BITSANDBYTES).functional.dequantize_4bit(weight.data, weight.quant_state)
    merged: Tensor = weight.float() + layer.get_delta_weight("default").float()
    return merged


@torch.no_grad()
def set_adapter(layer: Any, a: Tensor, b: Tensor) -> None:
    """Start a layer's adapter at A (r, in) and B (out, r); α/r is divided out of B."""
    layer.lora_A["default"].weight.copy_(a)
    layer.lora_B["default"].weight.copy_(b / layer.scaling["default"])


def adapter_bits(model: nn.Module, weights: int) -> float:
    """Bits per weight that a 16-bit adapter beside `weights` weights costs."""
    return 16 * sum(p.numel() for p in model.parameters() if p.requires_grad) / weights
