"""Logits from a llama-server, one position per request: any stock server on a device, or a wheel of unknown layout."""

from __future__ import annotations

from typing import Any

import numpy as np
from qalora_runtimes.behaviour import Request
from qalora_runtimes.llama_cpp.behave import behave
from qalora_runtimes.llama_cpp.client import Client
from qalora_runtimes.protocol import Ids, Job, LongSequence, TextRequest
from qalora_runtimes.runner import check_vocabulary
from qalora_runtimes.scoring import Rows, RunnerError


class ServerRuntime:
    """runner.Runtime over HTTP. prefill: each prefix as a fresh prompt; decode: one new token on the slot's cache."""

    def __init__(self, client: Client, job: Job, *, version: str | None, settings: dict[str, Any]) -> None:
        """version: of the wheel that runs the server; None asks a remote one for its build."""
        self._client, self._settings = client, settings
        self._version = version or client.build()
        self._model = client.model()
        self._vocabulary = client.vocabulary()
        check_vocabulary(job, self._vocabulary)

    def prefill(self, ids: Ids) -> Rows:
        return self._rows(ids, fresh=True)

    def decode(self, ids: Ids) -> Rows:
        return self._rows(ids, fresh=False)

    def _rows(self, ids: Ids, *, fresh: bool) -> Rows:
        prefixes = (ids[: at + 1] for at in range(len(ids)))
        return np.concatenate([self._client.next_token_logprobs(p, self._vocabulary, fresh=fresh) for p in prefixes])

    def text_answers(self, request: TextRequest) -> dict[str, Any]:
        return self._client.text_answers(request)

    def behave(self, request: Request) -> dict[str, Any]:
        return behave(self._client, request, None)

    def long(self, _sequence: LongSequence) -> Rows:
        raise RunnerError("llama-server answers one position per request, too slowly for a long sequence")

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": "llama.cpp",
            "package": "llama-server",
            "version": self._version,
            "logits_through": "server, one position per request",
            "settings": self._settings,
            "model": {name: self._model.get(name) for name in ("n_params", "size")},
        }
