"""Which of its two ways of storing zero points a GPTQ checkpoint uses: said by the config, checked against the values.

    gptq     (v1)  stored = z − 1        gptq_v2  stored = z

Some checkpoints in the wild say v1 and hold v2. A symmetric layer tells: z is 2^(b−1) everywhere, so all its stored
zeros are 2^(b−1) − 1 (v1) or 2^(b−1) (v2). Taking one for the other shifts every weight by one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError
from qalora_export.grid import BITS, unpack_codes

VERSIONS = ("gptq", "gptq_v2")
OPTION = "--checkpoint-format"


def choose_version(
    folder: ModelFolder, gptq: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], chosen: str | None
) -> tuple[str, list[str]]:
    """The format version, and remarks for the report. shapes: (out, in) of each quantized layer.

    Raises InputError, naming the option that settles it, when the config does not say or the values say otherwise.
    """
    declared = _declared(folder, gptq)
    votes = [_vote(folder, name, shape) for name, shape in shapes.items()]
    seen = {vote for vote in votes if vote is not None}
    looks = f"the stored zeros look like {' and '.join(sorted(seen))}" if seen else "the stored zeros do not tell"
    if chosen is not None:
        return chosen, [f"format {chosen} as told, although {looks}"] if seen - {chosen} else []
    if declared is None:
        raise InputError(
            "the checkpoint does not say how it stores zero points", where=folder.path, why=looks, fix=_advice(seen)
        )
    if seen - {declared}:
        raise InputError(
            f"the config says {declared} but {looks}",
            where=folder.path,
            why="taking one for the other shifts every weight by one step",
            fix=_advice(seen),
        )
    if gptq.get("sym") and None in votes and not gptq.get("dynamic"):
        raise InputError(
            "the config says symmetric but a layer's zero points differ",
            where=folder.path,
            why=next(name for name, vote in zip(shapes, votes, strict=True) if vote is None),
            fix=f"if you know the format pass {OPTION} {' or '.join(VERSIONS)}",
        )
    return declared, []


def _declared(folder: ModelFolder, gptq: Mapping[str, Any]) -> str | None:
    declared = gptq.get("checkpoint_format") or gptq.get("format")
    if declared is not None and declared not in VERSIONS:
        raise InputError(
            f"cannot read the GPTQ variant {declared!r}",
            where=folder.path,
            why=f"it is packed for one kernel; supported: {', '.join(VERSIONS)}",
            fix="save it again in format gptq_v2 with GPTQModel",
        )
    if gptq.get("pack_dtype", "int32") != "int32":
        raise InputError(f"cannot read codes packed in {gptq['pack_dtype']}", where=folder.path, why="supported: int32")
    return declared


def _vote(folder: ModelFolder, name: str, shape: tuple[int, int]) -> str | None:
    """What a symmetric layer's stored zeros say, or None when they are not all alike."""
    qzeros = np.asarray(folder.tensor(f"{name}.qzeros"))
    bits = qzeros.shape[-1] * 32 // shape[0]
    if bits not in BITS or qzeros.ndim != 2 or qzeros.dtype.itemsize != 4:
        return None
    stored = unpack_codes(np.ascontiguousarray(qzeros).view(np.uint8), bits)
    middle = 2 ** (bits - 1)
    first = int(stored.flat[0])
    return {middle - 1: "gptq", middle: "gptq_v2"}.get(first) if (stored == first).all() else None


def _advice(seen: set[str]) -> str:
    likely = sorted(seen)[0] if len(seen) == 1 else " or ".join(VERSIONS)
    return f"pass {OPTION} {likely}" + ("" if len(seen) == 1 else ", whichever its maker used")
