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
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from qalora_export.checkpoint.canonical import CanonicalCheckpoint, is_canonical
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.safetensors_file import TensorEntry
from qalora_export.errors import InputError
from qalora_export.grid import differing
from qalora_export.models.multimodal import TextPart, wrapped_family
from qalora_export.models.skeleton import Skeleton, layer_output
from qalora_export.progress import track
from qalora_export.qalora.dequant import dequantize
from qalora_export.verify.kernels.products import HEAD, linear_modules

AT_ONCE = 1024  # tokens of a batch of copies
Change = Callable[[Tensor], Tensor]  # of a value on its way, (…, features)
Played = Callable[[str, Tensor], Tensor]  # module and its x (1, tokens, in) -> x Wᵀ (1, tokens, out), before any bias


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
            raise InputError(
                f"PyTorch and numpy dequantize {wrong} values differently",
                where=f"{self.path}: {module}",
                why="the reference would not be the checkpoint",
                fix="report this with your CPU and torch version",
            )
        return weight

    def _quantized(self, name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        return module if leaf == "weight" and module in self.modules else None


class WithoutLinears(DequantizedCheckpoint):
    """The same, with zeros for the weights of linear layers, which are not read: something else answers for them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._linears = {f"{module}.weight" for module in linear_modules(self.config)}

    def tensor(self, name: str) -> NDArray[Any]:
        return np.zeros(self.entry(name).shape, np.float32) if name in self._linears else super().tensor(name)


def _opened(folder: Path | ModelFolder) -> ModelFolder:
    """A canonical checkpoint dequantized, the language model of a multimodal checkpoint, any other model as it is."""
    if isinstance(folder, ModelFolder):
        return folder
    if is_canonical(folder):
        return DequantizedCheckpoint(folder)
    whole = ModelFolder(folder)
    if (family := wrapped_family(whole)) is None:
        return whole
    scratch = tempfile.TemporaryDirectory(prefix="qalora-text-")
    part = TextPart(whole, family, Path(scratch.name))
    weakref.finalize(part, scratch.cleanup)
    return part


@dataclass
class _Step:
    """One forward pass of the whole model: hidden states (n, tokens, hidden) between layers, arguments by layer."""

    hidden: Tensor
    arguments: list[dict[str, Any]]


class LayerwiseModel:
    """A checkpoint, or any model folder, that answers log-probabilities of sequences, every position.

    checkpoint: a canonical one or any model folder by its path, or whatever answers like a folder. rounding: applied
    to the input of every quantized layer, in a plain folder of every linear layer but the head. played: answers every
    linear layer of a canonical checkpoint in its place, so that only what lies between them is computed here. noise:
    applied to what enters and leaves every linear layer and to the hidden states behind every decoder layer. All
    methods want torch.inference_mode.
    """

    def __init__(
        self,
        checkpoint: Path | ModelFolder,
        *,
        rounding: Change | None = None,
        played: Played | None = None,
        noise: Change | None = None,
        attention: str = "eager",
    ) -> None:
        if played is not None and isinstance(checkpoint, Path):
            self._checkpoint: ModelFolder = WithoutLinears(checkpoint)
        else:
            self._checkpoint = _opened(checkpoint)
        self._skeleton = Skeleton(self._checkpoint, torch.device("cpu"), attention=attention)
        self._skeleton.check_complete()
        if rounding is not None:
            self.change_inputs(lambda _, x: rounding(x))
        if played is not None:
            for name, linear in self._skeleton.linears().items():
                setattr(linear, "forward", functools.partial(_answered, played, name, linear))  # noqa: B010
        if noise is not None:
            for linear in self._skeleton.linears().values():
                linear.register_forward_pre_hook(lambda _, x: (noise(x[0]),))
                linear.register_forward_hook(lambda _, _x, y: noise(y))
            for layer in self._skeleton.base.layers:
                layer.register_forward_hook(
                    lambda _, _x, y: (noise(y[0]), *y[1:]) if isinstance(y, tuple) else noise(y)
                )

    @property
    def rounded(self) -> list[str]:
        """The layers whose input `rounding` is applied to, by module name."""
        return list(self._rounded())

    def change_inputs(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """Apply change(module, x) to the input of each of `rounded`, one sequence after the other as they are run."""
        for name in self._rounded():
            module = self._skeleton.model.get_submodule(name)
            module.register_forward_pre_hook(lambda _, x, name=name: (change(name, x[0]),))

    @property
    def frequencies(self) -> NDArray[np.float32]:
        """The rotary embedding the model really uses, radians per position, (head size / 2,)."""
        rotary = self._skeleton.base.rotary_emb  # one table, or one for each kind of layer (Gemma 3)
        table = rotary.full_attention_inv_freq if hasattr(rotary, "full_attention_inv_freq") else rotary.inv_freq
        frequencies: NDArray[np.float32] = table.float().numpy()
        return frequencies

    def rotate_by(self, frequencies: NDArray[np.floating[Any]]) -> None:
        """Turn by these radians per position, (head size / 2,), in every layer that has no table of its own."""
        rotary = self._skeleton.base.rotary_emb
        name = "full_attention_inv_freq" if hasattr(rotary, "full_attention_inv_freq") else "inv_freq"
        setattr(rotary, name, torch.from_numpy(np.asarray(frequencies, np.float32)))

    def _rounded(self) -> Iterable[str]:
        if isinstance(self._checkpoint, CanonicalCheckpoint):
            return self._checkpoint.modules
        return (name for name in self._skeleton.linears() if name != HEAD)

    def run(
        self,
        sequences: Iterable[NDArray[np.int32]],
        *,
        decode: bool,
        prefill: bool = True,
        kept: Sequence[NDArray[np.int64]] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Every sequence as a whole prompt and, with `decode`, token by token: [prefill] or [prefill, decoded].

        Without `prefill` only the second. Each float32 (positions, vocabulary), the sequences one below the other. A
        layer is loaded once for all. kept: of prefill, the positions of each sequence that are answered; else all.
        """
        ids = [torch.from_numpy(sequence.astype(np.int64))[None] for sequence in sequences]
        skeleton = self._skeleton
        with skeleton.materialized(f"{skeleton.prefix}embed_tokens"):
            prompts = [[_Step(*skeleton.enter(tokens))] for tokens in ids] if prefill else []
            walks = [self._embed_by_token(tokens) for tokens in ids] if decode else []
        self._through_layers(prompts, walks)
        with skeleton.materialized(f"{skeleton.prefix}norm"):
            for steps, positions in zip(prompts, kept or [], strict=kept is not None):
                steps[0].hidden = steps[0].hidden[:, torch.from_numpy(positions)]
            for step in (step for steps in prompts + walks for step in steps):
                step.hidden = skeleton.base.norm(step.hidden)
        return self._logprobs([steps for steps in (prompts, walks) if steps])

    def copies(
        self,
        sequences: Iterable[NDArray[np.int32]],
        count: int,
        *,
        kept: Sequence[NDArray[np.int64]] | None = None,
    ) -> Iterator[NDArray[np.float32]]:
        """`count` answers to each sequence as a whole prompt, float32 (tokens, vocabulary), which noise sets apart.

        Copies of a sequence go through in batches: products of other shapes than `run` computes, so of other roundings.
        kept: as in `run`.
        """
        skeleton = self._skeleton
        with skeleton.materialized(f"{skeleton.prefix}embed_tokens"):
            batches = [[_Step(*skeleton.enter(ids)) for ids in _batches(sequence, count)] for sequence in sequences]
        self._through_layers(batches, [])
        for steps, positions in zip(batches, kept or [], strict=kept is not None):
            for step in steps:
                step.hidden = step.hidden[:, torch.from_numpy(positions)]
        rows = (row for steps in batches for step in steps for row in step.hidden.split(1))
        with skeleton.materialized(f"{skeleton.prefix}norm"):
            normed = [skeleton.base.norm(row) for row in rows]
        with skeleton.head() as head:
            for row in normed:
                yield _stacked([row], head, skeleton.model.config.vocab_size)

    def at(self, ids: NDArray[np.int32], positions: NDArray[np.int32], *, chunk: int) -> NDArray[np.float32]:
        """Log-probabilities (k, vocabulary) at some positions of one long sequence.

        `chunk` tokens at a time on a KV cache, so that no matrix of attention is larger than (chunk, length).
        """
        skeleton, tokens = self._skeleton, torch.from_numpy(ids.astype(np.int64))[None]
        with skeleton.materialized(f"{skeleton.prefix}embed_tokens"):
            cache = self._cache()  # counts tokens only
            begins = range(0, tokens.shape[1], chunk)
            steps = [_Step(*skeleton.enter(tokens[:, begin : begin + chunk], cache)) for begin in begins]
        for index, layer in enumerate(track(skeleton.base.layers, "a long sequence in PyTorch, layers")):
            with skeleton.materialized(skeleton.layer_name(index)):
                _advance(layer, index, steps, self._cache())
        hidden = torch.cat([step.hidden for step in steps], dim=1)[:, torch.from_numpy(positions.astype(np.int64))]
        with skeleton.materialized(f"{skeleton.prefix}norm"):
            hidden = skeleton.base.norm(hidden)
        with skeleton.head() as head:
            return _stacked([hidden], head, self._skeleton.model.config.vocab_size)

    def _through_layers(self, prompts: list[list[_Step]], walks: list[list[_Step]]) -> None:
        """prompts: steps that do not see each other; walks: every step sees the earlier ones through the KV cache."""
        skeleton = self._skeleton
        for index, layer in enumerate(track(skeleton.base.layers, f"{self._checkpoint.path.name} in PyTorch, layers")):
            with skeleton.materialized(skeleton.layer_name(index)):
                for steps in prompts:
                    _advance(layer, index, steps, None)
                for steps in walks:
                    _advance(layer, index, steps, self._cache())

    def _logprobs(self, passes: list[list[list[_Step]]]) -> list[NDArray[np.float32]]:
        vocabulary = self._skeleton.model.config.vocab_size
        with self._skeleton.head() as head:
            return [
                _stacked([step.hidden for steps in sequences for step in steps], head, vocabulary)
                for sequences in passes
            ]

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self._skeleton.model.config)

    def _embed_by_token(self, ids: Tensor) -> list[_Step]:
        """One step per token. The cache only counts tokens here; every layer gets one of its own later."""
        cache = self._cache()
        return [_Step(*self._skeleton.enter(ids[:, at : at + 1], cache)) for at in range(ids.shape[1])]


