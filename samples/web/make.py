"""One static folder that answers in a browser: the page, a fine-tuned model and the runtime it needs.

    python -m samples.web.make --model build/demo/onnx --out build/web          # transformers.js
    python -m samples.web.make --model build/demo/model.gguf --out build/web    # llama.cpp as wllama
    python -m samples.web.serve build/web

npm fetches the runtime once (package-lock.json pins it); the folder then needs no network, and its page's content
security policy allows none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from qalora_export.errors import InputError, QaloraError
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.safety import atomic_directory
from samples.web.npm import NodeUnavailableError, install

PAGE = Path(__file__).parent / "page"
QUESTION = "turn on the lamp in the kitchen"
MAX_TOKENS = 128
LONGEST_CONTEXT = 4096  # tokens; a browser's memory is small and a KV cache grows with its context


@dataclass(frozen=True)
class Runtime:
    """model: what the model is called in the folder. scripts: name in the folder -> file below node_modules."""

    kind: str
    model: str
    scripts: dict[str, str]


# Licences travel with what they are for; onnxruntime-web's is in its package.json: MIT, as ONNX Runtime.
TRANSFORMERS = Runtime(
    "onnx",
    "model",
    {
        "transformers.min.js": "@huggingface/transformers/dist/transformers.min.js",
        "transformers.LICENSE": "@huggingface/transformers/LICENSE",
        "ort-wasm-simd-threaded.asyncify.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
    },
)
WLLAMA = Runtime(
    "gguf",
    "model.gguf",
    {
        "wllama.min.js": "@wllama/wllama/esm/index.min.js",
        "wllama.wasm": "@wllama/wllama/esm/wasm/wllama.wasm",
        "wllama.LICENSE": "@wllama/wllama/LICENCE",
    },
)


def make(
    model: Path, out: Path, packages: Path, *, title: str | None = None, question: str = QUESTION, force: bool = False
) -> Runtime:
    """Write the folder. packages: what install() returned. Returns the runtime that the page will use.

    Raises InputError for a model that is neither an exported ONNX folder nor a GGUF file.
    """
    runtime, context = _runtime(model)
    with atomic_directory(out, force=force) as folder:
        shutil.copytree(PAGE, folder, dirs_exist_ok=True)
        vendor = folder / "vendor"
        vendor.mkdir()
        for name, source in runtime.scripts.items():
            shutil.copyfile(packages / "node_modules" / source, vendor / name)
        copy = shutil.copytree if model.is_dir() else shutil.copyfile
        copy(model, folder / runtime.model)
        described = {
            "kind": runtime.kind,
            "title": title or f"{model.resolve().parent.name}: a fine-tuned model in this browser",
            "question": question,
            "max_tokens": MAX_TOKENS,
            "context": context,
        }
        (folder / "model.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return runtime


def _runtime(model: Path) -> tuple[Runtime, int]:
    """The runtime for an artifact, and how many tokens of context to give it."""
    if model.is_dir():
        config = model / "config.json"
        if not (model / "onnx" / "model.onnx").is_file() or not config.is_file():
            raise InputError(
                f"{model} is no exported ONNX folder",
                why="it lacks config.json or onnx/model.onnx",
                fix="make one with: qalora-export export onnx merged.qalora --out onnx",
            )
        return TRANSFORMERS, int(json.loads(config.read_text(encoding="utf-8"))["max_position_embeddings"])
    metadata = GgufFile(model).metadata
    context = int(metadata[f"{metadata['general.architecture']}.context_length"])
    return WLLAMA, min(context, LONGEST_CONTEXT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an exported ONNX folder or GGUF file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--title")
    parser.add_argument("--question", default=QUESTION, help="what stands in the box at first")
    parser.add_argument("--force", action="store_true", help="replace a folder that is there")
    args = parser.parse_args()
    try:
        make(args.model, args.out, install(), title=args.title, question=args.question, force=args.force)
    except NodeUnavailableError as error:
        print(error, file=sys.stderr)
        return 3
    except QaloraError as error:
        print(error, file=sys.stderr)
        return int(error.code)
    print(f"{args.out}: serve it with python -m samples.web.serve {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
