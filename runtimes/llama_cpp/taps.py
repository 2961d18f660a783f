"""Values inside llama.cpp: its evaluation callback (llama_context_params.cb_eval) sees every node of the graph.

`python -m qalora_runtimes.llama_cpp.taps --help`. Names are those of llama.cpp's graph builders, "attn_norm-0" say.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from ctypes import c_bool, c_char_p, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes import taps
from qalora_runtimes.llama_cpp.c_api import Context, Library, UnknownLayoutError
from qalora_runtimes.llama_cpp.settings import LlamaSettings
from qalora_runtimes.llama_cpp.wheel import import_wheel, parameters
from qalora_runtimes.protocol import Ids, Job
from qalora_runtimes.runner import check_vocabulary
from qalora_runtimes.scoring import RunnerError

# Queries and keys keep their name through the rotation; what the projection gave is what was there before it.
AFTER_PROJECTION = b"ROPE"
FLOAT_BYTES = 4
EvalCallback = ctypes.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_get_name": (c_char_p, (c_void_p,)),
    "ggml_op_desc": (c_char_p, (c_void_p,)),
    "ggml_nelements": (c_int64, (c_void_p,)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_is_contiguous": (c_bool, (c_void_p,)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
}


class TappedContext:
    """taps.Tapped on one GGUF file through the C API."""

    def __init__(self, library: Library, options: argparse.Namespace, job: Job, names: list[str]) -> None:
        """Raises UnknownLayoutError for a library without the functions that read a node."""
        try:
            for name, (result, arguments) in PROTOTYPES.items():
                function = getattr(library.c, name)
                function.restype, function.argtypes = result, arguments
        except AttributeError as error:
            raise UnknownLayoutError(f"this build of llama.cpp does not show its graph: {error}") from error
        self._c, self._names = library.c, {name.encode(): name for name in names}
        self._values: dict[str, NDArray[np.float32]] = {}
        self._rotated: set[str] = set()
        self._callback = EvalCallback(self._on_node)  # the library keeps only the address
        settings = LlamaSettings.of(exact=options.exact, threads=options.threads, longest=job.longest)
        model, context = parameters(settings)
        context["n_ubatch"] = context["n_batch"]  # one graph per batch, so each name is met once in a batch
        context["cb_eval"] = ctypes.cast(self._callback, c_void_p).value or 0
        self._context = Context(library, options.model, options.lora, model=model, context=context)
        check_vocabulary(job, self._context.vocabulary)

    def taps(self, ids: Ids, *, decode: bool) -> taps.Taps:
        self._context.clear()
        step = 1 if decode else self._context.batch_limit
        parts = []
        for at in range(0, len(ids), step):
            self._values, self._rotated = {}, set()
            chunk = ids[at : at + step]
            self._context.run(chunk, at)
            parts.append({name: value.reshape(len(chunk), -1) for name, value in self._values.items()})
        common = set.intersection(*(set(part) for part in parts))
        return {name: np.concatenate([part[name] for part in parts]) for name in common}

    def _on_node(self, node: int, ask: bool, _user: object) -> bool:
        """Asked first whether a node is wanted, then called again with its value there; True goes on."""
        name = self._names.get(self._c.ggml_get_name(node))
        if ask or name is None:
            return name is not None if ask else True
        if self._c.ggml_op_desc(node) == AFTER_PROJECTION:
            self._rotated.add(name)
        count = int(self._c.ggml_nelements(node))
        readable = self._c.ggml_nbytes(node) == FLOAT_BYTES * count and self._c.ggml_is_contiguous(node)
        if name not in self._rotated and readable:
            value = np.empty(count, np.float32)
            self._c.ggml_backend_tensor_get(node, value.ctypes.data_as(c_void_p), 0, value.nbytes)
            self._values[name] = value
        return True


def arguments() -> argparse.Namespace:
    out = taps.parser("qalora_runtimes.llama_cpp.taps", "Read values inside llama.cpp.")
    out.add_argument("--lora", type=Path, help="adapter GGUF, loaded by llama.cpp itself at scale 1")
    return out.parse_args()


def open_runtime(options: argparse.Namespace, job: Job, names: list[str]) -> TappedContext:
    module = import_wheel()
    try:
        return TappedContext(Library(Path(module.xllamacpp.__file__)), options, job, names)
    except UnknownLayoutError as error:
        raise RunnerError(str(error)) from error


if __name__ == "__main__":
    sys.exit(taps.main(arguments(), open_runtime))
