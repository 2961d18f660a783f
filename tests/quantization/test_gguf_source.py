"""A GGUF file as a source: its own codes, scales and offsets come across, and everything else it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import read_manifest
from qalora_export.checkpoint.model_folder import as_float32
from qalora_export.checkpoint.provenance import checkpoint_links
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.names import NameMap
from qalora_export.grid import difference, differing
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import GgufSettings, QuantizeRule, QuantizeSettings
from qalora_export.safety import sha256_file
from qalora_export.verify.reference.ancestry import Ancestry, ancestry
from qalora_export.verify.reference.merge_check import MergeCheck
from tests.conftest import MadeOnce
from tests.models import make_tiny_canonical, make_tiny_model
from tests.quantization.gguf_files import rewritten, values_in_file
from tests.verify.exports import Exported

RTN = QuantizeSettings(method="rtn")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def file(exported: Exported) -> Path:
    """Our own export of the tiny checkpoint."""
    return exported.gguf


@pytest.fixture(scope="module")
def wide(made_once: MadeOnce) -> Path:
    """The export of a one-layer model whose widths are multiples of a K-quant's 256."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}

    def make(folder: Path) -> None:
        canonical = make_tiny_canonical(folder / "base.qalora", make_tiny_model(folder / "model", **sizes))
        export_gguf(canonical, folder / "m.gguf", GgufSettings())

    return made_once("wide", make) / "m.gguf"


def check_values(checkpoint: CanonicalCheckpoint, file: Path) -> None:
    """Every tensor of the file, read by the gguf package, is bit for bit what the checkpoint dequantizes to."""
    names = NameMap("llama", checkpoint.config["num_hidden_layers"])
    expected = values_in_file(file)
    for module in checkpoint.modules:
        stored = expected.pop(names.to_gguf(f"{module}.weight"))
        assert np.array_equal(stored, checkpoint.group_affine(module).dequantize())
    for name in checkpoint.plain_names():
        assert differing(expected.pop(names.to_gguf(name)), as_float32(checkpoint.tensor(name))) == 0
    assert set(expected) <= {"rope_freqs.weight"}


@pytest.mark.parametrize(
    ("bits", "group", "sym", "model"),
    [
        (4, 32, False, {}),
        (3, 64, False, {"tie_word_embeddings": True}),
        (2, 128, False, {"attention_bias": True, "mlp_bias": True}),
        (8, 32, True, {"rope_parameters": LLAMA3, "max_position_embeddings": 4096}),
    ],
)
def test_canonical_to_gguf_and_back_is_identical(
    tmp_path: Path, bits: int, group: int, sym: bool, model: dict[str, Any]
) -> None:
    source = make_tiny_model(tmp_path / "model", num_hidden_layers=1, **model)
    before = CanonicalCheckpoint(make_tiny_canonical(tmp_path / "a.qalora", source, bits=bits, group=group, sym=sym))
    export_gguf(before.path, tmp_path / "m.gguf", GgufSettings())
    report = quantize(tmp_path / "m.gguf", tmp_path / "b.qalora")
    after = CanonicalCheckpoint(tmp_path / "b.qalora")
    assert (report.method, report.changed) == ("import-gguf", 0)
    assert after.modules == before.modules
    assert all(difference(after.group_affine(m), before.group_affine(m)).total == 0 for m in before.modules)
    assert set(after.plain_names()) == set(before.plain_names())
    for name in before.plain_names():  # vectors are F32 in GGUF
        assert differing(as_float32(after.tensor(name)), as_float32(before.tensor(name))) == 0
    assert after.config["model_type"] == "llama"
    for key in ("hidden_size", "rms_norm_eps", "tie_word_embeddings", "eos_token_id", "num_key_value_heads"):
        assert after.config[key] == before.config[key]
    export_gguf(after.path, tmp_path / "again.gguf", GgufSettings())
    a, b = values_in_file(tmp_path / "m.gguf"), values_in_file(tmp_path / "again.gguf")
    assert all(differing(a[name], b[name]) == 0 for name in a.keys() | b.keys())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_files_of_other_tools_come_across_with_no_value_changed(file: Path, tmp_path: Path, kind: str) -> None:
    foreign = rewritten(file, tmp_path / "m.gguf", lambda name: "Q8_0" if name == "token_embd.weight" else kind)
    report = quantize(foreign, tmp_path / "b.qalora")
    after = CanonicalCheckpoint(tmp_path / "b.qalora")
    assert report.changed == 0
    assert set(after.modules.values()) == {(4 if kind.startswith("Q4") else 8, 32)}
    assert after.entry("model.embed_tokens.weight").dtype == np.float32
    assert "lm_head" in after.modules  # it is quantized in the file
    check_values(after, foreign)


