"""A GGUF file seen as a model folder: canonical matrices where its blocks are canonical numbers, floats elsewhere.

    Q4_1, Q4_0, Q4_K, … on a linear layer   codes, scale, offset as they are, 0 values changed
    F32, F16, BF16                          the tensor as it is
    Q8_0 and K-quants on an embedding       its blocks as they are
    the other block types there             float32, which holds d·q (11 + 8 bits) and d·q + m as llama.cpp computes it
    other K-quants, IQ, …                   float32 by the gguf package's dequantizer, only when the user asks

Rows of q and k change back to Transformers' order. Nothing is held in memory: tensors are read when asked for, and a
large one that must be dequantized is written to a scratch file and mapped.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.safetensors_file import TensorEntry
from qalora_export.errors import InputError, QaloraError
from qalora_export.formats.gguf.model_config import config_from_gguf, gguf_family, sampling_from_gguf
from qalora_export.formats.gguf.read import GgufContents
from qalora_export.formats.gguf.tokenizer.from_gguf import tokenizer_files_from_gguf
from qalora_export.formats.gguf.types import BLOCK_TYPES, PLAIN_TYPES, Q8_0, QK
from qalora_export.formats.streaming import row_blocks
from qalora_export.grid import GroupAffine, Levels, NamedGrid, PackedAffine, SuperBlockGrid, implied_offset
from qalora_export.quantization.rules import Plan, plan_of

SCRATCH_BYTES = 256 << 20  # a dequantized tensor above this is mapped from a file, not held
F32 = np.dtype(np.float32)
GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class GgufModel(ModelFolder):
    """`file` is the GGUF; `path` a folder of ours with config.json and tokenizer files, as Transformers wants them."""

    def __init__(self, file: Path, folder: Path, *, dequantize: bool) -> None:
        self.file, self.path = file, folder
        self._gguf, self._plans = GgufContents(file), dict[str, Plan | None]()
        exact = set(self._gguf.modules) | {name.removesuffix(".weight") for name in self._gguf.others}
        self.foreign = {  # tensors in a type with no canonical form: name -> type
            name: kind
            for name, kind in self._gguf.types.items()
            if kind not in PLAIN_TYPES and name.removesuffix(".weight") not in exact
        }
        if self.foreign and not dequantize:
            raise _not_canonical(file, self.foreign)
        self.config = config_from_gguf(self._gguf, _model_type(gguf_family(self._gguf).architectures[0]))
        for name, content in self._files().items():
            (folder / name).write_bytes(content)

    def names(self) -> list[str]:
        return list(self._gguf.types)

    def __contains__(self, name: str) -> bool:
        return name in self._gguf.types

    def entry(self, name: str) -> TensorEntry:
        if name not in self:
            raise InputError(f"the file has no tensor {name!r}", where=self.file, fix="is the download complete?")
        shape, plain = self._gguf.shape(name), PLAIN_TYPES.get(self._gguf.types.get(name, ""))
        return TensorEntry(plain.dtype if plain else F32, shape, 0)

    def tensor(self, name: str) -> NDArray[Any]:
        """A plain tensor as stored; any other dequantized to float32."""
        if self._gguf.types.get(name) in PLAIN_TYPES:
            return self._gguf.tensor(name)
        shape = self._gguf.shape(name)
        if self.entry(name).nbytes <= SCRATCH_BYTES:
            return self._gguf.dequantized(name)
        scratch = np.memmap(self.path / f"{name}.scratch", F32, "w+", shape=shape)
        for rows in row_blocks(shape[0], scratch.nbytes):
            scratch[rows] = self._gguf.dequantized(name, rows)
        return scratch

    def tensors(self) -> Iterator[tuple[str, NDArray[Any]]]:
        for name in self.names():
            yield name, self.tensor(name)

    def stored_modules(self) -> dict[str, tuple[int, int]]:
        """module -> (bits, group_size) of what the file holds in canonical form."""
        return dict(self._gguf.modules)

    def stored(self, module: str) -> GroupAffine:
        """The file's own codes, scale and offset, rows in Transformers order.

        Raises InputError for steps below 0, which llama.cpp never makes and training could not move.
        """
        matrix = self._gguf.group_affine(module)
        levels = matrix.levels
        if isinstance(levels, Levels) and min(float(levels.scale_step.min()), float(levels.offset_step.min())) < 0:
            raise InputError(
                "a super-block has a step below 0",
                where=f"{self.file}: {module}",
                why="no quantizer of llama.cpp writes one",
                fix="make the file again with llama-quantize",
            )
        return matrix

    def embedding_plan(self, module: str) -> Plan | None:
        """How the file holds an embedding in blocks that are canonical; None where it is stored otherwise."""
        if module not in self._plans:  # to know it of Q8_0 every block is read
            self._plans[module] = self._plan(module)
        return self._plans[module]

    def _plan(self, module: str) -> Plan | None:
        kind = BLOCK_TYPES.get(self._gguf.types.get(f"{module}.weight", ""))
        if kind is not None and isinstance(kind.grid, SuperBlockGrid):
            return plan_of(kind.grid)
        return Plan(8, QK, sym=True) if kind is Q8_0 and _keeps_zeros(self._gguf.native(module)) else None

    def embedding(self, module: str) -> GroupAffine:
        """The matrix of an embedding that has such a plan."""
        return self._gguf.native(module).unpack()

    def grid_of(self, module: str) -> NamedGrid:
        """The grid of a stored module."""
        return BLOCK_TYPES[self.stored_type(module)].grid

    def stored_type(self, module: str) -> str:
        """The GGUF type that a stored module has in the file."""
        return self._gguf.types[f"{module}.weight"]

    def notes(self) -> tuple[str, ...]:
        """What became of tensors that are neither plain nor canonical linear layers."""
        found = ["what the file holds in canonical form was taken as it is; bits and group size were not used for it"]
        if self.foreign:
            found.append(f"{_counted(self.foreign)} dequantized to float32, as asked, by the gguf package")
        return tuple(found)

    def _files(self) -> dict[str, bytes]:
        """Everything but the weights, for Transformers to load; the tokenizer's token ids also go into the config."""
        files: dict[str, bytes] = tokenizer_files_from_gguf(self._gguf.metadata)
        tokens = json.loads(files.get(GENERATION, b"{}"))
        self.config |= {key: value for key, value in tokens.items() if key in TOKEN_IDS}
        generation = tokens | sampling_from_gguf(self._gguf.metadata)
        return files | {"config.json": _json(self.config), GENERATION: _json(generation)}


