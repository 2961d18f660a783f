"""The quant_method "qalora" for Transformers: from_pretrained builds QALoraLinear modules and loads packed codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qalora_export.checkpoint.canonical import QUANT_METHOD, VERSION
from qalora_export.errors import InputError
from qalora_export.grid import AFFINE16, BITS, GROUP_SIZES, NamedGrid, grid_named
from qalora_export.qalora.embedding import embedding_conversion, without_embeddings
from qalora_export.qalora.layer import QALoraLinear


class QALoraConfig(QuantizationConfigMixin):
    """quantization_config of a canonical checkpoint: modules maps a module name to its bits, group_size and grid."""

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        version: int = VERSION,
        embeddings: dict[str, dict[str, Any]] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.version = version
        self.modules, self.embeddings = modules or {}, embeddings or {}


class QALoraHfQuantizer(HfQuantizer):
    """Loads canonical checkpoints; quantizing on load is refused (that is `qalora-export quantize`)."""

    requires_calibration = True
    quantization_config: QALoraConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, entry in self.quantization_config.modules.items():
            bits, group_size, grid = _read(name, entry)
            replace_linear(model, name, bits=bits, group_size=group_size, grid=grid.name)
        return model

    def get_weight_conversions(self) -> list[Any]:
        """An embedding in blocks is dequantized while it is loaded: to the model it is a plain one."""
        embeddings = self.quantization_config.embeddings.items()
        return [embedding_conversion(self, name, *_read(name, entry)) for name, entry in embeddings]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Transformers makes every floating-point parameter it loads trainable; scale and offset are not. An embedding
        that came in blocks is a plain one from here on, and save_pretrained writes it as that.
        """
        model._weight_conversions = without_embeddings(getattr(model, "_weight_conversions", None))
        model.config.quantization_config.embeddings = self.quantization_config.embeddings = {}
        for module in model.modules():
            if isinstance(module, QALoraLinear):
                for tensor in module.packed:
                    tensor.requires_grad_(False)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The Trainer takes a quantized model without PEFT only so: our adapters are the layers' own parameters."""
        return True


def _read(name: str, entry: Any) -> tuple[int, int, NamedGrid]:
    bits, group_size = (entry.get(key) if isinstance(entry, dict) else None for key in ("bits", "group_size"))
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise InputError(
            "quantization_config needs bits and group_size of the module",
            where=name,
            why=f"found {entry!r}"[:200],
            fix="re-create the checkpoint",
        )
    assert isinstance(bits, int) and isinstance(group_size, int)
    return bits, group_size, grid_named(entry.get("grid", AFFINE16.name), bits, group_size, where=name)


def replace_linear(
    model: nn.Module, name: str, *, bits: int, group_size: int, grid: str = AFFINE16.name
) -> QALoraLinear:
    """Swap the nn.Linear called `name` for an empty QALoraLinear on the same device. Raises InputError if absent."""
    try:
        old = model.get_submodule(name)
    except AttributeError as error:
        raise InputError("the checkpoint quantizes a module the model does not have", where=name) from error
    if not isinstance(old, nn.Linear):
        raise InputError(f"cannot quantize a {type(old).__name__}", where=name)
    with torch.device(old.weight.device):
        new = QALoraLinear(
            old.in_features,
            old.out_features,
            bits=bits,
            group_size=group_size,
            grid=grid,
            bias=old.bias is not None,
            dtype=old.weight.dtype,
        )
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    return new


def register() -> None:
    """Enter quantizer and config into Transformers' registry; calling it twice does no harm."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(QALoraConfig)
        register_quantizer(QUANT_METHOD)(QALoraHfQuantizer)


register()
