"""The xllamacpp wheel driven through the C API; its own server answers for tokenizer and chat template."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes.behaviour import Request
from qalora_runtimes.llama_cpp.activations import ExactGelu
from qalora_runtimes.llama_cpp.behave import behave, only_scored
from qalora_runtimes.llama_cpp.c_api import Context, Library, UnknownLayoutError
from qalora_runtimes.llama_cpp.layouts import FLASH_ATTENTION_OFF, KV_F32
from qalora_runtimes.llama_cpp.local_server import LocalServer
from qalora_runtimes.llama_cpp.nodes import Nodes, address, callback
from qalora_runtimes.llama_cpp.server import ServerRuntime
from qalora_runtimes.llama_cpp.settings import LlamaSettings
from qalora_runtimes.protocol import Ids, Job, LongSequence, TextRequest
from qalora_runtimes.runner import Runtime, check_vocabulary
from qalora_runtimes.scoring import MissingRuntimeError, Rows, RunnerError
from qalora_runtimes.side_by_side import groups_of, steps_of

PACKAGE = "xllamacpp"
WAIT_POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
# Passive, GNU OpenMP turns 100 times at most as soon as another pool (the server's) makes threads more than processors.
WAITING = {WAIT_POLICY: "active", SPINS: "1000"}
BATCH, MICRO_BATCH = 2048, 512  # llama-server's defaults
LOGGED = {  # what llama.cpp itself says it did → fingerprint
    "flash_attention": re.compile(r"flash_attn\s*=\s*(\w+)"),
    "flash_attention_resolved": re.compile(r"Flash Attention (?:was auto, set to )?(enabled|disabled)"),
    "kv_dtype_k": re.compile(r"K \((\w+)\)"),
    "kv_dtype_v": re.compile(r"V \((\w+)\)"),
}


def open_wheel(arguments: argparse.Namespace, job: Job) -> Runtime:
    """The C API where the wheel's is known, else its server: slower, same numbers, said on stderr."""
    module = import_wheel()
    settings = LlamaSettings.of(exact=arguments.exact, threads=arguments.threads, job=job)
    server = LocalServer(module, arguments.model, arguments.lora, settings)
    if arguments.through != "server":
        try:
            library = Library(Path(module.xllamacpp.__file__))
            return CApiRuntime(library, arguments.model, arguments.lora, settings, job, server)
        except UnknownLayoutError as error:
            if arguments.through == "c-api":
                raise RunnerError(str(error)) from error
            sys.stderr.write(f"{error}; asking its server instead, one position at a time (slow)\n")
    return ServerRuntime(server.client(), job, version=version(), settings=settings.described())


def import_wheel() -> Any:
    """The package, its OpenMP threads set to sleep soon while they wait unless the user's environment says otherwise.

    Spinning threads stall each other as soon as the machine does anything else: with a load of 12 on 2 cores, 100
    tokens took more than 10 minutes spinning and 3 seconds sleeping. Threads that sleep at once lose time at each of
    the hundreds of products of a token: a model of 135 M parameters decodes 33 tokens per second so and 100 after 1,000
    turns of spinning, and beside 14 busy processes 5 and 16.
    """
    if WAIT_POLICY not in os.environ:
        os.environ |= WAITING
    try:
        import xllamacpp
    except ImportError as error:
        raise MissingRuntimeError(PACKAGE, error) from error
    return xllamacpp


def version() -> str:
    return importlib.metadata.version(PACKAGE)


def parameters(settings: LlamaSettings) -> tuple[dict[str, int], dict[str, int]]:
    """(model, context) parameters that differ from llama.cpp's own defaults."""
    batch = min(BATCH, settings.context)
    exact_model = {"use_extra_bufts": 0, "n_gpu_layers": 0}
    exact_context = {
        "type_k": KV_F32,
        "type_v": KV_F32,
        "flash_attn_type": FLASH_ATTENTION_OFF,
        "offload_kqv": 0,
        "op_offload": 0,
    }
    context = {
        "n_ctx": settings.context,
        "n_batch": batch,
        "n_ubatch": min(MICRO_BATCH, batch),
        "n_threads": settings.threads,
        "n_threads_batch": settings.threads,
    }
    if settings.sequences > 1:
        context |= {"n_seq_max": settings.sequences, "kv_unified": 1}
    return (exact_model, context | exact_context) if settings.exact else ({}, context)


