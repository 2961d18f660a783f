"""llama.cpp's own tokenizer on the vocabulary of a GGUF file, in its own process: it may abort."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int32, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

IdLists = list[list[int]]


class LlamaCppError(Exception):
    """llama.cpp refused the file or died; the message is its own."""


def llama_ids(path: Path, texts: Sequence[str], *, special: bool = True) -> IdLists:
    """Ids of each text. special: BOS/EOS as the file says, and the text of special tokens becomes their ids."""
    return llama_ids_of_all([path], texts, special=special)[0]


def llama_ids_of_all(paths: Sequence[Path], texts: Sequence[str], *, special: bool = True) -> list[IdLists]:
    """The same for several files in one process."""
    job = json.dumps({"models": [str(path) for path in paths], "texts": list(texts), "special": special})
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=job, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise LlamaCppError(f"exit {done.returncode}: {done.stderr[-1500:]}")
    answer: list[IdLists] = json.loads(done.stdout)
    return answer


def _serve(models: list[str], texts: list[str], special: bool) -> list[IdLists]:
    from qalora_runtimes.llama_cpp.c_api import Library
    from qalora_runtimes.llama_cpp.wheel import import_wheel

    library = Library(Path(import_wheel().xllamacpp.__file__))
    library.c.llama_tokenize.restype = c_int32
    library.c.llama_tokenize.argtypes = (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)
    return [[_ids(library, vocab, text, special) for text in texts] for vocab in map(partial(_load, library), models)]


def _load(library: Any, model: str) -> Any:
    parameters = library.c.llama_model_default_params()
    parameters.vocab_only = 1
    loaded = library.c.llama_model_load_from_file(model.encode(), parameters)
    if not loaded:
        sys.exit(f"{model}: {library.last_words(8)}")
    return library.c.llama_model_get_vocab(loaded)


def _ids(library: Any, vocab: Any, text: str, special: bool) -> list[int]:
    raw = text.encode()
    room = len(raw) + 16
    out = (c_int32 * room)()
    count = library.c.llama_tokenize(vocab, raw, len(raw), out, room, special, special)
    if count < 0:
        sys.exit(f"llama_tokenize wants {-count} tokens for {len(raw)} bytes")
    return list(out[:count])


if __name__ == "__main__":
    json.dump(_serve(**json.load(sys.stdin)), sys.stdout)
