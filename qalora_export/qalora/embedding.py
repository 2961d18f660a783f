"""Embeddings in blocks, as Transformers loads them: dequantized on the way, a plain nn.Embedding afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from qalora_export.checkpoint.canonical import WEIGHT, parts_of, values_of
from qalora_export.grid import NamedGrid, PackedAffine, assembled


def embedding_conversion(quantizer: Any, module: str, bits: int, group_size: int, grid: NamedGrid) -> WeightConverter:
    """The parts of one embedding, by their names in the checkpoint, into its weight."""
    names = [f"{module}.{part}" for part in parts_of(grid)]
    return WeightConverter(names, f"{module}{WEIGHT}", [Dequantize(quantizer, bits, group_size, grid)])


class Dequantize(ConversionOps):
    """Parts of a matrix -> its numbers, float32 and then once more rounded to the dtype of the model's own weight.

    hf_quantizer: by this attribute Transformers knows an operation that wants tensors in their stored dtype.
    """

    def __init__(self, quantizer: Any, bits: int, group_size: int, grid: NamedGrid) -> None:
        self.hf_quantizer, self.bits, self.group_size, self.grid = quantizer, bits, group_size, grid

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **_: Any,
    ) -> dict[str, list[Tensor]]:
        parts = _by_part(input_dict)
        arrays = [parts[part].cpu().numpy() for part in parts_of(self.grid)]
        matrix: PackedAffine = assembled(self.grid, self.bits, self.group_size, *arrays)
        values = torch.from_numpy(values_of(matrix.unpack())).to(next(iter(parts.values())).device)
        return {full_layer_name: [values.to(model.get_parameter_or_buffer(full_layer_name).dtype)]}


def without_embeddings(conversions: list[Any] | None) -> list[Any] | None:
    """What is left to undo when a model is saved."""
    if conversions is None:
        return None
    return [c for c in conversions if not any(isinstance(op, Dequantize) for op in getattr(c, "operations", ()))]


def _by_part(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Transformers hands over a list for each pattern, or a tensor."""
    firsts = {name: value[0] if isinstance(value, list) else value for name, value in given.items()}
    return {name.replace("\\", "").rstrip("$").rpartition(".")[2]: tensor for name, tensor in firsts.items()}