def test_the_manifest_names_the_file_and_its_sha256(file: Path, tmp_path: Path) -> None:
    local = tmp_path / "m.gguf"
    local.write_bytes(file.read_bytes())
    quantize(local, tmp_path / "b.qalora")
    manifest = read_manifest(tmp_path / "b.qalora")
    assert manifest["parents"] == [{"role": "source", "name": "m.gguf", "sha256": sha256_file(local)}]
    assert manifest["settings"] == {"method": "import-gguf"}
    assert [link.state for link in checkpoint_links(tmp_path / "b.qalora")] == ["verified"]
    assert ancestry(tmp_path / "b.qalora", MergeCheck()) == Ancestry(compared=("b.qalora of m.gguf",))
    local.write_bytes(file.read_bytes() + b"\0")
    assert [link.state for link in checkpoint_links(tmp_path / "b.qalora")] == ["broken"]
    assert not list(tmp_path.glob(".*"))  # no scratch is left


def test_logits_and_tokens_are_those_of_the_model_it_was_made_from(
    file: Path, tiny_canonical: Path, tmp_path: Path
) -> None:
    import torch

    quantize(file, tmp_path / "b.qalora")
    text = "Turn on the kitchen lights at 7:30, please! naïve café — 東京"
    left, right = (load_tokenizer(folder)(text)["input_ids"] for folder in (tiny_canonical, tmp_path / "b.qalora"))
    assert left == right
    with torch.no_grad():
        a, b = (load_model(folder)(torch.tensor([left])).logits for folder in (tiny_canonical, tmp_path / "b.qalora"))
    assert torch.equal(a, b)


def test_a_float_file_is_quantized_like_the_folder_it_was_made_from(
    tiny_model: Path, file: Path, tmp_path: Path
) -> None:
    plain = rewritten(file, tmp_path / "m.gguf", lambda _: "F16")
    with pytest.raises(InputError, match="GPTQ needs calibration text"):
        quantize(plain, tmp_path / "b.qalora", QuantizeSettings())
    report = quantize(plain, tmp_path / "b.qalora", RTN)
    assert report.method == "rtn"
    after, values = CanonicalCheckpoint(tmp_path / "b.qalora"), values_in_file(plain)
    assert set(after.modules.values()) == {(4, 32)}
    assert after.entry("model.embed_tokens.weight").dtype == np.float16
    weight = values["blk.0.attn_q.weight"].reshape(-1, 32)
    error = np.abs(after.group_affine("model.layers.0.self_attn.q_proj").dequantize().reshape(-1, 32) - weight)
    assert (error.max(1) <= np.ptp(weight, axis=1) / 15 * 0.51).all()


def test_what_has_no_canonical_form_is_quantized_beside_what_has(file: Path, tmp_path: Path) -> None:
    mixed = rewritten(file, tmp_path / "m.gguf", lambda name: "BF16" if "attn_v" in name else "Q4_1")
    settings = QuantizeSettings(method="rtn", bits=8, rules=(QuantizeRule(match="*.1.self_attn.v_proj", skip=True),))
    report = quantize(mixed, tmp_path / "b.qalora", settings)
    after = CanonicalCheckpoint(tmp_path / "b.qalora")
    assert report.method == "import-gguf + rtn"
    assert after.modules["model.layers.0.self_attn.v_proj"] == (8, 32)
    assert "model.layers.1.self_attn.v_proj.weight" in after.plain_names()
    assert after.modules["model.layers.1.self_attn.q_proj"] == (4, 32)
    assert report.changed == sum(m.changed for m in report.modules if m.name.endswith("v_proj"))


def q4_k_but_attention(name: str) -> str:
    return "Q4_K" if "ffn" in name or name == "token_embd.weight" else "Q4_1"


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q2_K"])
def test_k_quants_with_a_grid_are_taken_as_they_are_and_go_back_byte_for_byte(
    wide: Path, tmp_path: Path, kind: str
) -> None:
    foreign = rewritten(wide, tmp_path / "m.gguf", lambda name: q4_k_but_attention(name).replace("Q4_K", kind))
    report = quantize(foreign, tmp_path / "b.qalora", RTN)
    assert (report.method, report.changed) == ("import-gguf", 0)
    after = CanonicalCheckpoint(tmp_path / "b.qalora")
    check_values(after, foreign)
    assert {name.rpartition(".")[2] for name, grid in after.grids.items() if grid.name == kind.lower()} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    export_gguf(tmp_path / "b.qalora", tmp_path / "again.gguf", GgufSettings())
    before, again = ({t.name: t.data for t in GGUFReader(path).tensors} for path in (foreign, tmp_path / "again.gguf"))
    assert {name: grid.name for name, (_, _, grid) in after.embeddings.items()} == {"model.embed_tokens": kind.lower()}
    assert all(np.array_equal(before[name], again[name]) for name in before if "norm" not in name)


