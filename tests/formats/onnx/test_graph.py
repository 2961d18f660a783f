"""The graph is built once for a config; each call answers one of its own, with the bytes of a fresh build."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.formats.onnx import graph


def serialized(model: ir.Model) -> bytes:
    return ir.serde.serialize_model(model).SerializeToString(deterministic=True)


def test_every_call_answers_the_graph_of_a_fresh_build_and_its_own(tiny_canonical: Path) -> None:
    config = CanonicalCheckpoint(tiny_canonical).config
    one = graph.build_graph(config)
    graph._built.cache_clear()
    fresh = serialized(graph.build_graph(config)["model"])
    assert serialized(one["model"]) == fresh
    for node in list(one["model"].graph):
        for attribute in list(node.attributes):
            del node.attributes[attribute]
    one["model"].metadata_props["changed"] = "yes"
    one.config.num_hidden_layers = 99
    again = graph.build_graph(config)
    assert serialized(one["model"]) != fresh == serialized(again["model"])
    assert again.config.num_hidden_layers == 2
    assert graph._built.cache_info().misses == 1


def test_another_config_is_another_graph(tiny_canonical: Path) -> None:
    config = CanonicalCheckpoint(tiny_canonical).config
    deeper = graph.build_graph(dict(config) | {"num_hidden_layers": 3})["model"]
    assert len(list(deeper.graph)) > len(list(graph.build_graph(config)["model"].graph))
