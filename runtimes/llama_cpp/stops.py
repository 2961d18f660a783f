"""The ids at which llama.cpp ends a generation with a file: what the file says and what llama.cpp adds by itself.

`python -m qalora_runtimes.llama_cpp.stops --model FILE --out stops.json` writes {"ends": [id], "tokens": n}. Only the
vocabulary is loaded. Source: llama_vocab_is_eog of include/llama.h, which every sampler of llama.cpp asks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qalora_runtimes import heartbeat
from qalora_runtimes.llama_cpp.c_api import Library, UnknownLayoutError
from qalora_runtimes.llama_cpp.wheel import import_wheel
from qalora_runtimes.runner import add_caller, run_guarded
from qalora_runtimes.scoring import RunnerError

MODULE = "qalora_runtimes.llama_cpp.stops"


def ends_of(library: Library, path: Path) -> tuple[list[int], int]:
    """(ids that end a generation, number of tokens). Raises RunnerError with llama.cpp's own words."""
    c = library.c
    parameters = c.llama_model_default_params()
    parameters.vocab_only = 1
    model = c.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise RunnerError(f"llama.cpp cannot load the vocabulary of {path}: {library.last_words()}")
    vocabulary = c.llama_model_get_vocab(model)
    return library.ends(vocabulary), int(c.llama_vocab_n_tokens(vocabulary))


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="model.gguf")
    parser.add_argument("--out", type=Path, required=True, help="stops.json to write")
    add_caller(parser)
    arguments = parser.parse_args()

    def work() -> None:
        heartbeat.at("loading the vocabulary")
        module = import_wheel()
        try:
            library = Library(Path(module.xllamacpp.__file__))
        except UnknownLayoutError as error:
            raise RunnerError(str(error)) from error
        ends, count = ends_of(library, arguments.model)
        arguments.out.write_text(json.dumps({"ends": ends, "tokens": count}) + "\n", encoding="utf-8")

    return run_guarded(arguments, work)


if __name__ == "__main__":
    sys.exit(main())
