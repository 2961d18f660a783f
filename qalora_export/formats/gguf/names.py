"""Tensor names: Transformers ↔ GGUF, from llama.cpp's own table."""

from __future__ import annotations

import importlib.util
from typing import Any

from qalora_export.errors import InputError

SUFFIXES = (".weight", ".bias")


class NameMap:
    """Two-way mapping for one architecture and layer count."""

    def __init__(self, gguf_arch: str, layers: int) -> None:
        self._map = _fresh_tensor_name_map(gguf_arch, layers)

    def to_gguf(self, name: str) -> str:
        """ "model.layers.0.self_attn.q_proj.weight" -> "blk.0.attn_q.weight". Raises InputError when unknown."""
        found = self._map.get_name(name, try_suffixes=SUFFIXES)
        if found is None:
            raise InputError(
                "GGUF has no name for a tensor of this architecture",
                where=name,
                fix="the model holds more than its config.json says",
            )
        return str(found)


def _fresh_tensor_name_map(gguf_arch: str, layers: int) -> Any:
    """gguf.TensorNameMap writes into a dict shared by the class, so one architecture's names leak into the next.

    Executing the module anew, outside sys.modules, gives tables nobody else has touched.
    """
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

    spec = importlib.util.find_spec("gguf.tensor_mapping")
    if spec is None or spec.loader is None:
        raise InputError("the gguf package has no tensor_mapping module", fix="pip install 'gguf>=0.19,<0.20'")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arch = {name: key for key, name in MODEL_ARCH_NAMES.items()}.get(gguf_arch)
    if not isinstance(arch, MODEL_ARCH):
        raise InputError(f"the gguf package does not know the architecture {gguf_arch!r}")
    return module.TensorNameMap(arch, layers)
