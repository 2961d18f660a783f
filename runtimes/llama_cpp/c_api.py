"""llama.cpp's public C API out of the xllamacpp wheel: logits of every position of a batch, as floats.

The server interface of the same wheel prints the whole vocabulary as JSON for one position at a time, about half a
second each at 3,072 tokens; this way is hundreds of times faster and is what llama-perplexity does.
"""

from __future__ import annotations

import ctypes
from collections import deque
from ctypes import c_bool, c_char_p, c_float, c_int, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes import heartbeat
from qalora_runtimes.llama_cpp.layouts import CONTEXT_LAYOUTS, MODEL_LAYOUTS, Batch, recognise
from qalora_runtimes.protocol import Ids
from qalora_runtimes.scoring import Rows, RunnerError

MAX_PIECE = 1 << 24  # bytes of one token's text
LOG_DEBUG = 1  # enum ggml_log_level
LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_log_set": (None, (LogCallback, c_void_p)),
    "llama_backend_init": (None, ()),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_token_to_piece": (c_int32, (c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_n_batch": (c_uint32, (c_void_p,)),
    "llama_n_ubatch": (c_uint32, (c_void_p,)),
    "llama_n_threads": (c_int32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_memory_seq_pos_max": (c_int32, (c_void_p, c_int32)),
    "llama_batch_init": (Batch, (c_int32, c_int32, c_int32)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(c_float), (c_void_p, c_int32)),
    "llama_adapter_lora_init": (c_void_p, (c_void_p, c_char_p)),
    "llama_set_adapters_lora": (
        c_int32,
        (c_void_p, ctypes.POINTER(c_void_p), ctypes.c_size_t, ctypes.POINTER(c_float)),
    ),
}
PARAMETERISED = (
    "llama_model_default_params",
    "llama_context_default_params",
    "llama_model_load_from_file",
    "llama_init_from_model",
)


class UnknownLayoutError(RuntimeError):
    """This build of llama.cpp has no C API that this module knows."""


class Library:
    """The C API of one shared library, its parameter structs recognised. Raises UnknownLayoutError."""

    def __init__(self, path: Path) -> None:
        try:
            library: Any = ctypes.CDLL(str(path))
            for name, (result, arguments) in PROTOTYPES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            parameterised = {name: getattr(library, name) for name in PARAMETERISED}
        except (OSError, AttributeError) as error:
            raise UnknownLayoutError(f"{path.name} does not offer llama.cpp's C API: {error}") from error
        model = recognise(parameterised["llama_model_default_params"], MODEL_LAYOUTS)
        context = recognise(parameterised["llama_context_default_params"], CONTEXT_LAYOUTS)
        if model is None or context is None:
            raise UnknownLayoutError(f"the parameter structs of {path.name} are of a release not known here")
        parameterised["llama_model_load_from_file"].restype = c_void_p
        parameterised["llama_model_load_from_file"].argtypes = (c_char_p, model)
        parameterised["llama_init_from_model"].restype = c_void_p
        parameterised["llama_init_from_model"].argtypes = (c_void_p, context)
        self.c = library
        self.log: deque[str] = deque(maxlen=4000)
        self._callback = LogCallback(self._on_log)  # the library keeps only the address
        library.llama_log_set(self._callback, None)
        library.llama_backend_init()

    def _on_log(self, level: int, text: bytes, _user: object) -> None:
        if level != LOG_DEBUG:
            self.log.append(text.decode("utf-8", "replace"))

    def ends(self, vocabulary: Any) -> list[int]:
        """Ids of a vocabulary (llama_model_get_vocab) at which llama.cpp ends a generation."""
        count = int(self.c.llama_vocab_n_tokens(vocabulary))
        return [token for token in range(count) if self.c.llama_vocab_is_eog(vocabulary, token)]

    def last_words(self, lines: int = 4) -> str:
        return " / ".join("".join(self.log).strip().splitlines()[-lines:])


