"""SmolLM2-135M-Instruct as a plain Transformers folder, with the numbers of its Q4_1 file in float32.

    python -m samples.smollm2.sixteen                # build/smollm2-source/SmolLM2-135M-Instruct, 540 MB

For what starts from unquantized weights: `compare samples/compare/smollm2.toml`, `verify-parity FOLDER --gguf FILE`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from qalora_export.quantization.gguf_source import GgufModel
from qalora_export.safety import atomic_directory
from samples.smollm2.fetch import TARGET, fetch

FOLDER = TARGET.parent / "SmolLM2-135M-Instruct"


def write(file: Path, folder: Path) -> Path:
    """The plain model in `folder` whose numbers are those of a GGUF file; kept where it is there."""
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix="qalora-files-") as scratch, atomic_directory(folder) as out:
        source = GgufModel(file, Path(scratch), dequantize=True)
        save_file(dict(_dequantized(source)), out / "model.safetensors", metadata={"format": "pt"})
        for path in Path(scratch).iterdir():
            (out / path.name).write_bytes(path.read_bytes())
    return folder


def _dequantized(source: GgufModel) -> Iterator[tuple[str, NDArray[np.float32]]]:
    stored = source.stored_modules()
    for name in source.names():
        module = name.removesuffix(".weight")
        values = source.stored(module).dequantize() if module in stored else np.asarray(source.tensor(name))
        yield name, np.ascontiguousarray(values, np.float32)


if __name__ == "__main__":
    print(write(fetch(), FOLDER))
