"""The ways to train an adapter that train_cuda.py compares, each as one model with random weights made on the device.

All have the same architecture, targets (every linear layer of the decoder), rank and alpha, float32 adapters and no
dropout.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qalora_export.checkpoint.canonical import PARTS
from qalora_export.errors import RuntimeUnavailableError
from qalora_export.qalora.attach import attach
from qalora_export.qalora.hf_quantizer import replace_linear
from qalora_export.qalora.layer import QALoraLinear
from qalora_export.recipe import TrainSettings
from tests.benchmarks.gptq_linear import GptqLinear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Setup:
    """What every variant is built from."""

    config: Any
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    rank: int = 16
    alpha: float = 32.0
    bits: int = 4
    group: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Variant:
    title: str
    build: Callable[[Setup], Any]
    autocast: bool  # PEFT's float32 adapters run under autocast, as with Trainer(bf16=True)


def skeleton(setup: Setup, change: Callable[[Any], None]) -> Any:
    """A Llama built on the meta device, changed there, then allocated on the device with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(setup.seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(setup.config, dtype=setup.dtype, attn_implementation="sdpa")
        change(model)
    model.to_empty(device=setup.device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=setup.config).to(setup.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(PARTS):  # packed: fill_packed does those
                continue
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, WEIGHT_STD)
    return model.requires_grad_(False)


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in TARGETS]


def fill_packed(layer: QALoraLinear) -> None:
    """Random codes; scale and offset such that weights have mean about 0 and standard deviation about WEIGHT_STD."""
    top = 2**layer.bits - 1
    layer.codes.random_(0, 256)
    step = WEIGHT_STD * 12**0.5 / top
    layer.scale.uniform_(0.8 * step, 1.2 * step)
    layer.offset.copy_(-layer.scale.float() * top / 2)


def frozen_packed(setup: Setup) -> Any:
    """The packed base without adapters."""

    def change(model: Any) -> None:
        for name in linear_names(model):
            replace_linear(model, name, bits=setup.bits, group_size=setup.group)

    model = skeleton(setup, change)
    for module in model.modules():
        if isinstance(module, QALoraLinear):
            fill_packed(module)
    return model


def ours(setup: Setup) -> Any:
    model = frozen_packed(setup)
    attach(model, TrainSettings(rank=setup.rank, alpha=setup.alpha, seed=setup.seed))
    return model


def _lora_config(setup: Setup, **more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=setup.rank,
        lora_alpha=setup.alpha,
        target_modules=list(TARGETS),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        **more,
    )


def peft_lora(setup: Setup) -> Any:
    from peft import get_peft_model

    return get_peft_model(skeleton(setup, lambda model: None), _lora_config(setup))


def peft_qlora(setup: Setup) -> Any:
    """NF4 with double quantization, as transformers loads it for QLoRA."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RuntimeUnavailableError("not run: needs bitsandbytes", fix="pip install 'qalora-export[cuda]'")
    import bitsandbytes as bnb
    from peft import get_peft_model

    model = skeleton(setup, lambda model: None)
    for name in linear_names(model):
        parent, _, leaf = name.rpartition(".")
        old = model.get_submodule(name)
        new = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=False,
            compute_dtype=setup.dtype,
            quant_type="nf4",
            compress_statistics=True,
            device="meta",
        )
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        setattr(model.get_submodule(parent), leaf, new.to(setup.device))  # moving quantizes
        del old
    model.is_loaded_in_4bit = True
    return get_peft_model(model, _lora_config(setup))


def _use_qalora(setup: Setup, model: Any, base: Callable[[QALoraLinear], nn.Module]) -> Any:
    """PEFT's own GPTQLoraLinear and QA-LoRA variant around `base` of every packed layer."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config = _lora_config(setup, use_qalora=True, qalora_group_size=setup.group)
    for name in linear_names(model):
        parent, _, leaf = name.rpartition(".")
        adapted = GPTQLoraLinear(
            base(model.get_submodule(name)), "default", config=config, r=setup.rank, lora_alpha=setup.alpha
        )
        setattr(model.get_submodule(parent), leaf, adapted.to(setup.device))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def peft_use_qalora_torch(setup: Setup) -> Any:
    return _use_qalora(setup, frozen_packed(setup), lambda layer: GptqLinear(layer))


def peft_use_qalora_kernel(setup: Setup) -> Any:
    return _use_qalora(setup, frozen_packed(setup), lambda layer: layer)


VARIANTS = {
    "ours": Variant("ours (QA-LoRA through the offset)", ours, autocast=False),
    "lora": Variant("PEFT LoRA on bf16", peft_lora, autocast=True),
    "qlora": Variant("PEFT QLoRA (NF4, double quantization)", peft_qlora, autocast=True),
    # PEFT's variant is wired to GPTQModel's layers. These are stand-ins: PEFT's own adapter class over (1) GPTQ storage
    # and the arithmetic of GPTQModel's torch layer, (2) our dequantize kernel, which is PEFT's best case.
    "use_qalora": Variant("PEFT use_qalora (stand-in: torch GPTQ layer)", peft_use_qalora_torch, autocast=True),
    "use_qalora-kernel": Variant("PEFT use_qalora (stand-in: our kernel)", peft_use_qalora_kernel, autocast=True),
}


def step_of(variant: Variant, model: Any, setup: Setup, ids: Tensor) -> Callable[[], float]:
    """One optimizer step on `ids` (batch, sequence), fresh gradients every time; returns the loss when called."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=setup.device.type == "cuda")
    model.train()

    def step() -> float:
        context: Any = contextlib.nullcontext()
        if variant.autocast and setup.dtype != torch.float32:
            context = torch.autocast(setup.device.type, setup.dtype)
        with context:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