class Context:
    """One model and its KV cache, optionally with LoRA adapters at scale 1."""

    def __init__(
        self, library: Library, path: Path, lora: Path | None, *, model: dict[str, int], context: dict[str, int]
    ) -> None:
        """`model` and `context` override default parameters. Raises RunnerError with llama.cpp's own words."""
        self._library, c = library, library.c
        parameters = _with(c.llama_model_default_params(), model)
        self._model = c.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RunnerError(f"llama.cpp cannot load {path}: {library.last_words()}")
        self._context = c.llama_init_from_model(self._model, _with(c.llama_context_default_params(), context))
        if not self._context:
            raise RunnerError(f"llama.cpp cannot make a context for {path}: {library.last_words()}")
        self._check_echo(context)
        if lora is not None:
            self._load_lora(lora)
        self._memory = c.llama_get_memory(self._context)
        self._vocab = c.llama_model_get_vocab(self._model)
        self.vocabulary = int(c.llama_vocab_n_tokens(self._vocab))
        self.batch_limit = int(c.llama_n_batch(self._context))
        self.cells = int(c.llama_n_ctx(self._context))  # of the KV cache
        self._batch = c.llama_batch_init(self.batch_limit, 0, 1)

    def _check_echo(self, asked: dict[str, int]) -> None:
        """The context must report what was asked for; anything else means the struct was misread."""
        for field in ("n_batch", "n_ubatch", "n_threads"):
            answer = int(getattr(self._library.c, f"llama_{field}")(self._context))
            if field in asked and answer != asked[field]:
                raise RunnerError(f"llama.cpp reports {field} = {answer}, asked for {asked[field]}")

    def _load_lora(self, lora: Path) -> None:
        c = self._library.c
        adapter = c.llama_adapter_lora_init(self._model, str(lora).encode())
        if not adapter:
            raise RunnerError(f"llama.cpp cannot load the adapter {lora}: {self._library.last_words()}")
        code = c.llama_set_adapters_lora(self._context, (c_void_p * 1)(adapter), 1, (c_float * 1)(1.0))
        if code:
            raise RunnerError(f"llama.cpp refuses the adapter {lora} (code {code}): {self._library.last_words()}")

    def ends(self) -> list[int]:
        """Ids at which llama.cpp says that generation ends."""
        return self._library.ends(self._vocab)

    def piece(self, token: int, *, special: bool) -> bytes:
        """The bytes that llama.cpp shows for a token. special: of a special token too. Raises RunnerError."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = int(self._library.c.llama_token_to_piece(self._vocab, token, buffer, size, 0, special))
            if count >= 0:
                return buffer.raw[:count]
            if -count <= size or -count > MAX_PIECE:
                raise RunnerError(f"llama.cpp gives no text for token {token} ({count})")
            size = -count

    def clear(self) -> None:
        """Forget the KV cache."""
        self._library.c.llama_memory_clear(self._memory, True)

    def run(self, ids: Ids, start: int, at: list[int] | None = None, *, sequence: int = 0) -> Rows:
        """Evaluate `ids` as one batch at positions start…: float32 logits (len(ids), vocab). KV cache grows by it.

        at: indices into `ids` whose logits are wanted, instead of all. sequence: which one they continue.
        """
        places = [(start + i, sequence) for i in range(len(ids))]
        return self._evaluate(ids.tolist(), places, list(range(len(ids))) if at is None else at)

    def step(self, tokens: list[int], positions: list[int], sequences: list[int]) -> Rows:
        """One more token of each of several sequences, each with a KV cache of its own: logits (len(tokens), vocab).

        sequences: numbers below the context's n_seq_max.
        """
        return self._evaluate(tokens, list(zip(positions, sequences, strict=True)), list(range(len(tokens))))

    def _evaluate(self, tokens: list[int], places: list[tuple[int, int]], wanted: list[int]) -> Rows:
        """places: (position, sequence) of every token. wanted: indices into tokens whose logits are answered."""
        c, batch = self._library.c, self._batch
        for i, (token, (position, sequence)) in enumerate(zip(tokens, places, strict=True)):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, 0
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        for i in wanted:
            batch.logits[i] = 1
        batch.n_tokens = len(tokens)
        code = c.llama_decode(self._context, batch)
        if code:
            raise RunnerError(f"llama_decode failed with code {code}: {self._library.last_words()}")
        for sequence, position in {sequence: position for position, sequence in places}.items():
            if c.llama_memory_seq_pos_max(self._memory, sequence) != position:
                raise RunnerError(f"after position {position} llama.cpp's KV cache ends elsewhere")
        rows = np.empty((len(wanted), self.vocabulary), dtype=np.float32)
        for row, i in enumerate(wanted):
            pointer = c.llama_get_logits_ith(self._context, i)
            if not pointer:
                raise RunnerError(f"llama.cpp gave no logits for position {places[i][0]}")
            rows[row] = np.ctypeslib.as_array(pointer, (self.vocabulary,))
        heartbeat.advance(len(tokens))
        return rows


def _with(parameters: Any, overrides: dict[str, int]) -> Any:
    for name, value in overrides.items():
        setattr(parameters, name, value)
    return parameters
