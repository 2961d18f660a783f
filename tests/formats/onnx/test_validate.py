"""Hostile ONNX folders are refused with UnsafeInputError before anything is loaded."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from qalora_export.errors import InputError, QaloraError, UnsafeInputError
from qalora_export.formats.onnx.read import MODULES_KEY, read_back
from qalora_export.formats.onnx.validate import read_model
from qalora_export.grid import GroupAffine
from tests.formats.onnx.helpers import LINEAR, linear_folder, proto


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("linear")
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.01, 0.1, (8, 2)).astype(np.float16)
    codes = rng.integers(0, 8, (8, 64), dtype=np.uint8)
    linear_folder(path, GroupAffine(codes, scale, (-scale * np.float16(3)).astype(np.float16), 3))
    return path / "onnx"


@pytest.fixture
def victim(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "victim"))


def tensor(model: onnx.ModelProto, part: str = "codes") -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == f"{LINEAR}.{part}")


def external(key: str, value: str, part: str = "codes") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in tensor(model, part).external_data if entry.key == key).value = value

    return change


def dims(*shape: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor(model).dims[:] = shape

    return change


def duplicate(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(tensor(model))


def second_location(model: onnx.ModelProto) -> None:
    tensor(model).external_data.add(key="location", value="other.data")


def short_inline(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.TensorProto(name="t", data_type=1, dims=[1000], raw_data=b"1234"))


def empty_inline(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.TensorProto(name="t", data_type=1, dims=[1 << 39]))


def hidden_in_an_attribute(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(np.zeros(4, np.float32)))
    node.attribute[0].t.dims[:] = [4, 1 << 30]
    model.graph.node.append(node)


def hidden_in_a_function(model: onnx.ModelProto) -> None:
    node = helper.make_node(
        "Constant",
        [],
        ["t"],
        value=onnx.TensorProto(
            data_type=1,
            dims=[1],
            data_location=onnx.TensorProto.EXTERNAL,
            external_data=[
                onnx.StringStringEntryProto(key="location", value="/etc/passwd"),
                onnx.StringStringEntryProto(key="length", value="4"),
            ],
        ),
    )
    model.functions.append(helper.make_function("local", "f", [], ["t"], [node], [helper.make_opsetid("", 24)]))


def sparse(model: onnx.ModelProto) -> None:
    values, indices = numpy_helper.from_array(np.ones(1, np.float32)), numpy_helper.from_array(np.zeros(1, np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 40]))


def unknown_type(model: onnx.ModelProto) -> None:
    tensor(model).data_type = 777


def strings(model: onnx.ModelProto) -> None:
    tensor(model).data_type = onnx.TensorProto.STRING


ATTACKS = {
    "parent folder": external("location", "../secret"),
    "absolute path": external("location", "/etc/passwd"),
    "backslash": external("location", "..\\secret"),
    "drive letter": external("location", "C:secret"),
    "offset beyond the file": external("offset", "1000000"),
    "offset near 2^64": external("offset", str(2**64 - 1)),
    "negative offset": external("offset", "-4096"),
    "offset is no number": external("offset", "0x10"),
    "length too short": external("length", "1"),
    "length beyond the file": external("length", str(2**40)),
    "shape larger than the data": dims(8, 2, 1 << 20),
    "absurd shape": dims(1 << 40, 1 << 40),
    "negative dim": dims(-1, 2, 16),
    "two initializers of one name": duplicate,
    "two locations": second_location,
    "inline bytes too few": short_inline,
    "inline tensor without data": empty_inline,
    "attribute tensor": hidden_in_an_attribute,
    "function tensor": hidden_in_a_function,
    "sparse initializer": sparse,
    "unknown data type": unknown_type,
    "strings": strings,
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_lying_tensors_are_unsafe(victim: Path, attack: Callable[[onnx.ModelProto], None]) -> None:
    model = proto(victim)
    attack(model)
    (victim / "onnx/model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsafeInputError):
        read_model(victim)


def test_intact_folder_passes(folder: Path) -> None:
    assert len(read_model(folder).graph.initializer) >= 4


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_linked_data_file_is_unsafe(victim: Path, folder: Path, link: Callable[[Path, Path], None]) -> None:
    (victim / "onnx/model.onnx_data").rename(victim.parent / "elsewhere")
    link(victim.parent / "elsewhere", victim / "onnx/model.onnx_data")
    with pytest.raises(UnsafeInputError, match="link"):
        read_model(victim)


def test_truncated_data_file_is_unsafe(victim: Path) -> None:
    data = (victim / "onnx/model.onnx_data").read_bytes()
    (victim / "onnx/model.onnx_data").write_bytes(data[:-1])
    with pytest.raises(UnsafeInputError, match="ends at byte"):
        read_model(victim)


def test_two_graphs_in_one_folder_are_unsafe(victim: Path) -> None:
    """Hosts would run different ones."""
    shutil.copyfile(victim / "onnx/model.onnx", victim / "model.onnx")
    with pytest.raises(UnsafeInputError, match="two graphs"):
        read_model(victim)


def test_a_link_in_the_place_of_the_graph_s_folder_is_unsafe(victim: Path) -> None:
    (victim / "onnx").rename(victim.parent / "elsewhere")
    (victim / "onnx").symlink_to(victim.parent / "elsewhere", target_is_directory=True)
    with pytest.raises(UnsafeInputError, match="symbolic link"):
        read_model(victim)


def test_missing_files_and_garbage_are_bad_input(victim: Path, tmp_path: Path) -> None:
    (victim / "onnx/model.onnx_data").unlink()
    with pytest.raises(InputError, match="not found"):
        read_model(victim)
    (victim / "onnx/model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="not an ONNX model"):
        read_model(victim)
    (victim / "onnx/model.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="no graph"):
        read_model(victim)
    with pytest.raises(InputError, match=r"no onnx/model\.onnx here"):
        read_model(tmp_path / "nowhere")


def genai(folder: Path, *path: str, **values: object) -> None:
    """Set keys at a path of the GenAI configuration that our exporter would write."""
    config = copy.deepcopy(CONFIG)
    table: Any = config
    for part in path:
        table = table.setdefault(part, {})
    table |= values
    (folder / "genai_config.json").write_text(json.dumps(config))


CONFIG: dict[str, Any] = {
    "model": {
        "type": "llama",
        "eos_token_id": [1, 2],
        "decoder": {
            "filename": "onnx/model.onnx",
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key"},
        },
    },
    "search": {"do_sample": False, "max_length": 256, "top_p": 1.0},
}
DECODER = ("model", "decoder")
SESSION = (*DECODER, "session_options")
GENAI_ATTACKS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "another model in a parent folder": (DECODER, {"filename": "../other/onnx/model.onnx"}),
    "an absolute path": (DECODER, {"filename": "/bin/sh"}),
    "a model that nobody checked": (DECODER, {"filename": "second.onnx"}),
    "native code": (SESSION, {"custom_ops_library": "evil.so"}),
    "a profile is written": (SESSION, {"enable_profiling": "/tmp/profile"}),
    "an entry that is handed to the runtime": (SESSION, {"session.optimized_model_filepath": "/tmp/x"}),
    "a context file": (SESSION, {"ep.context_file_path": "/tmp/x"}),
    "a provider library": (SESSION, {"provider_options": [{"qnn": {"backend_path": "evil.so"}}]}),
    "a provider by name": (SESSION, {"providers": ["cuda"]}),
    "run options": (DECODER, {"run_options": {"x": "y"}}),
    "a pipeline": (DECODER, {"pipeline": [{"a": {"session_options": {"custom_ops_library": "evil.so"}}}]}),
    "data of another file": (DECODER, {"shared_initializers": [{"data_file": "/etc/passwd"}]}),
    "a vision model": (("model",), {"vision": {"filename": "vision.onnx"}}),
    "a speech configuration": (("model",), {"speech": {"config_filename": "/etc/passwd"}}),
    "a draft model": (("model",), {"mtp": {"filename": "mtp.onnx"}}),
    "an engine": ((), {"engine": {"dynamic_batching": {}}}),
    "a key that nobody knows": (("search",), {"profile_path": "/tmp/x"}),
    "a table where a number belongs": (("search",), {"max_length": {"custom_ops_library": "evil.so"}}),
    "a number beyond 32 bits": (("search",), {"max_length": 2**40}),
    "infinity": (("search",), {"temperature": float("inf")}),
}


@pytest.mark.parametrize(("path", "values"), GENAI_ATTACKS.values(), ids=GENAI_ATTACKS.keys())
def test_a_genai_config_holds_only_keys_known_to_be_harmless(
    victim: Path, path: tuple[str, ...], values: dict[str, object]
) -> None:
    genai(victim, *path, **values)
    with pytest.raises(UnsafeInputError, match="|".join(values)):
        read_model(victim)


@pytest.mark.parametrize("config", [[], "x", {"model": []}, {"model": {"decoder": {"inputs": ["a"]}}}])
def test_a_genai_config_of_another_shape_is_unsafe(victim: Path, config: object) -> None:
    (victim / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsafeInputError, match="is no table"):
        read_model(victim)


def test_harmless_keys_of_the_runtimes_schema_pass(victim: Path) -> None:
    genai(victim, *SESSION, intra_op_num_threads=2, enable_mem_pattern=True, graph_optimization_level="ORT_ENABLE_ALL")
    assert read_model(victim)
    genai(victim, *DECODER, sliding_window={"window_size": 512, "layers": [0, 2]})
    assert read_model(victim)
    genai(victim)
    assert read_model(victim)


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


def test_a_function_spelled_out_in_standard_operators_passes(victim: Path) -> None:
    model = proto(victim)
    model.functions.append(local_function("local", "f", helper.make_node("Identity", ["x"], ["y"])))
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("f", ["x"], ["t"], domain="local"))
    (victim / "onnx/model.onnx").write_bytes(model.SerializeToString())
    assert read_model(victim)


@pytest.mark.parametrize("modules", ['{"a": [4, 32]}', '{"x": [5, 32]}', '{"x": 1}', "[]", '{"x": [4, 0]}'])
def test_metadata_that_contradicts_the_graph_is_unsafe(victim: Path, modules: str) -> None:
    model = proto(victim)
    next(entry for entry in model.metadata_props if entry.key == MODULES_KEY).value = modules
    (victim / "onnx/model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsafeInputError):
        read_back(victim)


@pytest.mark.parametrize("claim", [[4, 32], [2, 32], [3, 64]])
def test_wrong_bits_or_group_size_are_found(victim: Path, claim: list[int]) -> None:
    """A 3-bit tensor in a 4-bit container claims something else; 4 bits would fit, so its codes decide nothing."""
    model = proto(victim)
    next(entry for entry in model.metadata_props if entry.key == MODULES_KEY).value = json.dumps({LINEAR: claim})
    (victim / "onnx/model.onnx").write_bytes(model.SerializeToString())
    contents = read_back(victim)
    if claim == [4, 32]:
        assert contents.group_affine(LINEAR).bits == 4  # a different matrix than the checkpoint's, which G0 compares
        return
    with pytest.raises(UnsafeInputError, match="MatMulNBits says"):
        contents.group_affine(LINEAR)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flipped_bytes_never_escape_our_errors(folder: Path, tmp_path_factory: pytest.TempPathFactory, data) -> None:
    raw = bytearray((folder / "onnx/model.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    target = tmp_path_factory.mktemp("fuzz")
    (target / "onnx").mkdir()
    shutil.copyfile(folder / "onnx/model.onnx_data", target / "onnx/model.onnx_data")
    (target / "onnx/model.onnx").write_bytes(raw)
    try:
        contents = read_back(target)
        for _, matrix in contents.matrices():
            assert matrix.shape[0] > 0
    except QaloraError:
        pass
    shutil.rmtree(target)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_module.json", {"tiktoken_file": "../../secret.json"}, "tiktoken_file is '../../secret.json'"),
        ("tokenizer_module.json", {"tokenizer_class": ["x"]}, "not what we write there"),
        ("tokenizer_module.json", {"added_tokens": []}, "added_tokens is not what we write there"),
        ("tokenizer_module.json", [], "the whole file"),
        ("tokenizer_config.json", {"tiktoken_file": "vocab.tiktoken"}, "tiktoken_file is not what we write there"),
    ],
)
def test_genai_is_sent_to_no_other_tokenizer_file(victim: Path, name: str, content: object, said: str) -> None:
    (victim / name).write_text(json.dumps(content))
    with pytest.raises(UnsafeInputError, match=re.escape(said)):
        read_model(victim)


def test_the_tokenizer_that_genai_is_given_is_no_link(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (victim / "tokenizer_module.json").write_text(json.dumps({"tiktoken_file": "genai_tokenizer.json"}))
    (victim / "genai_tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UnsafeInputError):
        read_model(victim)
