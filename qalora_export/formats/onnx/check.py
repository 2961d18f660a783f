"""Whether a checkpoint, there or foreseen, can become an ONNX folder that runs, and how large that will be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora_export.checkpoint.forecast import Forecast
from qalora_export.errors import InputError
from qalora_export.formats.contents import check_tied_head, ties_head
from qalora_export.formats.onnx.embeddings import ELEMENT_BITS, TIED_BITS
from qalora_export.formats.onnx.graph import build_graph
from qalora_export.formats.onnx.split_form import CONTAINER_BITS
from qalora_export.grid import NamedGrid, SuperBlockGrid
from qalora_export.models.families import family_of, rope_of
from qalora_export.models.families.family import head_dim

FP16, FP32, ZERO = 2, 4, 1  # bytes of a scale or an offset, and at most of a zero point
# onnxruntime/contrib_ops/cpu/bert/group_query_attention_helper.h: CheckRotaryCaches says "head_size shall be a multiple
# of 16". tests/formats/onnx/test_check.py holds every rule here against the installed version, and that MatMulNBits
# takes every width and group size of the canonical form.
HEAD_MULTIPLE = 16


def check_runnable(config: Mapping[str, Any], *, where: object) -> None:
    """Raise InputError for a model that has no ONNX export, or one that ONNX Runtime would not run."""
    family, size = family_of(config), head_dim(config)
    if family.onnx_refused:
        raise InputError(
            f"{family.name} has no ONNX export",
            where=f"{where}: config.json",
            why=family.onnx_refused,
            fix="export gguf holds this family",
        )
    heads = config["num_attention_heads"]
    rotated = rope_of(config, family.rope_types).rotated(size)
    shared = config.get("num_key_value_heads") or heads
    findings = {
        f"attention heads of {size} features": f"head sizes that are multiples of {HEAD_MULTIPLE}"
        if size % HEAD_MULTIPLE
        else "",
        f"{rotated} rotated features of a head": f"numbers of rotated features that are multiples of {HEAD_MULTIPLE}"
        if rotated % HEAD_MULTIPLE
        else "",
        f"{heads} heads on {shared} of keys and values": "whole numbers of heads for each head of keys and values"
        if heads % shared
        else "",
    }
    for found, takes in findings.items():
        if takes:
            raise InputError(
                f"ONNX Runtime cannot run {found}",
                where=f"{where}: config.json",
                why=f"its GroupQueryAttention takes {takes}",
                fix="export gguf holds this model",
            )


def check_onnx(forecast: Forecast) -> int:
    """Bytes of the tensors `export_onnx` will write; in the file each begins on a page.

    Raises InputError as the export would: for the architecture, and when the graph cannot be built.
    """
    check_runnable(forecast.config, where=forecast.path)
    check_tied_head(forecast.folder)
    build_graph(forecast.config, untied_head="lm_head" in forecast.modules)
    exported = family_of(forecast.config).exported(forecast.config, "onnx")
    rotated = rope_of(exported).rotated(head_dim(exported))
    rotary = FP32 * int(exported["max_position_embeddings"]) * rotated  # cos and sin of every position
    matrices = {name: (*forecast.modules[name], forecast.grid(name)) for name in forecast.modules}
    size = forecast.plain_bytes + rotary
    for name, (bits, group, grid) in matrices.items():
        size += _matrix_bytes(forecast.shapes[name], CONTAINER_BITS[bits], group, grid)
    tied = ties_head(forecast.config) and "lm_head" not in forecast.modules
    for name, (bits, group, grid) in forecast.embeddings.items():
        if tied and ELEMENT_BITS[bits] != TIED_BITS:  # stays float32
            continue
        entry = forecast.plain[f"{name}.weight"]
        size += _matrix_bytes(entry.shape, ELEMENT_BITS[bits], group, grid) - entry.nbytes
    return size


def _matrix_bytes(shape: tuple[int, ...], container: int, group: int, grid: NamedGrid) -> int:
    """Codes, scales, remainders and zero points; float16 numbers, or the float32 products of a grid of super-blocks."""
    number = FP32 if isinstance(grid, SuperBlockGrid) else FP16
    numbers = number if isinstance(grid, SuperBlockGrid) and grid.symmetric else 2 * number
    return shape[0] * (shape[1] * container // 8 + (numbers + ZERO) * shape[1] // group)
