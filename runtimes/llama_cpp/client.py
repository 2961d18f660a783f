"""HTTP client of llama-server: the wheel's own on loopback, or a stock one on a device."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np
from qalora_runtimes import heartbeat
from qalora_runtimes.protocol import Ids, TextRequest, conversation
from qalora_runtimes.scoring import Rows, RunnerError

TIMEOUT = 600  # seconds for one answer
MAX_ANSWER = 1 << 30  # bytes; a whole vocabulary of 256k tokens is about 25 MB
# llama-server drops the log-probabilities of a sampled token that ends inside a UTF-8 character, so the sampler is
# steered to a letter. Log-probabilities are taken before sampling: the bias is not in them (test_llama_cpp).
HARMLESS_BIAS = 1e6
PROBABILITY_SUM_TOLERANCE = 1e-3  # float32 softmax over up to 256k tokens


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """llama-server sends none, and one would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client:
    """/completion, /tokenize, /detokenize, /apply-template, /v1/models and /props of llama-server."""

    def __init__(self, address: str, owner: object = None, *, key: str | None = None) -> None:
        """owner: kept alive as long as this client, for a server that ends with its Python object.

        key: what the server was started with as --api-key.
        """
        if not address.startswith(("http://", "https://")):
            raise RunnerError(f"--server must be an http:// or https:// address, not {address!r}")
        self.address, self._owner = address.rstrip("/"), owner
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            if not key.isascii() or not key.isprintable():
                raise RunnerError("an API key may hold printable ASCII characters only")
            self._headers["Authorization"] = f"Bearer {key}"
        self._harmless: list[list[float]] = []
        proxies = urllib.request.ProxyHandler({})  # a device or loopback is never behind the user's web proxy
        self._opener = urllib.request.build_opener(proxies, _NoRedirects())

    def model(self) -> dict[str, Any]:
        """What it tells of the loaded model: n_vocab, n_params, size in bytes and more."""
        models = self._call("/v1/models").get("data")
        meta = models[0].get("meta") if models else None
        return dict(meta) if isinstance(meta, dict) else {}

    def vocabulary(self) -> int:
        """Number of tokens of the loaded model."""
        size = self.model().get("n_vocab")
        if not isinstance(size, int):
            raise RunnerError(f"{self.address} does not tell its vocabulary size; use a newer llama-server")
        return size

    def build(self) -> str:
        return str(self._call("/props").get("build_info", "unknown"))

    def next_token_logprobs(self, ids: Ids, vocabulary: int, *, fresh: bool) -> Rows:
        """float32 (1, vocab) after the prompt `ids`, which is taken as it is: nothing is put before it.

        fresh: the whole prompt is evaluated, no cache; else exactly one new token on the KV cache.
        Raises RunnerError if llama-server evaluated another number of tokens or left out part of the vocabulary.
        """
        if not self._harmless:
            self._harmless = [[self._tokenize("a", special=False)[0], HARMLESS_BIAS]]
        answer = self._call(
            "/completion",
            {
                "prompt": ids.tolist(),
                "n_predict": 1,
                "n_probs": vocabulary,
                "temperature": -1.0,
                "stream": False,
                "cache_prompt": not fresh,
                "post_sampling_probs": False,
                "logit_bias": self._harmless,
            },
        )
        evaluated, expected = answer.get("timings", {}).get("prompt_n"), len(ids) if fresh else 1
        if evaluated != expected:
            raise RunnerError(f"llama-server evaluated {evaluated} tokens of a {len(ids)}-token prompt, not {expected}")
        probabilities = answer.get("completion_probabilities")
        if not probabilities:
            raise RunnerError("llama-server returned no log-probabilities")
        return whole_vocabulary(probabilities[0]["top_logprobs"], vocabulary)

    def text_answers(self, request: TextRequest) -> dict[str, Any]:
        """protocol.TEXT_ANSWER_KEYS. llama.cpp cuts BOS from a rendered chat and puts it back while tokenizing."""
        before = self._tokenize("", special=True)
        rendered, rendered_ids, errors = [], [], []
        for index, chat in enumerate(request.chats):
            try:
                text = str(self._field("/apply-template", conversation(chat), "prompt"))
            except RunnerError as error:
                text = None
                errors.append(f"chat {index}: {error}")
            rendered.append(text)
            rendered_ids.append(None if text is None else self._tokenize(text, special=True))
        return {
            "texts": [self._tokenize(text, special=True) for text in request.texts],
            "texts_literal": [self._tokenize(text, special=False) for text in request.texts],
            "rendered": rendered,
            "rendered_ids": rendered_ids,
            "adds_bos": bool(before),
            "bos_id": before[0] if before else None,
            "errors": errors,
        }

    def complete(self, ids: list[int], tokens: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """/completion of the prompt `ids`, at most `tokens` more; options: what is asked beside the defaults."""
        body = {"prompt": ids, "n_predict": tokens, "return_tokens": True, "stream": False, **options}
        return self._call("/completion", body)

    def chat(self, chat: Mapping[str, Any], tokens: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of /v1/chat/completions."""
        body = {**chat, "max_tokens": tokens, "stream": False, **options}
        choice = self._field("/v1/chat/completions", body, "choices")[0]
        return dict(choice)

    def render(self, chat: Mapping[str, Any], *, generation_prompt: bool) -> str:
        return str(self._field("/apply-template", {**chat, "add_generation_prompt": generation_prompt}, "prompt"))

    def defaults(self) -> dict[str, Any]:
        """Sampling parameters of a request that sets none."""
        answer = self._call("/props")
        settings = answer.get("default_generation_settings")
        if not isinstance(settings, dict):
            raise RunnerError(f"{self.address} does not tell its sampling defaults; use a newer llama-server")
        return dict(settings.get("params", settings))

    def shown(self, ids: list[int]) -> str:
        """The text of ids, special tokens shown."""
        return str(self._field("/detokenize", {"tokens": ids}, "content"))

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        question = {"content": text, "add_special": special, "parse_special": special}
        return [int(token) for token in self._field("/tokenize", question, "tokens")]

    def _field(self, path: str, body: Mapping[str, Any], key: str) -> Any:
        answer = self._call(path, body)
        if key not in answer:
            raise RunnerError(f"the answer of {self.address}{path} has no {key}: is it a llama-server?")
        return answer[key]

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, self._headers)  # noqa: S310
        try:
            with self._opener.open(request, timeout=TIMEOUT) as response:
                answer = json.loads(response.read(MAX_ANSWER))
            heartbeat.advance()
        except urllib.error.HTTPError as error:
            raise RunnerError(f"llama-server refused {path}: {_reason(error)}") from error
        except (OSError, ValueError) as error:
            raise RunnerError(f"no usable answer from {self.address}{path}: {error}") from error
        if not isinstance(answer, dict):
            raise RunnerError(f"no usable answer from {self.address}{path}: it is no JSON object")
        return answer


def whole_vocabulary(entries: list[dict[str, Any]], vocabulary: int) -> Rows:
    """[{"id", "logprob"}] → float32 (1, vocab). null, which JSON has for NaN, becomes NaN.

    Raises RunnerError unless every id is there once and the probabilities sum to 1 (so nothing was clipped).
    """
    ids = np.array([entry["id"] for entry in entries], dtype=np.int64)
    if len(ids) != vocabulary or not np.array_equal(np.sort(ids), np.arange(vocabulary)):
        raise RunnerError(f"llama-server returned {len(set(ids.tolist()))} of {vocabulary} log-probabilities")
    row = np.full(vocabulary, np.nan, dtype=np.float64)
    row[ids] = [np.nan if entry["logprob"] is None else entry["logprob"] for entry in entries]
    total = np.exp(row).sum()
    if abs(total - 1) > PROBABILITY_SUM_TOLERANCE:
        raise RunnerError(f"llama-server's probabilities sum to {total:.6f}, not 1")
    return row.astype(np.float32)[None]


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read(4096).decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {text[:200]}"
