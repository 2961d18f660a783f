"""The reference: PyTorch, float32, eager attention, one sequence at a time, every position.

Quantized layers are replaced by plain linear layers that hold the dequantized float32 matrix: the same product on the
same numbers, without unpacking codes again for every token. The matrices are compared with the numpy dequantization
of the checkpoint first, so the reference is not its own witness.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import InputError
from qalora_export.grid import differing
from qalora_export.qalora.dequant import dequantize
from qalora_export.qalora.layer import QALoraLinear
from qalora_export.qalora.reference import load_model
from qalora_export.verify.probes import ProbeSet

SIMULATED_BLOCK = 32  # int8 activation blocks of llama.cpp's Q8_1


@dataclass(frozen=True)
class Reference:
    """logprobs: float32 (positions, vocabulary), whole prompts. decoded: the same, token by token with KV cache.

    frequencies: the rotary embedding the model really uses, radians per position, (head size / 2,).
    """

    logprobs: NDArray[np.float32]
    decoded: NDArray[np.float32] | None
    frequencies: NDArray[np.float32]


def reference_logprobs(checkpoint: Path, probes: ProbeSet, *, threads: int, decode: bool = False) -> Reference:
    """Run the probe set through the checkpoint. Raises InputError when the reference's own numbers are in doubt."""
    with fixed_threads(threads), torch.inference_mode():
        model = float32_model(checkpoint)
        prefill = np.concatenate([_prefill(model, ids) for ids in probes.sequences()])
        decoded = np.concatenate([_decode(model, ids) for ids in probes.sequences()]) if decode else None
    if not np.isfinite(prefill).all():
        raise InputError("the checkpoint gives NaN or infinite logits in PyTorch", where=checkpoint,
                         why="no runtime can be compared with that", fix="repair or retrain the model")  # fmt: skip
    return Reference(prefill, decoded, _frequencies(model))


def simulated_int8_logprobs(
    checkpoint: Path, probes: ProbeSet, *, threads: int, block: int | None = SIMULATED_BLOCK
) -> NDArray[np.float32]:
    """The same model with the input of every quantized layer rounded to int8, `block` in-features per step.

    block None: the layer's own group size. What int8 kernels do to activations, without any runtime.
    """
    with fixed_threads(threads), torch.inference_mode():
        model = float32_model(checkpoint)
        for name, (_, group_size) in CanonicalCheckpoint(checkpoint).modules.items():
            size = block or group_size
            model.get_submodule(name).register_forward_pre_hook(lambda _, x, size=size: (round_to_int8(x[0], size),))
        return np.concatenate([_prefill(model, ids) for ids in probes.sequences()])


def float32_model(checkpoint: Path) -> Any:
    """The checkpoint in float32, its quantized layers plain. Raises InputError when its numbers are in doubt."""
    model = load_model(checkpoint, dtype=torch.float32, attention="eager")
    canonical = CanonicalCheckpoint(checkpoint)
    for name in canonical.modules:
        layer = model.get_submodule(name)
        if not isinstance(layer, QALoraLinear):
            raise InputError("Transformers did not build the quantized layer", where=f"{checkpoint}: {name}")
        weight = dequantize(layer.codes, layer.scale, layer.offset, layer.bits, torch.float32)
        wrong = differing(weight.numpy(), canonical.group_affine(name).dequantize())
        if wrong:
            raise InputError(f"PyTorch and numpy dequantize {wrong} values differently", where=f"{checkpoint}: {name}",
                             why="the reference would not be the checkpoint",
                             fix="report this with your CPU and torch version")  # fmt: skip
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return model


def _frequencies(model: Any) -> NDArray[np.float32]:
    found = [value for name, value in model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
    if len(found) != 1:
        raise InputError(f"expected one rotary embedding in the model, found {len(found)}")
    return found[0].float().numpy()


def _prefill(model: Any, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """(length, vocabulary): one forward pass over the whole sequence."""
    logits = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1).numpy()


def _decode(model: Any, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """(length, vocabulary): token by token, each step seeing the earlier ones through the KV cache only."""
    cache, rows = None, []
    for token in ids.tolist():
        answer = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        rows.append(torch.log_softmax(answer.logits[0, -1].float(), dim=-1).numpy())
    return np.stack(rows)


def round_to_int8(x: torch.Tensor, block: int = SIMULATED_BLOCK) -> torch.Tensor:
    """What an int8 kernel sees of x (…, in): blocks rounded to steps of absmax / 127."""
    blocks = x.unflatten(-1, (-1, block))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return (torch.round(blocks / step.clamp_min(torch.finfo(x.dtype).tiny)) * step).flatten(-2)


@contextlib.contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """A fixed thread count, so the order of sums does not change between runs on one machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
