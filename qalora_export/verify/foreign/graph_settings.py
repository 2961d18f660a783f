"""Settings in an ONNX graph that are not the model's: attributes of its norms and attention, its rotary tables; and
the same where an export spells norms and rotation out in plain operators.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.models.families import family_of
from qalora_export.verify.foreign.holding import FLOATS, without_step
from qalora_export.verify.foreign.metadata import Difference
from qalora_export.verify.foreign.onnx_folder import NORMS, Graph
from qalora_export.verify.foreign.onnx_places import walk
from qalora_export.verify.runtimes.facts import windows

COS, SIN = 7, 8  # inputs of GroupQueryAttention
TABLE_TOLERANCE = 1e-4  # of a frequency that is read out of float32 or float16 tables
HALF_TOLERANCE = 2e-3


def graph_differences(
    graph: Graph, config: Mapping[str, Any], frequencies: NDArray[np.floating[Any]]
) -> list[Difference]:
    """config: the source's, complete; frequencies: by which Transformers rotates."""
    found = [*_epsilons(graph, config), *_attention(graph, config)]
    rotary = _rotary(graph, frequencies)
    return found if rotary is None else [*found, rotary]


def _epsilons(graph: Graph, config: Mapping[str, Any]) -> list[Difference]:
    wanted = np.float32(config.get("rms_norm_eps", 1e-6))
    values = {
        float(attribute.f)
        for node in graph.model.graph.node
        if node.op_type in NORMS
        for attribute in node.attribute
        if attribute.name == "epsilon"
    }
    values |= _spelled_out_epsilons(graph)
    wrong = sorted(value for value in values if np.float32(value) != wanted)
    if not wrong:
        return []
    change = {"rms_norm_eps": wrong[0]} if len(values) == 1 else {}
    return [Difference("epsilon of the norms", float(wanted), wrong[0] if len(values) == 1 else sorted(values), change)]


def _spelled_out_epsilons(graph: Graph) -> set[float]:
    """What is added to a mean of squares."""
    found = set[float]()
    for node in (node for node in graph.model.graph.node if node.op_type == "Add"):
        makers = [graph.values.maker(name) for name in node.input]
        if any(maker is not None and maker.op_type == "ReduceMean" for maker in makers):
            numbers = (graph.values.array(name) for name in node.input)
            found |= {float(number.item()) for number in numbers if number is not None and number.size == 1}
    return found


def _attention(graph: Graph, config: Mapping[str, Any]) -> list[Difference]:
    family, nodes = family_of(config), graph.attention
    if not nodes:
        return []
    attributes = [{a.name: (a.i if a.type == a.INT else a.f) for a in node.attribute} for node in nodes]
    differences = []
    sizes = windows(family, config) or [0] * len(nodes)
    found = [max(0, int(values.get("local_window_size", -1))) for values in attributes]
    if found != sizes:
        changes = {got for got, want in zip(found, sizes, strict=False) if got != want}
        usable = len(changes) == 1 and [bool(got) for got in found] == [bool(want) for want in sizes]
        window: dict[str, Any] = {"sliding_window": next(iter(changes))} if usable else {}
        differences.append(Difference("local_window_size of the layers", sizes, found, window))
    scale = family.attention_scale(config)
    scales = {float(values.get("scale") or scale) for values in attributes}
    if any(not np.isclose(value, scale, rtol=1e-3) for value in scales):
        change: dict[str, Any] = (
            {"attention_multiplier": next(iter(scales))} if "attention_multiplier" in config else {}
        )
        differences.append(Difference("scale of the attention", scale, sorted(scales)[0], change))
    return differences


def _rotary(graph: Graph, frequencies: NDArray[np.floating[Any]]) -> Difference | None:
    """Where it turns by other angles than the model."""
    own, kind = _of_tables(graph) if graph.attention else _of_angles(graph, frequencies.size)
    if own is None:
        return None
    tolerance = HALF_TOLERANCE if kind == "F16" else TABLE_TOLERANCE
    if own.shape == frequencies.shape and np.allclose(own, frequencies, rtol=tolerance, atol=1e-6):
        return None
    return Difference(
        f"rotary tables{'' if kind in FLOATS else ' in ' + without_step(kind)} (radians per position)",
        np.round(np.asarray(frequencies, np.float64)[:4], 6).tolist(),
        np.round(own[:4], 6).tolist(),
        frequencies=own if own.shape == frequencies.shape else None,
    )


def _of_tables(graph: Graph) -> tuple[NDArray[np.float64] | None, str]:
    """(radians per position, type they are stored in), by row 1 of the tables, cos and sin of one step."""
    names = {(node.input[COS], node.input[SIN]) for node in graph.attention if len(node.input) > SIN}
    if len(names) != 1:
        return None, ""  # rotated elsewhere, or by a table for each kind of layer: the logits tell
    tables = [graph.values.evaluated(name) for name in next(iter(names))]
    cos, sin = (None if table is None else table.values.astype(np.float64) for table in tables)
    if cos is None or sin is None or len(cos) < 2 or cos.shape != sin.shape:
        return None, ""
    return np.arctan2(sin[1], cos[1]), next(table.kind for table in tables if table is not None)


def _of_angles(graph: Graph, count: int) -> tuple[NDArray[np.float64] | None, str]:
    """The same by the constant of `count` numbers from which Cos is computed, where there is one."""

    def inputs(name: str) -> Iterable[str]:
        maker = graph.values.maker(name)
        return () if maker is None else maker.input

    turned = (name for node in graph.model.graph.node if node.op_type == "Cos" for name in node.input)
    arrays = (graph.values.array(name) for name in walk(turned, inputs))
    found = [
        values.reshape(-1)
        for values in arrays
        if values is not None and values.size == count and values.dtype.kind == "f"
    ]
    if len(found) != 1:
        return None, ""
    return found[0].astype(np.float64), "F16" if found[0].dtype == np.float16 else "F32"
