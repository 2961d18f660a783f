"""Values inside llama.cpp: its evaluation callback (llama_context_params.cb_eval) sees every node of the graph.

`python -m qalora_runtimes.llama_cpp.taps --help`. Names are those of llama.cpp's graph builders, "attn_norm-0" say, or
"blk.0.attn_q.weight input" and "… output": what a product with that tensor of the file saw and gave (taps.input_of).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes import taps
from qalora_runtimes.llama_cpp.activations import ExactGelu
from qalora_runtimes.llama_cpp.c_api import Context, Library, UnknownLayoutError
from qalora_runtimes.llama_cpp.nodes import Nodes, address, callback
from qalora_runtimes.llama_cpp.settings import LlamaSettings
from qalora_runtimes.llama_cpp.wheel import import_wheel, parameters
from qalora_runtimes.protocol import Ids, Job
from qalora_runtimes.runner import check_vocabulary
from qalora_runtimes.scoring import RunnerError

# Queries and keys keep their name through the rotation; what the projection gave is what was there before it.
AFTER_PROJECTION = b"ROPE"
PRODUCT = b"MUL_MAT"


class _Kept:
    """nodes.Watcher that keeps the values of `names`, by name. misread: the operands of a node could not be told."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._names: dict[bytes, str] = {}
        self._products = False
        self.values: dict[str, NDArray[np.float32]] = {}
        self._rotated: set[str] = set()
        self.misread = False

    def look_for(self, names: Sequence[str]) -> None:
        self._names = {name.encode(): name for name in names}
        self._products = any(name.endswith(taps.ENDS) for name in names)

    def begin(self) -> None:
        self.values, self._rotated = {}, set()

    def wants(self, name: bytes, operator: bytes) -> bool:
        return name in self._names or (self._products and operator == PRODUCT)

    def see(self, node: int, name: bytes, operator: bytes) -> None:
        if self._products and operator == PRODUCT:
            self._see_product(node)
        if name in self._names:
            self._see_named(node, self._names[name], operator)

    def _see_product(self, node: int) -> None:
        operands = self._nodes.sources(node)
        if operands is None:
            self.misread = True  # an exception would be lost on the way through the library
            return
        weight, x = operands
        name = self._nodes.name(weight).decode("utf-8", "replace")
        for tapped, tensor in ((taps.input_of(name), x), (taps.output_of(name), node)):
            value = self._nodes.read(tensor) if tapped.encode() in self._names else None
            if value is not None:
                self.values[tapped] = value

    def _see_named(self, node: int, known: str, operator: bytes) -> None:
        if operator == AFTER_PROJECTION:
            self._rotated.add(known)
        value = None if known in self._rotated else self._nodes.read(node)
        if value is not None:
            self.values[known] = value


class TappedContext:
    """taps.Tapped on one GGUF file through the C API."""

    def __init__(self, library: Library, options: argparse.Namespace, job: Job) -> None:
        """Raises UnknownLayoutError for a library without the functions that read a node."""
        nodes = Nodes(library)
        self._kept = _Kept(nodes)
        exact = [ExactGelu(nodes)] if options.exact else []  # first: what is kept is what goes on
        self._callback = callback(nodes, [*exact, self._kept])  # the library keeps only the address
        settings = LlamaSettings.of(exact=options.exact, threads=options.threads, job=job)
        model, context = parameters(settings)
        context["n_ubatch"] = context["n_batch"]  # one graph per batch, so each name is met once in a batch
        context["cb_eval"] = address(self._callback)
        self._context = Context(library, options.model, options.lora, model=model, context=context)
        check_vocabulary(job, self._context.vocabulary)
        self._context.run(np.zeros(1, np.int32), 0)  # shows the operators of the graph

    def taps(self, ids: Ids, names: Sequence[str], *, decode: bool) -> taps.Taps:
        self._kept.look_for(names)
        self._context.clear()
        step = 1 if decode else self._context.batch_limit
        parts = []
        for at in range(0, len(ids), step):
            self._kept.begin()
            chunk = ids[at : at + step]
            self._context.run(chunk, at)
            if self._kept.misread:
                raise RunnerError("struct ggml_tensor of this build of llama.cpp is of a release not known here")
            parts.append({name: value.reshape(len(chunk), -1) for name, value in self._kept.values.items()})
        common = set.intersection(*(set(part) for part in parts))
        return {name: np.concatenate([part[name] for part in parts]) for name in common}


def arguments() -> argparse.Namespace:
    out = taps.parser("qalora_runtimes.llama_cpp.taps", "Read values inside llama.cpp.")
    out.add_argument("--lora", type=Path, help="adapter GGUF, loaded by llama.cpp itself at scale 1")
    return out.parse_args()


def open_runtime(options: argparse.Namespace, job: Job) -> TappedContext:
    module = import_wheel()
    try:
        return TappedContext(Library(Path(module.xllamacpp.__file__)), options, job)
    except UnknownLayoutError as error:
        raise RunnerError(str(error)) from error


if __name__ == "__main__":
    sys.exit(taps.main(arguments(), open_runtime))
