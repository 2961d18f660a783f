"""llama.cpp's own converter, out of the llama-cpp-python sdist, on models whose tokenizer it does not know by its hash.

Run as a script in a process of its own: `python converter.py LLAMA_CPP MODEL OUT PRE [f16|bf16|f32|q8_0]`. PRE is the
pre-tokenizer's name, which the converter would look up by a hash of ids.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
import types
from pathlib import Path


def convert(llama_cpp: Path, model: Path, out: Path, pre: str, precision: str = "f16") -> Path:
    """model as `out`, by convert_hf_to_gguf.py of the unpacked sources `llama_cpp`."""
    command = [sys.executable, "-P", __file__, str(llama_cpp), str(model), str(out), pre, precision]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0 and out.is_file(), ended.stderr[-2000:]
    return out


def _main(llama_cpp: str, model: str, out: str, pre: str, precision: str = "f16") -> None:
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    from transformers import AutoTokenizer  # noqa: F401  (before the name below is taken: it looks for the package)

    # The converter imports sentencepiece before it sees that these models have no tokenizer.model.
    absent = types.ModuleType("sentencepiece")
    absent.SentencePieceProcessor = None  # type: ignore[attr-defined]
    sys.modules["sentencepiece"] = absent
    from conversion import base  # type: ignore[import-not-found]

    base.TextModel.get_vocab_base_pre = lambda _self, _tokenizer: pre
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", precision]
    runpy.run_path(f"{llama_cpp}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    _main(*sys.argv[1:])