class CApiRuntime:
    """runner.Runtime on llama_decode: every position of a sequence from one batch, or one token per step.

    Of the exact path steps of several sequences are one batch.
    """

    def __init__(
        self, library: Library, model: Path, lora: Path | None, settings: LlamaSettings, job: Job, server: LocalServer
    ) -> None:
        self._settings, self._server, self._lora = settings, server, lora
        for_model, for_context = parameters(settings)
        self._gelu: ExactGelu | None = None
        if settings.exact:
            nodes = Nodes(library)
            self._gelu = ExactGelu(nodes)
            watchers = [self._gelu]
            self._callback = callback(nodes, watchers)  # the library keeps only the address
            for_context["cb_eval"] = address(self._callback)
        self._context = Context(library, model, lora, model=for_model, context=for_context)
        check_vocabulary(job, self._context.vocabulary)
        log = "".join(library.log)
        self._logged = {name: found[-1] for name, pattern in LOGGED.items() if (found := pattern.findall(log))}
        if self._gelu is not None:
            self._check_exact()
            self._context.run(np.zeros(1, np.int32), 0)  # shows the operators of the graph
            self._gelu.begin()
            if not self._gelu.there:
                watchers.clear()

    def _check_exact(self) -> None:
        """llama.cpp's own log must confirm the settings that --exact promises."""
        promised = {"flash_attention": "disabled", "kv_dtype_k": "f32", "kv_dtype_v": "f32"}
        for name, value in promised.items():
            if self._logged.get(name, value) != value:
                raise RunnerError(f"--exact needs {name} = {value}, llama.cpp reports {self._logged[name]}")

    def prefill(self, ids: Ids) -> Rows:
        """A prompt longer than llama.cpp's batch is split as its server splits it."""
        self._context.clear()
        limit = self._context.batch_limit
        return np.concatenate([self._context.run(ids[at : at + limit], at) for at in range(0, len(ids), limit)])

    def decode(self, ids: Ids) -> Rows:
        self._context.clear()
        return np.concatenate([self._context.run(ids[at : at + 1], at) for at in range(len(ids))])

    def decode_steps(self, job: Job) -> Iterator[tuple[list[int], Rows]] | None:
        """What ships is proven by the kernels of one token."""
        return self._side_by_side(job) if self._settings.sequences > 1 else None

    def _side_by_side(self, job: Job) -> Iterator[tuple[list[int], Rows]]:
        """In no more cells than the job needs anyway."""
        for group in groups_of(job, job.longest):
            self._context.clear()
            for at, tokens, positions in steps_of(job, group):
                yield positions, self._context.step(tokens, [at] * len(tokens), list(range(len(tokens))))

    def text_answers(self, request: TextRequest) -> dict[str, Any]:
        return self._server.client().text_answers(request)

    def behave(self, request: Request) -> dict[str, Any]:
        """A task alone goes through the C API: only there are the settings of the exact path in force."""
        if request.scored and not request.questions:
            return only_scored(self._context, request, self._settings.sequences)
        return behave(self._server.client(), request, self._context)

    def long(self, sequence: LongSequence) -> Rows:
        self._context.clear()
        return np.concatenate([self._context.run(ids, start, at) for start, ids, at in sequence.chunks()])

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": "llama.cpp",
            "package": PACKAGE,
            "version": version(),
            "logits_through": "C API, every position of a batch",
            "settings": {
                **self._settings.described(),
                "lora": self._lora is not None,
                **{name.lower(): os.environ[name] for name in WAITING if name in os.environ},
                **self._logged,
            },
            # Operators that the exact path replaced; without this key a run was through another interface.
            **({} if self._gelu is None else {"replaced": self._gelu.describe()}),
        }
