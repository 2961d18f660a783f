"""The reference model one decoder layer at a time: memory holds one float32 layer, however many there are.

All sequences pass a layer before the next is loaded. Decoding, token by token, can be done so as well: what a layer
answers to a token depends on its own KV cache and on what the layer below answered to the tokens so far. Every product
is the one that the whole model computes, on the same shapes and in the same order, so the logits have the same bits.

Quantized layers are plain linear layers that hold the dequantized float32 matrix: the same product on the same numbers,
without unpacking codes again for every token. The matrices are compared with the numpy dequantization of the checkpoint
first, so the reference is not its own witness.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.safetensors_file import TensorEntry
from qalora_export.errors import InputError
from qalora_export.grid import differing
from qalora_export.qalora.dequant import dequantize
from qalora_export.quantize.streaming import Skeleton

Rounding = Callable[[Tensor, int], Tensor]  # x (…, in) and the group size of the layer -> what the layer sees of x


class DequantizedCheckpoint(CanonicalCheckpoint):
    """A canonical checkpoint that also answers for `<module>.weight` of its quantized modules, float32 (out, in)."""

    def entry(self, name: str) -> TensorEntry:
        module = self._quantized(name)
        if module is None:
            return super().entry(name)
        scale, (_, group_size) = super().entry(f"{module}.scale"), self.modules[module]
        shape = (scale.shape[0], scale.shape[1] * group_size)
        return TensorEntry(np.dtype(np.float32), shape, super().entry(f"{module}.codes").begin)

    def tensor(self, name: str) -> NDArray[Any]:
        """Raises InputError when PyTorch and numpy dequantize a module differently."""
        module = self._quantized(name)
        if module is None:
            return super().tensor(name)
        packed = self.packed(module)
        codes, scale, offset = (
            torch.from_numpy(np.array(part)) for part in (packed.codes, packed.scale, packed.offset)
        )
        weight = dequantize(codes, scale, offset, packed.bits, torch.float32).numpy()
        wrong = differing(weight, packed.unpack().dequantize())
        if wrong:
            raise InputError(f"PyTorch and numpy dequantize {wrong} values differently", where=f"{self.path}: {module}",
                             why="the reference would not be the checkpoint",
                             fix="report this with your CPU and torch version")  # fmt: skip
        return weight

    def _quantized(self, name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        return module if leaf == "weight" and module in self.modules else None


@dataclass
class _Step:
    """One forward pass of the whole model: hidden states (1, tokens, hidden) between layers, arguments by layer."""

    hidden: Tensor
    arguments: list[dict[str, Any]]


class LayerwiseModel:
    """A checkpoint that answers log-probabilities of sequences, every position.

    rounding: applied to the input of every quantized layer. All methods want torch.inference_mode.
    """

    def __init__(self, checkpoint: Path, *, rounding: Rounding | None = None) -> None:
        self._checkpoint = DequantizedCheckpoint(checkpoint)
        self._skeleton = Skeleton(self._checkpoint, torch.device("cpu"), attention="eager")
        self._skeleton.check_complete()
        base = self._skeleton.base
        self._rotary = base.rotary_emb = type(base.rotary_emb)(config=base.config)
        if rounding is not None:
            for name, (_, group_size) in self._checkpoint.modules.items():
                module = self._skeleton.model.get_submodule(name)
                module.register_forward_pre_hook(lambda _, x, size=group_size: (rounding(x[0], size),))

    @property
    def frequencies(self) -> NDArray[np.float32]:
        """The rotary embedding the model really uses, radians per position, (head size / 2,)."""
        return self._rotary.inv_freq.float().numpy()

    def run(self, sequences: Iterable[NDArray[np.int32]], *, decode: bool) -> list[NDArray[np.float32]]:
        """Every sequence as a whole prompt and, with `decode`, token by token: [prefill] or [prefill, decoded].

        Each float32 (positions, vocabulary), the sequences one below the other. A layer is loaded once for all.
        """
        ids = [torch.from_numpy(sequence.astype(np.int64))[None] for sequence in sequences]
        skeleton = self._skeleton
        with skeleton.materialized(f"{skeleton.prefix}embed_tokens"):
            prompts = [[self._embed(tokens, None)] for tokens in ids]
            walks = [self._embed_by_token(tokens) for tokens in ids] if decode else []
        for index, layer in enumerate(skeleton.base.layers):
            with skeleton.materialized(skeleton.layer_name(index)):
                for steps in prompts:
                    _advance(layer, index, steps, None)
                for steps in walks:
                    _advance(layer, index, steps, self._cache())
        with skeleton.materialized(f"{skeleton.prefix}norm"):
            for step in (step for steps in prompts + walks for step in steps):
                step.hidden = skeleton.base.norm(step.hidden)
        return self._logprobs([prompts, walks] if decode else [prompts])

    def _logprobs(self, passes: list[list[list[_Step]]]) -> list[NDArray[np.float32]]:
        skeleton = self._skeleton
        with skeleton.materialized(f"{skeleton.prefix}embed_tokens" if skeleton.tied else "lm_head") as module:
            head: Callable[[Tensor], Tensor] = module
            if skeleton.tied:
                head = functools.partial(nn.functional.linear, weight=cast(Tensor, module.weight))
            return [_stacked([step.hidden for steps in sequences for step in steps], head) for sequences in passes]

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self._skeleton.model.config)

    def _embed(self, ids: Tensor, cache: DynamicCache | None) -> _Step:
        """What the model hands to its first layer, and the arguments it passes to each of them."""
        base = self._skeleton.base
        recorders = [_Recorder(cache if index == 0 else None) for index in range(len(base.layers))]
        layers, norm = base.layers, base.norm
        base.layers, base.norm = nn.ModuleList(recorders), nn.Identity()
        try:
            output = base(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        finally:
            base.layers, base.norm = layers, norm
        return _Step(output.last_hidden_state, [recorder.arguments for recorder in recorders])

    def _embed_by_token(self, ids: Tensor) -> list[_Step]:
        """One step per token. The cache only counts tokens here; every layer gets one of its own later."""
        cache = self._cache()
        return [self._embed(ids[:, at : at + 1], cache) for at in range(ids.shape[1])]


class _Recorder(nn.Module):
    """Stands in for a decoder layer: returns hidden states unchanged, keeps the other arguments, counts in `cache`."""

    def __init__(self, cache: DynamicCache | None) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self._cache = cache

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.arguments = {name: value for name, value in arguments.items() if name != "past_key_values"}
        if self._cache is not None:  # positions and mask of the next token follow from the number of tokens in layer 0
            token = torch.zeros(1, 1, hidden.shape[1], 1)
            self._cache.update(token, token, 0)
        return hidden


def _advance(layer: nn.Module, index: int, steps: list[_Step], cache: DynamicCache | None) -> None:
    for step in steps:
        output = layer(step.hidden, past_key_values=cache, **step.arguments[index])
        step.hidden = output[0] if isinstance(output, tuple) else output
        step.arguments[index] = {}  # no longer needed


def _stacked(hidden: list[Tensor], head: Callable[[Tensor], Tensor]) -> NDArray[np.float32]:
    """(1, tokens, hidden) each -> (all tokens, vocabulary)"""
    rows: NDArray[np.float32] | None = None
    at = 0
    for part in hidden:
        found = torch.log_softmax(head(part)[0].float(), dim=-1).numpy()
        if rows is None:
            rows = np.empty((sum(other.shape[1] for other in hidden), found.shape[1]), np.float32)
        rows[at : at + len(found)] = found
        at += len(found)
    assert rows is not None, "a probe set has at least one sequence"
    return rows
