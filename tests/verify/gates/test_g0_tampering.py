"""G0 on well-formed artifacts in which one thing was changed and the manifest made to agree: named, both values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qalora_export.errors import UnsafeInputError
from qalora_export.formats.gguf.validate import ARRAY, Field
from tests.verify.exports import Exported, copy_of, onnx_tensor, patch, read_at
from tests.verify.tampering import (
    F32,
    STR,
    U32,
    Fields,
    change_fields,
    change_graph,
    change_json,
    changed,
    fresh_once,
    g0,
    reseal,
    scalar,
)

Damage = Callable[[Exported], None]
BRACE = 60  # an ordinary token


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_once(monkeypatch)


def fields(change: Callable[[Fields], object]) -> Damage:
    return lambda e: change_fields(e.gguf, change)  # type: ignore[arg-type]


def graph(change: Callable[[onnx.ModelProto], object]) -> Damage:
    return lambda e: change_graph(e.onnx, change)  # type: ignore[arg-type]


def table(name: str, change: Callable[[dict], object]) -> Damage:
    return lambda e: change_json(e.onnx / name, change)


def sets(key: str, kind: int, value: object) -> Damage:
    return fields(lambda f: f.update({key: scalar(kind, value)}))


GGUF = {
    "a linear scaling without a factor": (
        sets("llama.rope.scaling.type", STR, "linear"),
        "llama.rope.scaling.type: expected absent, found string 'linear'",
    ),
    "a factor without a type, linear to llama.cpp": (
        sets("llama.rope.scaling.factor", F32, 2.0),
        "RoPE frequencies",
    ),
    "a factor that is no number": (
        sets("llama.rope.scaling.factor", STR, "2"),
        "llama.rope.scaling.factor: expected absent, found string '2'",
    ),
    "a rotary width of gigabytes": (
        sets("llama.rope.dimension_count", U32, 2**32 - 2),
        "llama.rope.dimension_count",
    ),
    "an end token that is '{'": (
        sets("tokenizer.ggml.eot_token_id", U32, BRACE),
        "tokenizer.ggml.eot_token_id: expected absent, found uint32 60",
    ),
    "a token typed UNUSED": (
        fields(
            lambda f: f.update(
                {"tokenizer.ggml.token_type": changed(f["tokenizer.ggml.token_type"], BRACE, np.int32(5))}
            )
        ),
        "tokenizer.ggml.token_type: item 60: expected 1, found 5",
    ),
    "a sampling default": (sets("general.sampling.temp", F32, 5.0), "general.sampling.temp: expected 0.0, found 5.0"),
    "a key of another year": (sets("llama.attention.sinks", U32, 4), "llama.attention.sinks: expected absent"),
    "another pre-tokenizer": (sets("tokenizer.ggml.pre", STR, "qwen2"), "tokenizer.ggml.pre: expected "),
    "a key that is gone": (
        fields(lambda f: f.pop("tokenizer.ggml.unknown_token_id", None) or f.pop("tokenizer.ggml.padding_token_id")),
        "_token_id: expected uint32",
    ),
    "a number of another type": (
        fields(lambda f: f.update({"llama.block_count": scalar(10, 2)})),
        "llama.block_count: expected uint32, found uint64 2",
    ),
    "a second chat template": (
        sets("tokenizer.chat_template.tool_use", STR, "{{ messages }}"),
        "tokenizer.chat_template.tool_use: expected absent",
    ),
    "a name that changes llama.cpp's tokenizer": (
        sets("general.name", STR, "my Phi-3"),
        "general.name: expected 'my Phi_3', found 'my Phi-3'",
    ),
    "another checkpoint's hash": (sets("qalora.checkpoint.sha256", STR, "0" * 64), "qalora.checkpoint.sha256: "),
}


def second_embedding(model: onnx.ModelProto) -> None:
    """A Gather that reads another table than the one that is compared by its name."""
    node = next(n for n in model.graph.node if n.op_type == "Gather" and "model.embed_tokens.weight" in n.input)
    table = next(t for t in model.graph.initializer if t.name == "model.embed_tokens.weight")
    model.graph.initializer.add().CopyFrom(table)
    model.graph.initializer[-1].name = "embed_tokens_2"
    node.input[list(node.input).index("model.embed_tokens.weight")] = "embed_tokens_2"


def attention(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")


def rotate_by_the_sine(model: onnx.ModelProto) -> None:
    node = attention(model)
    node.input[7] = node.input[8]


def field_of_the_future(model: onnx.ModelProto) -> None:
    model.MergeFromString(b"\xfa\x7f\x03odd")  # field 2047, of which onnx.proto knows nothing


def numbers_twice(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "model.norm.weight")
    tensor.raw_data = b"\0" * 4 * tensor.dims[0]


def low_bit_of_a_cosine(e: Exported) -> None:
    """Row 200 of the table, one unit in the last place."""
    at = onnx_tensor(e.onnx, "model.rotary_emb.cos_cache") + 200 * 16 * 4
    data = e.onnx / "onnx/model.onnx_data"
    patch(data, at, bytes([read_at(data, at, 1)[0] ^ 0x01]))


def bit_of_the_padding(e: Exported) -> None:
    data = e.onnx / "onnx/model.onnx_data"
    at = onnx_tensor(e.onnx, "model.norm.weight") - 1
    patch(data, at, bytes([read_at(data, at, 1)[0] ^ 0x01]))


ONNX = {
    "sampling": (
        table("genai_config.json", lambda c: c["search"].update(do_sample=True, temperature=3.0, max_length=8)),
        "genai_config.json: search.do_sample: expected False, found True",
    ),
    "a second embedding table": (graph(second_embedding), "graph.initializer embed_tokens_2: in no fresh export"),
    "a window": (
        graph(lambda m: attention(m).attribute.append(onnx.helper.make_attribute("local_window_size", 130))),
        ".attribute local_window_size: in no fresh export",
    ),
    "cosines that are sines": (graph(rotate_by_the_sine), ".input: item 7: expected 'model.rotary_emb.cos_cache'"),
    "a decoder that is gone": (
        table("tokenizer.json", lambda c: c.update(decoder=None)),
        "tokenizer.json: decoder: expected {",
    ),
    "an end of text less": (
        table("generation_config.json", lambda c: c.update(eos_token_id=[364, BRACE])),
        "generation_config.json: eos_token_id: ",
    ),
    "a tokenizer setting": (
        table("tokenizer_config.json", lambda c: c.update(add_prefix_space=True)),
        "tokenizer_config.json: add_prefix_space: ",
    ),
    "a file too many": (
        lambda e: (e.onnx / "added_tokens.json").write_text("{}"),
        "added_tokens.json: a file of no fresh export",
    ),
    "a file in a folder": (
        lambda e: (e.onnx / "onnx" / "model_quantized.onnx").write_bytes(b""),
        "onnx/model_quantized.onnx: a file of no fresh export",
    ),
    "a link to elsewhere": (
        lambda e: (e.onnx / "models").symlink_to(e.onnx.parent),
        "models: a file of no fresh export",
    ),
    "numbers in the graph beside those outside": (
        graph(numbers_twice),
        "initializer model.norm.weight: numbers both in the graph and outside",
    ),
    "a file less": (lambda e: (e.onnx / "generation_config.json").unlink(), "generation_config.json: missing"),
    "a number typed as a list": (
        graph(lambda m: [setattr(a, "type", 7) for a in attention(m).attribute if a.name == "kv_num_heads"]),
        "kv_num_heads.type: expected 2, found 7",
    ),
    "a number of no type": (
        graph(lambda m: [setattr(a, "type", 0) for a in attention(m).attribute if a.name == "kv_num_heads"]),
        "kv_num_heads.type: expected 2, found 0",
    ),
    "another opset": (
        graph(lambda m: setattr(m.opset_import[0], "version", m.opset_import[0].version - 1)),
        ".version: expected ",
    ),
    "metadata": (
        graph(lambda m: m.metadata_props.add(key="pad", value="x")),
        "metadata_props pad: in no fresh export",
    ),
    "a field of the future": (graph(field_of_the_future), "a field that onnx.proto does not define"),
    "outputs in another order": (graph(lambda m: m.graph.output.reverse()), "graph.output: item 0: "),
    "one unit in the last place of a cosine": (low_bit_of_a_cosine, "onnx/model.onnx_data: other bytes"),
    "a byte between two tensors": (bit_of_the_padding, "onnx/model.onnx_data: other bytes than a fresh export"),
}


@pytest.mark.parametrize(("damage", "place"), GGUF.values(), ids=GGUF)
def test_a_changed_gguf_file_is_red_and_named(damage: Damage, place: str, exported: Exported, tmp_path: Path) -> None:
    assert_red("llama.cpp", damage, place, copy_of(exported, tmp_path))


@pytest.mark.parametrize("key", ["llama.attention.head_count", "llama.attention.head_count_kv"])
@pytest.mark.parametrize(("kind", "value"), [(STR, "x"), (F32, float("nan")), (U32, 0), (U32, 2**32 - 1)])
def test_a_head_count_that_is_none_is_unsafe(
    key: str, kind: int, value: object, exported: Exported, tmp_path: Path
) -> None:
    copy = copy_of(exported, tmp_path)
    sets(key, kind, value)(copy)
    reseal(copy)
    with pytest.raises(UnsafeInputError, match=key):
        g0("llama.cpp", copy)


@pytest.mark.parametrize(("damage", "place"), ONNX.values(), ids=ONNX)
def test_a_changed_onnx_folder_is_red_and_named(damage: Damage, place: str, exported: Exported, tmp_path: Path) -> None:
    assert_red("onnxruntime", damage, place, copy_of(exported, tmp_path))


def assert_red(runtime: str, damage: Damage, place: str, copy: Exported) -> None:
    damage(copy)
    reseal(copy)
    entry = g0(runtime, copy)
    assert entry.status == "fail"
    assert any(place in found for found in entry.where), entry.where


@pytest.mark.parametrize(
    ("damage", "status", "said"),
    [
        (
            bit_of_the_padding,
            "pass",
            "onnx/model.onnx_data not byte for byte what a fresh export gives (onnx-ir 0.1 made",
        ),
        (ONNX["metadata"][0], "not run", "onnx-ir 0.1 made it, here is "),
        (ONNX["sampling"][0], "fail", "genai_config.json not byte for byte"),
        (low_bit_of_a_cosine, "pass", "model.rotary_emb.cos_cache, within what float32 sines of two machines differ"),
    ],
)
def test_what_other_versions_made_is_no_pass_where_they_may_make_it_otherwise(
    damage: Damage, status: str, said: str, exported: Exported, tmp_path: Path
) -> None:
    copy = copy_of(exported, tmp_path)
    damage(copy)
    change_json(copy.onnx / "manifest.json", lambda content: content["made_with"].update({"onnx-ir": "0.1"}))
    reseal(copy)
    entry = g0("onnxruntime", copy)
    assert (entry.status, said in entry.detail) == (status, True), entry


def test_a_list_too_long_or_too_deep_to_show_is_named(exported: Exported, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    long = np.zeros(10**6, np.uint8)
    change_fields(copy.gguf, lambda f: f.update({"llama.long": Field(ARRAY, 0, long)}))
    deep = "[" * 90 + "]" * 90  # a hundred levels are read at all
    path = copy.onnx / "generation_config.json"
    path.write_text(path.read_text().replace("{", f'{{"deep": {deep},', 1))
    reseal(copy)
    assert any(
        "llama.long: expected absent, found array of uint8 [0, 0" in place for place in g0("llama.cpp", copy).where
    )
    assert any("generation_config.json: deep: " in place for place in g0("onnxruntime", copy).where)


def test_what_steers_nothing_is_said_and_not_red(exported: Exported, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    (copy.onnx / "README.md").write_text("# A model")
    change_fields(copy.gguf, lambda f: f.update({"general.name": scalar(STR, "My model")}))
    reseal(copy)
    assert [g0(runtime, copy).status for runtime in ("onnxruntime", "llama.cpp")] == ["pass", "pass"]
    assert "steering nothing: README.md, a note for people" in g0("onnxruntime", copy).detail
