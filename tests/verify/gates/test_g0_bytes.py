"""G0 and G1 on the real files, with one fault planted at a known byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.provenance import artifact_links
from qalora_export.verify.gates.g1_weights import ulp_distance, weights_entry
from qalora_export.verify.rule import Entry
from qalora_export.verify.runtimes.record import all_runtimes
from tests.verify.exports import (
    Exported,
    copy_of,
    flatten,
    float32,
    gguf_block,
    gguf_value,
    onnx_tensor,
    patch,
    read_at,
)
from tests.verify.tampering import g0

Q_PROJ, Q_GGUF = "model.layers.1.self_attn.v_proj", "blk.1.attn_v.weight"
RUNTIMES = list(all_runtimes())


def g1(runtime: str, exported: Exported, workdir: Path) -> Entry:
    record, checkpoint = all_runtimes()[runtime], CanonicalCheckpoint(exported.checkpoint)
    artifact = exported.gguf if record.format == "gguf" else exported.onnx
    return weights_entry(runtime, checkpoint, record.dequantized(artifact, workdir), by=record.dequantizer)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_undamaged_artifact_passes(runtime: str, exported: Exported, tmp_path: Path) -> None:
    bytes_found, weights_found = g0(runtime, exported), g1(runtime, exported, tmp_path / "work")
    assert (bytes_found.status, bytes_found.where) == ("pass", ())
    assert (weights_found.status, weights_found.where) == ("pass", ())
    assert bytes_found.figures is not None
    assert bytes_found.figures["compared_values"] > 400_000


def flip_gguf_code(e: Exported) -> None:
    at = gguf_block(e.gguf, Q_GGUF) + 4
    patch(e.gguf, at, bytes([read_at(e.gguf, at, 1)[0] ^ 0x01]))


def flip_onnx_code(e: Exported) -> None:
    data = e.onnx / "onnx/model.onnx_data"
    at = onnx_tensor(e.onnx, f"{Q_PROJ}.codes")
    patch(data, at, bytes([read_at(data, at, 1)[0] ^ 0x10]))


def negate_gguf_offset(e: Exported) -> None:
    at = gguf_block(e.gguf, Q_GGUF) + 3  # high byte of float16 m
    patch(e.gguf, at, bytes([read_at(e.gguf, at, 1)[0] ^ 0x80]))


def negate_onnx_remainder(e: Exported) -> None:
    """R negated: m = R − z·s is another float16, or none."""
    data = e.onnx / "onnx/model.onnx_data"
    at = onnx_tensor(e.onnx, f"{Q_PROJ}.remainder") + 1
    patch(data, at, bytes([read_at(data, at, 1)[0] ^ 0x80]))


def gguf_scale_one_ulp(e: Exported) -> None:
    at = gguf_block(e.gguf, Q_GGUF)
    patch(e.gguf, at, bytes([read_at(e.gguf, at, 1)[0] ^ 0x01]))


def onnx_scale_one_ulp(e: Exported) -> None:
    data = e.onnx / "onnx/model.onnx_data"
    at = onnx_tensor(e.onnx, f"{Q_PROJ}.scale")
    patch(data, at, bytes([read_at(data, at, 1)[0] ^ 0x01]))


UNREADABLE = " (unreadable: a remainder does not come from a float16 offset)"  # m = R − z·s


@pytest.mark.parametrize(
    ("runtime", "damage", "what"),
    [
        ("llama.cpp", flip_gguf_code, ".codes: 1"),
        ("llama.cpp", negate_gguf_offset, ".offset: 1"),
        ("llama.cpp", gguf_scale_one_ulp, ".scale: 1"),
        ("onnxruntime", flip_onnx_code, ".codes: 1"),
        ("onnxruntime", negate_onnx_remainder, UNREADABLE),
        ("onnxruntime", onnx_scale_one_ulp, UNREADABLE),
    ],
)
def test_one_damaged_value_fails_both_gates_by_name(
    runtime: str, damage: Callable[[Exported], None], what: str, exported: Exported, tmp_path: Path
) -> None:
    copy = copy_of(exported, tmp_path)
    damage(copy)
    bytes_entry, weights_entry = g0(runtime, copy), g1(runtime, copy, tmp_path / "work")
    assert bytes_entry.status == "fail"
    assert any(place.startswith(f"{Q_PROJ}{what}") for place in bytes_entry.where)
    assert any("not the one that was exported" in place for place in bytes_entry.where)
    assert weights_entry.status == "fail"
    assert weights_entry.where[0].startswith(f"{Q_PROJ}: ")


def test_a_nan_offset_is_named_and_does_not_stop_the_verifier(exported: Exported, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    patch(copy.gguf, gguf_block(copy.gguf, Q_GGUF) + 2, np.float16(np.nan).tobytes())
    bytes_entry, weights_entry = g0("llama.cpp", copy), g1("llama.cpp", copy, tmp_path / "work")
    assert bytes_entry.status == weights_entry.status == "fail"
    assert any(Q_PROJ in place and "NaN" in place for place in bytes_entry.where)
    assert weights_entry.deciding is not None
    assert weights_entry.deciding.measured == float("inf")


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [
        ("llama.attention.layer_norm_rms_epsilon", float32(1.1e-5), "norm epsilon"),
        ("llama.rope.freq_base", float32(10010.0), "RoPE frequencies"),
        ("llama.attention.head_count_kv", (4).to_bytes(4, "little"), "key/value heads"),
        ("tokenizer.ggml.add_bos_token", b"\x00", "ids around an empty text"),
        ("tokenizer.ggml.bos_token_id", (3).to_bytes(4, "little"), "BOS id"),
    ],
)
def test_wrong_gguf_metadata_is_named(key: str, value: bytes, fact: str, exported: Exported, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    patch(copy.gguf, gguf_value(copy.gguf, key), value)
    entry = g0("llama.cpp", copy)
    assert entry.status == "fail"
    assert any(place.startswith(f"{fact}: ") for place in entry.where)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def wrong_epsilon_in_one_node(e: Exported) -> None:
    import onnx

    model = onnx.load(e.onnx / "onnx/model.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "SkipSimplifiedLayerNormalization")
    next(a for a in node.attribute if a.name == "epsilon").f = 1e-6
    (e.onnx / "onnx/model.onnx").write_bytes(model.SerializeToString())


def wrong_rope_row(e: Exported) -> None:
    """Row 200 of the cosine table: beyond every probe sequence, so logits would never show it."""
    patch(
        e.onnx / "onnx/model.onnx_data", onnx_tensor(e.onnx, "model.rotary_emb.cos_cache") + 200 * 16 * 4, float32(0.5)
    )


@pytest.mark.parametrize(
    ("runtime", "damage", "fact"),
    [
        ("onnxruntime", wrong_epsilon_in_one_node, "norm epsilon: "),
        ("onnxruntime", wrong_rope_row, "RoPE frequencies: "),
        (
            "onnxruntime",
            lambda e: edit(e.onnx / "tokenizer_config.json", "<|assistant|>", "<|user|>"),
            "chat template: ",
        ),
        (
            "onnxruntime",
            lambda e: edit(e.onnx / "config.json", '"rms_norm_eps"', '"eps"'),
            "config.json: rms_norm_eps: ",
        ),
        (
            "onnxruntime",
            lambda e: edit(e.onnx / "config.json", '"fp32"', '"q4"'),
            "config.json: transformers.js_config: ",
        ),
        ("onnxruntime", lambda e: (e.onnx / "config.json").unlink(), "config.json: "),
        (
            "onnxruntime",
            lambda e: edit(e.onnx / "generation_config.json", '"eos_token_id": 364', '"eos_token_id": 3'),
            "generation_config.json: eos_token_id: ",
        ),
        (
            "onnxruntime",
            lambda e: (e.onnx / "chat_template.jinja").write_text("{{ messages }}"),  # GenAI would use it
            "chat template: ",
        ),
        (
            "onnxruntime-genai",
            lambda e: edit(e.onnx / "genai_config.json", '"eos_token_id": 364', '"eos_token_id": 3'),
            "genai ends at: ",
        ),
        (
            "onnxruntime-genai",
            lambda e: edit(e.onnx / "genai_config.json", '"bos_token_id": 363', '"bos_token_id": 3'),
            "genai BOS id: ",
        ),
    ],
)
def test_wrong_facts_of_an_onnx_folder_are_named(
    runtime: str, damage: Callable[[Exported], None], fact: str, exported: Exported, tmp_path: Path
) -> None:
    copy = copy_of(exported, tmp_path)
    damage(copy)
    entry = g0(runtime, copy)
    assert entry.status == "fail"
    assert any(place.startswith(fact) for place in entry.where), entry.where


def test_a_lost_merge_rule_is_named(exported: Exported, tmp_path: Path) -> None:
    import json

    copy = copy_of(exported, tmp_path)
    raw = json.loads((copy.onnx / "tokenizer.json").read_text())
    del raw["model"]["merges"][7]
    (copy.onnx / "tokenizer.json").write_text(json.dumps(raw))
    entry = g0("onnxruntime", copy)
    assert entry.status == "fail"
    assert any(place.startswith("merges: item 7: ") for place in entry.where)


def test_an_artifact_of_another_checkpoint_breaks_the_chain(exported: Exported, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    sidecar = copy.gguf.with_name(f"{copy.gguf.name}.manifest.json")
    recorded = next(link.sha256 for link in artifact_links(copy.gguf, exported.checkpoint) if link.role == "checkpoint")
    edit(sidecar, recorded, "0" * 64)
    entry = g0("llama.cpp", copy)
    assert entry.status == "fail"
    assert any("exported from another checkpoint" in place for place in entry.where)


def test_matrices_that_were_not_dequantized_fail(exported: Exported) -> None:
    checkpoint = CanonicalCheckpoint(exported.checkpoint)
    entry = weights_entry("r", checkpoint, iter([]), by="nothing")
    assert entry.status == "fail"
    assert entry.deciding is not None
    assert entry.deciding.figure == "missing_matrices"


def test_ulp_distance_counts_steps_between_floats() -> None:
    one = np.array([1.0, -0.0, -1.0, 2.0**-149], np.float32)
    assert ulp_distance(one, np.array([1.0, 0.0, -1.0, 2.0**-149], np.float32)) == (0.0, 0)
    assert ulp_distance(one, np.nextafter(one, np.float32(9))) == (1.0, 4)
    assert ulp_distance(np.float32([2.0**-149]), np.float32([-(2.0**-149)])) == (2.0, 1)
    assert ulp_distance(one, np.full(4, np.nan, np.float32)) == (float("inf"), 4)
    assert ulp_distance(one, one[:3]) == (float("inf"), 4)


def test_a_folder_in_the_layout_of_earlier_versions_is_judged_as_ever(exported: Exported, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    flatten(copy.onnx)
    entry = g0("onnxruntime-genai", copy)
    assert (entry.status, entry.where) == ("pass", ())
    (copy.onnx / "chat_template.jinja").write_text("{{ messages }}")
    assert any(place.startswith("chat template: ") for place in g0("onnxruntime", copy).where)