@pytest.mark.parametrize("at", [0, 2])
def test_a_step_below_zero_is_refused(wide: Path, tmp_path: Path, at: int) -> None:
    foreign = rewritten(wide, tmp_path / "m.gguf", q4_k_but_attention)
    tensor = next(t for t in GGUFReader(foreign).tensors if "ffn_up" in t.name)
    content = bytearray(foreign.read_bytes())
    content[tensor.data_offset + at + 1] ^= 0x80  # the sign of a float16
    foreign.write_bytes(content)
    with pytest.raises(InputError, match=r"a super-block has a step below 0.*up_proj"):
        quantize(foreign, tmp_path / "b.qalora", RTN)


@pytest.mark.parametrize("kind", ["Q3_K"])
def test_other_k_quants_are_dequantized_only_on_request(wide: Path, tmp_path: Path, kind: str) -> None:
    def kind_of(name: str) -> str:
        return kind if "ffn" in name or name == "token_embd.weight" else "Q4_1"

    foreign = rewritten(wide, tmp_path / "m.gguf", kind_of)
    with pytest.raises(InputError, match=rf"4 tensors are in types that have no canonical form \(4 × {kind}\).*--deq"):
        quantize(foreign, tmp_path / "b.qalora", RTN)
    assert not (tmp_path / "b.qalora").exists()
    report = quantize(foreign, tmp_path / "b.qalora", QuantizeSettings(method="rtn", bits=8, dequantize=True))
    after, values = CanonicalCheckpoint(tmp_path / "b.qalora"), values_in_file(foreign)
    assert report.method == "import-gguf + rtn"
    assert any(f"4 × {kind} dequantized to float32" in note for note in report.notes)
    assert differing(np.asarray(after.tensor("model.embed_tokens.weight")), values["token_embd.weight"]) == 0
    down = next(m for m in report.modules if m.name.endswith("down_proj"))
    assert 0 < down.relative_error < 0.01  # against the dequantized values, at 8 bits
    assert down.changed > 0


def test_large_tensors_go_through_a_scratch_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = rewritten(file, tmp_path / "m.gguf", lambda _: "Q8_0")
    quantize(foreign, tmp_path / "held.qalora")
    monkeypatch.setattr("qalora_export.quantization.gguf_source.SCRATCH_BYTES", 1000)
    quantize(foreign, tmp_path / "mapped.qalora")
    held, mapped = (sha256_file(tmp_path / f"{name}.qalora" / "model.safetensors") for name in ("held", "mapped"))
    assert held == mapped
    assert not list(tmp_path.glob(".*"))


def q4_1(_: str) -> str:
    return "Q4_1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"llama.expert_count": 8}}, r"llama\.expert_count = 8 has no place in a Llama model"),
        ({"metadata": {"llama.attention.sliding_window": 64}}, r"sliding_window = 64 has no place"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"rope\.scaling\.type = yarn has no place"),
        ({"metadata": {"llama.vocab_size": 511}}, r"vocab_size = 511 has no place.*its config would say \d+"),
        ({"metadata": {"llama.attention.layer_norm_rms_epsilon": 0.0}}, r"rms_epsilon is '0\.0'"),
        ({"drop": "blk.0.ffn_up.weight"}, r"no tensor .*up_proj"),
    ],
)
def test_what_a_config_cannot_say_is_refused_by_name(
    file: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    broken = rewritten(file, tmp_path / "m.gguf", q4_1, **change)
    with pytest.raises(InputError, match=message) as caught:
        quantize(broken, tmp_path / "b.qalora")
    assert str(tmp_path / "m.gguf") in caught.value.where
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("change", [{"llama.expert_count": 0}, {"llama.rope.scaling.type": "none"}])
def test_neutral_metadata_is_no_obstacle(file: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    quantize(rewritten(file, tmp_path / "m.gguf", q4_1, metadata=change), tmp_path / "b.qalora")


def test_rules_and_lying_files_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rules cannot be applied.*quantized already"):
        quantize(file, tmp_path / "b.qalora", QuantizeSettings(rules=(QuantizeRule(match="*", bits=8),)))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UnsafeInputError, match="truncated"):
        quantize(cut, tmp_path / "b.qalora")


def test_sampling_defaults_come_along(file: Path, tmp_path: Path) -> None:
    extra = {"general.sampling.temp": 0.7, "general.sampling.top_k": 20, "tokenizer.ggml.eot_token_id": 5}
    quantize(rewritten(file, tmp_path / "m.gguf", q4_1, metadata=extra), tmp_path / "b.qalora")
    generation = json.loads((tmp_path / "b.qalora" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_k"], generation["do_sample"]) == (0.7, 20, True)
    assert 5 in generation["eos_token_id"]
    assert CanonicalCheckpoint(tmp_path / "b.qalora").config["eos_token_id"] == generation["eos_token_id"]