def _answered(played: Played, name: str, linear: nn.Linear, x: Tensor) -> Tensor:
    y = played(name, x)
    return y if linear.bias is None else y + linear.bias


def _advance(layer: nn.Module, index: int, steps: list[_Step], cache: DynamicCache | None) -> None:
    for step in steps:
        step.hidden = layer_output(layer(step.hidden, past_key_values=cache, **step.arguments[index]))
        step.arguments[index] = {}  # no longer needed


def _batches(sequence: NDArray[np.int32], copies: int) -> list[Tensor]:
    """`copies` rows of ids, int64 (n, length) each: as many together as have AT_ONCE tokens."""
    most = max(1, AT_ONCE // len(sequence))  # attention needs the square of the length for each row
    row = torch.from_numpy(sequence.astype(np.int64))[None]
    return [row.expand(min(most, copies - begin), -1) for begin in range(0, copies, most)]


def _stacked(hidden: list[Tensor], head: Callable[[Tensor], Tensor], vocabulary: int) -> NDArray[np.float32]:
    """(1, tokens, hidden) each -> (all tokens, vocabulary)"""
    rows = np.empty((sum(part.shape[1] for part in hidden), vocabulary), np.float32)
    at = 0
    for part in hidden:
        rows[at : at + part.shape[1]] = torch.log_softmax(head(part)[0].float(), dim=-1).numpy()
        at += part.shape[1]
    return rows