@contextlib.contextmanager
def gguf_model(file: Path, scratch: Path, *, dequantize: bool) -> Iterator[GgufModel]:
    """Open a GGUF file; scratch: an empty folder. Errors name the file, not the scratch."""
    try:
        yield GgufModel(file, scratch, dequantize=dequantize)
    except QaloraError as error:
        where = error.where.replace(str(scratch), str(file))
        raise type(error)(error.what, where=where, why=error.why, fix=error.fix) from error


def _keeps_zeros(matrix: PackedAffine) -> bool:
    """Whether s·q − 128·s is d·(q − 128) in every bit: −0 comes of a scale below 0, or of 0 and another code."""
    if not bool(((matrix.scale >= 0) & np.isfinite(implied_offset(matrix.scale, Q8_0.zero))).all()):
        return False
    codes = matrix.unpack().codes.reshape(*matrix.scale.shape, -1)
    return bool((codes[matrix.scale == 0] == Q8_0.zero).all())


def _not_canonical(file: Path, foreign: dict[str, str]) -> InputError:
    return InputError(
        f"{len(foreign)} tensors are in types that have no canonical form ({_counted(foreign)})",
        where=f"{file}: {next(iter(foreign))}",
        why="codes, scale and offset of a group cannot be taken from them without a change",
        fix="pass --dequantize to take their values as float32 and quantize them anew, or start from a Q4_K, Q4_1, "
        "Q4_0, Q8_0 or F16 file",
    )


def _counted(types: dict[str, str]) -> str:
    return ", ".join(f"{count} × {kind}" for kind, count in sorted(Counter(types.values()).items()))


def _model_type(architecture: str) -> str:
    """Transformers' model_type of a causal language model's class: "LlamaForCausalLM" -> "llama"."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = f"{architecture.removesuffix('ForCausalLM')}Config"
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name == architecture and CONFIG_MAPPING_NAMES.get(model_type) == config:
            return str(model_type)
    raise InputError(f"this version of Transformers has no {architecture}", fix="update transformers")


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
