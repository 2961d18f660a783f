"""One decoder layer at a time: the model is a skeleton on the meta device, weights come from the folder as needed.

At any moment memory holds one layer in float32 and the calibration activations, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qalora_export.checkpoint.model_folder import ModelFolder, as_float32
from qalora_export.errors import InputError, refused_by
from qalora_export.models.loading import attention_for

TOKENS_PER_BATCH = 4096


class Skeleton:
    """The model on the meta device and the names of its parts."""

    def __init__(self, folder: ModelFolder, device: torch.device, *, attention: str = "sdpa") -> None:
        self.folder, self.device = folder, device
        self.model = _build(folder.path, attention)
        self.base = self.model.base_model
        self.instead: dict[str, Callable[[], NDArray[np.float32]]] = {}  # tensors that are other ones than the folder's
        self.prefix = f"{self.model.base_model_prefix}."
        self.tied = bool(getattr(self.model.config, "tie_word_embeddings", False))  # defaults of the class included
        self.base.rotary_emb = type(self.base.rotary_emb)(config=self.base.config).to(device)

    def embeddings(self) -> dict[str, int]:
        """The token embedding by module name, with its width."""
        table = self.base.get_input_embeddings()
        return {name: int(module.embedding_dim) for name, module in self.model.named_modules() if module is table}

    def check_complete(self) -> None:
        """Raise InputError when the folder lacks a tensor or holds it in another shape."""
        for name, parameter in self.model.named_parameters():
            if self.tied and name == "lm_head.weight":
                continue
            stored = self.folder.entry(name).shape
            if stored != tuple(parameter.shape):
                raise InputError(
                    f"a tensor has shape {stored}, the config says {tuple(parameter.shape)}",
                    where=f"{self.folder.path}: {name}",
                    fix="is config.json of this model?",
                )

    def layer_name(self, index: int) -> str:
        return f"{self.prefix}layers.{index}"

    def layer_count(self) -> int:
        return len(self.base.layers)

    def linears(self) -> dict[str, nn.Linear]:
        """Every linear layer by module name, in the model's order."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}

    @contextmanager
    def materialized(self, name: str) -> Iterator[nn.Module]:
        """The module `name` with real float32 weights on the device; back on the meta device afterwards."""
        module = self.model.get_submodule(name)
        state = {key: torch.from_numpy(self._values(f"{name}.{key}")) for key in module.state_dict()}
        module.to_empty(device=self.device)
        self._refill(module)
        module.load_state_dict(state)
        del state
        try:
            yield module
        finally:
            module.to("meta")

    def _values(self, name: str) -> NDArray[np.float32]:
        made = self.instead.get(name)
        return as_float32(self.folder.tensor(name)) if made is None else made()

    def _refill(self, module: nn.Module) -> None:
        """Give buffers that no file holds (Gemma's embedding scale) the values the model is built with."""
        for part in module.modules():
            if part._non_persistent_buffers_set:
                self.model._init_weights(part)

    def enter(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, list[dict[str, Any]]]:
        """What the model hands to its first layer (n, length, hidden), and what it passes to each layer beside that.

        ids (n, length); the embedding must be materialized. cache: a KV cache whose length is where ids begin; it
        counts them, and is not among the arguments.
        """
        recorders = [_Recorder(cache, index) for index in range(self.layer_count())]
        layers, norm = self.base.layers, self.base.norm
        self.base.layers, self.base.norm = nn.ModuleList(recorders), nn.Identity()
        try:
            output = self.base(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        finally:
            self.base.layers, self.base.norm = layers, norm
        return output.last_hidden_state, [recorder.arguments for recorder in recorders]

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """From final hidden states (1, tokens, hidden) to logits, as the model does it: lm_head, scales, soft caps."""
        stand_in, head, prefix = _Given(), self.model.lm_head, self.model.base_model_prefix
        base, weight = getattr(self.model, prefix), head.weight
        with self.materialized(f"{self.prefix}embed_tokens" if self.tied else "lm_head") as module:
            if self.tied:
                head.weight = module.weight
            setattr(self.model, prefix, stand_in)
            try:
                yield lambda hidden: stand_in.through(self.model, hidden)
            finally:
                setattr(self.model, prefix, base)
                if self.tied:
                    head.weight = weight


class Activations:
    """The calibration sequences between two layers: hidden float32 (n, length, hidden), updated in place."""

    def __init__(self, skeleton: Skeleton, windows: NDArray[np.int64]) -> None:
        """Run embedding and rotary tables; remember what the model passes to each layer beside the hidden states."""
        self._skeleton = skeleton
        self._batch = max(1, TOKENS_PER_BATCH // windows.shape[1])
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        with skeleton.materialized(f"{skeleton.prefix}embed_tokens"), torch.no_grad():
            chunks = [self._embed(torch.from_numpy(part)) for part in _split(windows, self._batch)]
        self.hidden = torch.cat(chunks)

    def run(self, layer: nn.Module, index: int, *, keep: bool) -> None:
        """Send every sequence through `layer`; with `keep` its outputs become the new hidden states."""
        with torch.no_grad():
            for begin in range(0, len(self.hidden), self._batch):
                part = self.hidden[begin : begin + self._batch]
                output = layer_output(layer(part, **self._arguments[len(part)][index]))
                if keep:
                    self.hidden[begin : begin + self._batch] = output

    def run_plain(self, module: nn.Module) -> None:
        """Replace the hidden states by module(hidden), for the final norm."""
        with torch.no_grad():
            for begin in range(0, len(self.hidden), self._batch):
                self.hidden[begin : begin + self._batch] = module(self.hidden[begin : begin + self._batch])

    def batches(self) -> Iterator[Tensor]:
        """The hidden states a batch at a time, (b, length, hidden)."""
        yield from self.hidden.split(self._batch)

    def _embed(self, ids: Tensor) -> Tensor:
        hidden, arguments = self._skeleton.enter(ids.to(self._skeleton.device))
        self._arguments.setdefault(len(ids), arguments)
        return hidden


class _Recorder(nn.Module):
    """Stands in for a decoder layer: returns hidden states unchanged, keeps the other arguments, counts in `cache`."""

    def __init__(self, cache: Any, index: int) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self._cache, self._index = cache, index

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.arguments = {name: value for name, value in arguments.items() if name != "past_key_values"}
        if self._cache is not None:  # positions and masks of the next token follow from the number of tokens there
            token = hidden.new_zeros(1, 1, hidden.shape[1], 1)
            self._cache.update(token, token, self._index)
        return hidden


class _Given(nn.Module):
    """Stands in for everything below lm_head: answers the hidden states it was given."""

    def through(self, model: nn.Module, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        logits: Tensor = model(inputs_embeds=hidden, use_cache=False).logits
        return logits

    def forward(self, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


def layer_output(output: Any) -> Tensor:
    """The hidden states a decoder layer answers, which some families wrap in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _split(windows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [windows[begin : begin + size] for begin in range(0, len(windows), size)]


def _build(path: Path, attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with refused_by("Transformers", where=path / "config.json", doing="build the model"):
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention_for(config, attention)
            )
    return model.eval()
