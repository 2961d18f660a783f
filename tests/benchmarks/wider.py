"""samples/base with 512 features instead of 384, and the same logits: 256 divides every matrix, as K-quants need.

The features between are zero, one group of 32 after every three, so that no super-block is emptier than another; the
heads between (one after every three, with its group of queries) reach the output through zeros. RMSNorm then divides by
a mean over 512 features, which its weight and epsilon make up for.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_export.models.loading import load_model
from samples.base.quality import MODEL, windows_of

WIDE, HEADS, RUN = 512, 8, 32  # RUN: features of a group
KEPT = MODEL / "config.json", MODEL / "model.safetensors"  # what is not copied but made
SAME = 1e-4  # largest difference of logits, of float32 sums in another order


def widened(out: Path) -> Path:
    """The wider model as a plain folder. Raises AssertionError when its logits are not the narrow one's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    narrow = load_model(MODEL, dtype=torch.float32)
    old: Any = narrow.config
    share = old.hidden_size / WIDE
    told = old.to_dict() | {"hidden_size": WIDE, "num_attention_heads": HEADS, "rms_norm_eps": old.rms_norm_eps * share}
    wide = LlamaForCausalLM(LlamaConfig(**told | {"dtype": "float32"})).eval()
    features = _places(old.hidden_size, WIDE, RUN)
    queries = _places(old.hidden_size, WIDE, old.head_dim)
    with torch.no_grad():
        for name, weight in narrow.state_dict().items():
            mine, leaf = wide.state_dict()[name], name.split(".")[-2]
            if leaf.endswith("norm"):
                mine.fill_(float(weight.mean()) * share**0.5)[features] = weight * share**0.5
            else:
                rows = {"q_proj": queries, "o_proj": features, "down_proj": features}.get(leaf)
                columns = {"o_proj": queries, "down_proj": None}.get(leaf, features)
                _put(mine, weight, rows, columns)
        ids = windows_of(1)
        apart = float((wide(ids).logits - narrow(ids).logits).abs().max())
    assert apart < SAME, f"the wider model is another one: logits are {apart} apart"
    wide.save_pretrained(out)
    for path in MODEL.iterdir():
        if path not in KEPT:
            shutil.copy(path, out)
    return out


def _places(narrow: int, wide: int, run: int) -> Tensor:
    """Where the narrow features go: in runs, an empty one after every three (narrow : wide = 3 : 4)."""
    assert 4 * narrow == 3 * wide and narrow % (3 * run) == 0
    return torch.arange(wide).view(-1, 4, run)[:, :3].flatten()


def _put(wide: Tensor, narrow: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """narrow at these rows and columns of wide (None: all), zeros elsewhere."""
    at = (torch.arange(size) if part is None else part for part, size in zip((rows, columns), wide.shape, strict=True))
    wide.zero_()[torch.meshgrid(*at, indexing="ij")] = narrow
