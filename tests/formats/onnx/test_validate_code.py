"""A graph that needs more than the runtimes' own operators is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper

from qalora_export.errors import UnsafeInputError
from qalora_export.formats.onnx.validate import read_model
from tests.formats.onnx.helpers import proto


def local_function(domain: str, name: str, *nodes: onnx.NodeProto) -> onnx.FunctionProto:
    return helper.make_function(domain, name, ["x"], ["y"], nodes, [helper.make_opsetid("", 24)])


def foreign_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Evil", ["x"], ["t"], domain="evil.ops"))


def foreign_node_in_a_branch(model: onnx.ModelProto) -> None:
    branch = helper.make_graph([helper.make_node("Evil", [], ["t"], domain="evil.ops")], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["x"], ["t"], then_branch=branch, else_branch=branch))


def foreign_opset(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("evil.ops", 1))


def compiled_binary(model: onnx.ModelProto) -> None:
    node = helper.make_node(
        "EPContext", ["x"], ["t"], domain="com.microsoft", embed_mode=0, ep_cache_context="evil.bin"
    )
    model.graph.node.append(node)


def training(model: onnx.ModelProto) -> None:
    model.training_info.add()


def configuration_inside(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="ort_config", value='{"session_options": {"enable_profiling": 1}}')


def redefined_standard(model: onnx.ModelProto) -> None:
    model.functions.append(local_function("", "Add", helper.make_node("Identity", ["x"], ["y"])))


def nested_functions(model: onnx.ModelProto) -> None:
    """A few dozen that each call the next twice would unfold to billions of nodes."""
    twice = [helper.make_node("g", ["x"], ["z"], domain="local"), helper.make_node("g", ["z"], ["y"], domain="local")]
    model.functions.append(local_function("local", "f", *twice))
    model.functions.append(local_function("local", "g", helper.make_node("Identity", ["x"], ["y"])))


CODE_ATTACKS = [
    foreign_node,
    foreign_node_in_a_branch,
    foreign_opset,
    compiled_binary,
    training,
    configuration_inside,
    redefined_standard,
    nested_functions,
]


@pytest.mark.parametrize("attack", CODE_ATTACKS, ids=lambda attack: attack.__name__)
def test_a_model_that_needs_more_than_the_runtimes_own_operators_is_unsafe(
    victim: Path, attack: Callable[[onnx.ModelProto], None]
) -> None:
    model = proto(victim)
    attack(model)
    (victim / "onnx/model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsafeInputError):
        read_model(victim)


def test_a_domain_of_the_runtimes_own_may_be_imported_but_not_used(victim: Path) -> None:
    """ONNX Runtime's quantizers import every one of them."""
    model = proto(victim)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 5))
    (victim / "onnx/model.onnx").write_bytes(model.SerializeToString())
    assert read_model(victim)
    model.graph.node.append(helper.make_node("Scaler", ["x"], ["t"], domain="ai.onnx.ml"))
    (victim / "onnx/model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsafeInputError):
        read_model(victim)


def test_a_function_spelled_out_in_standard_operators_passes(victim: Path) -> None:
    model = proto(victim)
    model.functions.append(local_function("local", "f", helper.make_node("Identity", ["x"], ["y"])))
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("f", ["x"], ["t"], domain="local"))
    (victim / "onnx/model.onnx").write_bytes(model.SerializeToString())
    assert read_model(victim)
