"""Second backend: llama-cpp-python (an sdist that builds llama.cpp for the machine it is installed on)."""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
from typing import Any

import numpy as np
from qalora_runtimes import heartbeat
from qalora_runtimes.behaviour import Request
from qalora_runtimes.llama_cpp.layouts import KV_F32
from qalora_runtimes.llama_cpp.settings import LlamaSettings
from qalora_runtimes.protocol import Ids, Job, LongSequence, TextRequest
from qalora_runtimes.runner import Runtime, check_vocabulary
from qalora_runtimes.scoring import MissingRuntimeError, Rows, RunnerError

PACKAGE = "llama-cpp-python"


def open_binding(arguments: argparse.Namespace, job: Job) -> Runtime:
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingRuntimeError(PACKAGE, error) from error
    settings = LlamaSettings.of(exact=arguments.exact, threads=arguments.threads, job=job)
    options: dict[str, Any] = {
        "model_path": str(arguments.model),
        "n_ctx": settings.context,
        "logits_all": True,
        "verbose": False,
        "n_threads": settings.threads,
        "n_threads_batch": settings.threads,
        "lora_path": None if arguments.lora is None else str(arguments.lora),
    }
    if settings.exact:
        options |= {"type_k": KV_F32, "type_v": KV_F32, "flash_attn": False, "n_gpu_layers": 0}
        if "use_extra_bufts" in inspect.signature(llama_cpp.Llama.__init__).parameters:
            options["use_extra_bufts"] = False
    try:
        model = llama_cpp.Llama(**options)
    except (ValueError, RuntimeError) as error:
        raise RunnerError(f"llama-cpp-python cannot load {arguments.model}: {error}") from error
    return BindingRuntime(model, settings, job, extra_buffers=options.get("use_extra_bufts", True))


class BindingRuntime:
    """runner.Runtime on Llama.eval and Llama.scores (n_ctx, vocab), raw logits of every evaluated position."""

    def __init__(self, model: Any, settings: LlamaSettings, job: Job, *, extra_buffers: bool) -> None:
        self._model, self._settings, self._extra_buffers = model, settings, extra_buffers
        check_vocabulary(job, model.n_vocab())

    def prefill(self, ids: Ids) -> Rows:
        self._model.reset()
        self._model.eval(ids.tolist())
        return self._rows(len(ids))

    def decode(self, ids: Ids) -> Rows:
        self._model.reset()
        for token in ids.tolist():
            self._model.eval([token])
            heartbeat.advance()
        return self._rows(len(ids))

    def _rows(self, count: int) -> Rows:
        if self._model.n_tokens != count:
            raise RunnerError(f"llama-cpp-python holds {self._model.n_tokens} tokens after {count} were evaluated")
        return np.array(self._model.scores[:count], dtype=np.float32)

    def text_answers(self, request: TextRequest) -> dict[str, Any]:
        """This package renders chats with a template engine of its own, not llama.cpp's: reported as failed."""

        def encode(text: str, *, special: bool) -> list[int]:
            return list(self._model.tokenize(text.encode(), add_bos=special, special=special))

        before = encode("", special=True)
        reason = "llama-cpp-python does not offer llama.cpp's template engine; use xllamacpp or --server"
        return {
            "texts": [encode(text, special=True) for text in request.texts],
            "texts_literal": [encode(text, special=False) for text in request.texts],
            "rendered": [None] * len(request.chats),
            "rendered_ids": [None] * len(request.chats),
            "adds_bos": bool(before),
            "bos_id": before[0] if before else None,
            "errors": [f"chat {index}: {reason}" for index in range(len(request.chats))],
        }

    def behave(self, _request: Request) -> dict[str, Any]:
        """What llama.cpp's users run is its server; this package samples and stops in Python."""
        raise RunnerError("llama-cpp-python does not generate as llama.cpp does; use xllamacpp or --server")

    def long(self, _sequence: LongSequence) -> Rows:
        raise RunnerError("llama-cpp-python keeps the logits of every position; use xllamacpp for a long sequence")

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": "llama.cpp",
            "package": PACKAGE,
            "version": importlib.metadata.version(PACKAGE),
            "logits_through": "Llama.scores, every position of a batch",
            "settings": self._settings.described() | {"extra_buffers": self._extra_buffers},
        }
