"""Nodes of llama.cpp's graph as its evaluation callback (llama_context_params.cb_eval) meets them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from ctypes import c_bool, c_char_p, c_int64, c_size_t, c_void_p
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.llama_cpp.c_api import Library, UnknownLayoutError

FLOAT_BYTES = 4
# Offsets in struct ggml_tensor (ggml/include/ggml.h): ne[4], src[10], data, name. No function shows the sources.
SIZES, SOURCES, DATA, NAME = 16, 152, 248, 256
EvalCallback = ctypes.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_get_name": (c_char_p, (c_void_p,)),
    "ggml_op_desc": (c_char_p, (c_void_p,)),
    "ggml_nelements": (c_int64, (c_void_p,)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_is_contiguous": (c_bool, (c_void_p,)),
    "ggml_get_data": (c_void_p, (c_void_p,)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
}


class Nodes:
    """Name, operator and value of a node. Raises UnknownLayoutError for a library without these functions."""

    def __init__(self, library: Library) -> None:
        try:
            for name, (result, arguments) in PROTOTYPES.items():
                function = getattr(library.c, name)
                function.restype, function.argtypes = result, arguments
        except AttributeError as error:
            raise UnknownLayoutError(f"this build of llama.cpp does not show its graph: {error}") from error
        self._c = library.c

    def name(self, node: int) -> bytes:
        """As the graph builder calls it: b"ffn_gate-3"."""
        return bytes(self._c.ggml_get_name(node))

    def operator(self, node: int) -> bytes:
        """b"ROPE", b"GEGLU", …"""
        return bytes(self._c.ggml_op_desc(node))

    def read(self, node: int) -> NDArray[np.float32] | None:
        """A copy of the value, flat; None unless it is float32 without gaps."""
        count = int(self._c.ggml_nelements(node))
        if self._c.ggml_nbytes(node) != FLOAT_BYTES * count or not self._c.ggml_is_contiguous(node):
            return None
        value = np.empty(count, np.float32)
        self._c.ggml_backend_tensor_get(node, value.ctypes.data_as(c_void_p), 0, value.nbytes)
        return value

    def sources(self, node: int) -> tuple[int, int] | None:
        """The two operands of a node; None where the fields before and behind them are not where they are expected."""
        count = math.prod((c_int64 * 4).from_address(node + SIZES))
        name, data = ctypes.string_at(node + NAME), c_void_p.from_address(node + DATA).value
        if (count, name, data) != (self._c.ggml_nelements(node), self.name(node), self._c.ggml_get_data(node)):
            return None
        first, second = (c_void_p.from_address(node + SOURCES + 8 * i).value for i in (0, 1))
        return (first, second) if first and second else None

    def write(self, node: int, value: NDArray[np.float32]) -> None:
        """Put another value in the place of one that `read` gave."""
        self._c.ggml_backend_tensor_set(node, value.ctypes.data_as(c_void_p), 0, value.nbytes)


class Watcher(Protocol):
    """Looks at nodes of the graph, each right after it was computed and before the next."""

    def wants(self, name: bytes, operator: bytes) -> bool: ...
    def see(self, node: int, name: bytes, operator: bytes) -> None: ...


def callback(nodes: Nodes, watchers: Sequence[Watcher]) -> Any:
    """For `cb_eval`, to be kept alive as long as the context. llama.cpp asks about a node, computes it, shows it.

    watchers: may be emptied later; nobody is asked then.
    """

    def on_node(node: int, ask: bool, _user: object) -> bool:
        if not watchers:
            return False
        name, operator = nodes.name(node), nodes.operator(node)
        wanting = [watcher for watcher in watchers if watcher.wants(name, operator)]
        if ask:
            return bool(wanting)
        for watcher in wanting:
            watcher.see(node, name, operator)
        return True

    return EvalCallback(on_node)


def address(function: Any) -> int:
    """What a parameter struct holds of a callback."""
    return ctypes.cast(function, c_void_p).value or 0
