"""Adapters for tests: trained-looking ones of ours, and foreign folders written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from qalora_export.models.loading import load_model
from qalora_export.qalora.adapter_files import save_adapter
from qalora_export.qalora.attach import attach
from qalora_export.recipe import TrainSettings

QUERY = "model.layers.0.self_attn.q_proj"  # 128 × 128 in the tiny model


def own_adapter(base: Path, folder: Path, **changes: object) -> torch.nn.Module:
    """A saved adapter whose B is not zero; returns the model it sits on."""
    model = load_model(base)
    settings = TrainSettings(**{"rank": 4, "alpha": 8.0, "targets": ("*.q_proj", "*.down_proj")} | changes)
    generator = torch.Generator().manual_seed(0)
    for name in attach(model, settings):
        layer = model.get_submodule(name)
        layer.lora_B.data.normal_(0, 0.02, generator=generator)
        if layer.scales is not None:
            layer.scales.B.data.normal_(0, 0.02, generator=generator)
    save_adapter(model, folder, base=base, settings=settings)
    return model


def foreign_adapter(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config: object) -> Path:
    """PEFT's layout without our manifest: rank 4 on one module, pool 32."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    if tensors is None:
        tensors = {
            f"base_model.model.{QUERY}.lora_A.weight": rng.normal(size=(4, 4)).astype(np.float32),
            f"base_model.model.{QUERY}.lora_B.weight": rng.normal(0, 0.1, (128, 4)).astype(np.float32),
        }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config))
    return folder


def adapter_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Every A and B, of offsets and of scales."""
    ends = (".lora_A", ".lora_B", ".scales.A", ".scales.B")
    return [value for name, value in model.named_parameters() if name.endswith(ends)]
