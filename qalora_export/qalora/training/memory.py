"""How much memory training takes, from the base's config and headers, before anything large is loaded.

With T = batch_size × sequence_length tokens per step, b bytes of the compute dtype, H hidden, I intermediate, Q and K
the widths of queries and of keys, g the pool length, r the rank and V the vocabulary:

    packed weights     codes, scale and offset, as in the checkpoint
    other weights      embeddings, norms, lm_head, biases: b each
    adapter            r · (in/g + out) per adapted matrix, float32; twice that where scales are trained (--scales), and
                       8 bytes a group for mean and deviation of its codes
    gradients          as the adapter
    optimizer          bytes per adapter parameter by optimizer (table STATE_BYTES)
    activations        saved for backward, per layer and token:
                         8H of the norms' float32 inputs + b · (2Q + 2K) of attention + 4 per head of its log-sum
                         + b · 3I of the MLP + b · Σ in/g of pooled inputs (a quantized layer saves no x; where
                         scales are trained it does instead: b · (2H + I), for q, k, v and gate, up share theirs, and o
                         has what attention saves)
                       with gradient checkpointing: b · H per layer, and one layer in full
    logits             T · V · (b + 12): logits, their float32 copy, log-softmax, gradient
    workspace          rebuilding the largest matrix from its codes: b bytes per weight with the Triton kernels, else
                       6 + b (b only if narrower than 4); and 12 more where scales are trained, for the gradient of a
                       whole matrix
    gathered           under FSDP, which divides the first five among devices: what is whole at one time, namely the
                       other weights, and packed weights and adapters of two layers (the one at work and the next)
    overhead           0.5 GiB of CUDA context and allocator on a GPU

Assumptions: SDPA attention without a saved T × T matrix (packing on a GPU adds a bool mask of batch × length²); no
activation is recomputed unless checkpointing is on; without FSDP every process needs all of this.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.forecast import Forecast
from qalora_export.errors import InputError, refused_by
from qalora_export.memory import bytes_text
from qalora_export.qalora.kernels import dispatch
from qalora_export.qalora.training.processes import LAUNCH
from qalora_export.recipe import TrainSettings

# Optimizer state per parameter; anything else is counted like Adam in float32.
STATE_BYTES = {
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "adamw_torch_8bit": 2,
    "adamw_torch_4bit": 1,
    "lion_32bit": 4,
    "paged_lion_32bit": 4,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "rmsprop_bnb_8bit": 1,
    "rmsprop": 4,
    "rmsprop_bnb": 4,
    "rmsprop_bnb_32bit": 4,
    "adagrad": 4,
    "sgd": 0,
    "adafactor": 1,
}
ADAM_STATE_BYTES = 8
CUDA_OVERHEAD = 512 * 2**20


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by purpose, on each device, and the number of trainable parameters."""

    packed_weights: int
    other_weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    gathered: int
    overhead: int
    trainable_parameters: int
    adapted_modules: int

    @property
    def total(self) -> int:
        return sum(size for _, size in self.rows())

    def rows(self) -> list[tuple[str, int]]:
        """(purpose, bytes), in the order of the module's table."""
        sizes = {k: v for k, v in asdict(self).items() if k not in ("trainable_parameters", "adapted_modules")}
        return [(name.replace("_", " "), size) for name, size in sizes.items()]


def estimate_memory(
    base: Path | Forecast, settings: TrainSettings, *, dtype: torch.dtype, cuda: bool, shards: int = 1
) -> MemoryEstimate:
    """The estimate for one process, when FSDP divides the model among `shards` devices.

    base: a canonical checkpoint, or the forecast of one that quantize has yet to write.
    Raises InputError for a base that is not canonical, targets that match nothing.
    """
    forecast = base if isinstance(base, Forecast) else Forecast.of(CanonicalCheckpoint(base))
    packed, other = forecast.packed_bytes, forecast.plain_values * dtype.itemsize
    model, names = _skeleton(forecast, settings)
    adapter = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    adapted = [model.get_submodule(name) for name in names]
    packed += sum(8 * module.scale.numel() for module in adapted if module.scales is not None)
    pooled = sum(module.lora_A.shape[1] for module in adapted)
    largest = max(math.prod((m.out_features, m.in_features)) for m in _linears(model))
    rebuilt = dtype.itemsize if cuda and dispatch.TRITON else 6 + (dtype.itemsize if dtype.itemsize < 4 else 0)
    tokens = settings.batch_size * settings.sequence_length
    state = adapter // 4 * STATE_BYTES.get(settings.optimizer, ADAM_STATE_BYTES)
    mine = {
        "packed_weights": packed,
        "other_weights": other,
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": state,
    }
    layers = model.config.num_hidden_layers
    return MemoryEstimate(
        **{purpose: math.ceil(size / shards) for purpose, size in mine.items()},
        gathered=other + math.ceil(2 * (packed + adapter) / layers) if shards > 1 else 0,
        activations=_activations(model.config, tokens, dtype.itemsize, pooled, settings),
        logits=tokens * model.config.vocab_size * (dtype.itemsize + 12),
        workspace=largest * (rebuilt + (12 if settings.scales else 0)),
        overhead=CUDA_OVERHEAD if cuda else 0,
        trainable_parameters=adapter // 4,
        adapted_modules=len(names),
    )


def _skeleton(forecast: Forecast, settings: TrainSettings) -> tuple[Any, list[str]]:
    """The model with its adapters on the meta device, by the code that training uses; holds no numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qalora_export.qalora.attach import attach
    from qalora_export.qalora.hf_quantizer import replace_linear

    with refused_by("Transformers", where=forecast.path / "config.json"), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(forecast.path), local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:  # of the model that quantize will import
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    with torch.device("meta"):
        for name, (bits, group) in forecast.modules.items():
            replace_linear(model, name, bits=bits, group_size=group, grid=forecast.grid(name).name)
    return model, attach(model, settings, forecast.untrained)


def _linears(model: Any) -> list[Any]:
    from qalora_export.qalora.attach import quantized_linears

    return list(quantized_linears(model).values())


def _activations(config: Any, tokens: int, width: int, pooled: int, settings: TrainSettings) -> int:
    """Bytes saved for backward; `pooled` is the sum of in/g over all adapted matrices of the model."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    layer = 8 * (hidden + 1) + 4 * config.num_attention_heads
    inputs = 2 * hidden + config.intermediate_size if settings.scales else pooled // layers
    layer += width * (2 * queries + 2 * keys + 3 * config.intermediate_size + inputs)
    per_token = width * hidden * layers + layer if settings.gradient_checkpointing else layer * layers
    total: int = tokens * per_token
    return total


def check_fits(estimate: MemoryEstimate) -> None:
    """Raise InputError when this process's GPU has less free memory than the estimate. Does nothing without CUDA."""
    if not torch.cuda.is_available():
        return
    free, _ = torch.cuda.mem_get_info()
    if estimate.total > free:
        raise InputError(
            f"training needs about {bytes_text(estimate.total)}, the GPU has {bytes_text(free)} free",
            where=torch.cuda.get_device_name(),
            why=", ".join(f"{name} {bytes_text(count)}" for name, count in estimate.rows()),
            fix="lower --batch-size (raise --gradient-accumulation), lower --sequence-length, or pass "
            "--gradient-checkpointing or --optimizer paged_adamw_8bit; several GPUs share one model "
            f"with: {LAUNCH}",
        )
