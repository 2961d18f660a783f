"""Teach Transformers the quant_method "qalora" without importing Transformers (and torch) before the user does.

Transformers keeps its quantizers in a registry that can be extended once `transformers.quantizers.auto` is loaded.
If it is loaded already we register at once; otherwise a finder waits for that one import and registers after it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register now or as soon as Transformers is imported; calling it twice does no harm."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def _register() -> None:
    """Importing hf_quantizer registers; where it is being imported already, it will when it is done."""
    import qalora_export.qalora.hf_quantizer  # noqa: F401


class _RegistryFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _register()
