"""Import of GPTQ checkpoints: the same values, counted where fp16 offsets cannot hold them, nothing guessed."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import QuantizeRule, QuantizeSettings
from tests.checkpoint.files import same_bytes
from tests.conftest import MadeOnce
from tests.models import make_tiny_model
from tests.quantization.gptq_packer import make_gptq_folder, pack, values

SETTINGS = QuantizeSettings()


@pytest.fixture(scope="module")
def source(made_once: MadeOnce) -> Path:
    return made_once("layer", lambda folder: make_tiny_model(folder / "model", num_hidden_layers=1)) / "model"


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_the_packer_follows_the_published_three_bit_layout() -> None:
    """AutoGPTQ: codes 0–9 in word 0, code 10 split 2 + 1, 11–20 in word 1, code 21 split 1 + 2, 22–31 in word 2."""
    codes = np.random.default_rng(0).integers(0, 8, (32, 1))
    words = [int(word) for word in pack(codes, 3).view(np.uint32)[:, 0]]
    c = [int(code) for code in codes[:, 0]]
    assert words[0] == sum(c[i] << 3 * i for i in range(10)) | (c[10] & 3) << 30
    assert words[1] == c[10] >> 2 | sum(c[11 + i] << (3 * i + 1) for i in range(10)) | (c[21] & 1) << 31
    assert words[2] == c[21] >> 1 | sum(c[22 + i] << (3 * i + 2) for i in range(10))


@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_checkpoints_come_across_exactly(source: Path, tmp_path: Path, bits: int, stored: str) -> None:
    layers = make_gptq_folder(tmp_path / "gptq", source, bits=bits, stored=stored)
    report = quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)
    written = CanonicalCheckpoint(tmp_path / "out")
    assert set(written.modules) == set(layers)
    assert report.changed == 0
    assert report.method == "import-gptq"
    for name, layer in layers.items():
        matrix = written.group_affine(name)
        assert np.array_equal(matrix.codes, layer["codes"].T)
        assert np.array_equal(matrix.scale, layer["scales"].T)
        assert matrix.is_symmetric
        assert np.array_equal(matrix.dequantize().astype(np.float64), values(layer))


@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_checkpoints_change_only_what_is_counted(
    source: Path, tmp_path: Path, bits: int, stored: str
) -> None:
    layers = make_gptq_folder(tmp_path / "gptq", source, bits=bits, stored=stored, sym=False, seed=bits)
    report = quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)
    written = CanonicalCheckpoint(tmp_path / "out")
    for module in report.modules:
        layer = layers[module.name]
        matrix = written.group_affine(module.name)
        assert np.array_equal(matrix.codes, layer["codes"].T)
        assert np.array_equal(matrix.scale, layer["scales"].T)
        error = np.abs(matrix.dequantize().astype(np.float64) - values(layer))
        assert module.changed == np.count_nonzero(error)
        assert module.largest_change == error.max()
        half_ulp = np.spacing(np.abs(matrix.offset).astype(np.float16)).astype(np.float64) / 2
        assert (error <= np.repeat(half_ulp, 32, axis=1) * 1.001).all()
    assert report.changed > 0
    assert any(f"{report.changed} of {report.weights} weights change, by at most" in note for note in report.notes)


@pytest.mark.parametrize(("group", "expected"), [(-1, 128), (64, 64), (128, 128), (16, 16)])
def test_group_sizes_we_do_not_have_are_repeated(source: Path, tmp_path: Path, group: int, expected: int) -> None:
    layers = make_gptq_folder(tmp_path / "gptq", source, group=group)
    assert quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS).changed == 0
    written = CanonicalCheckpoint(tmp_path / "out")
    for name, layer in layers.items():
        assert written.modules[name] == (4, expected)
        assert np.array_equal(written.group_affine(name).dequantize().astype(np.float64), values(layer))


def test_everything_else_stays_bit_for_bit(source: Path, tmp_path: Path) -> None:
    layers = make_gptq_folder(tmp_path / "gptq", source)
    name = "model.layers.0.mlp.up_proj.bias"
    edit(tmp_path / "gptq", lambda tensors: tensors.update({name: np.zeros(256, np.float16)}))
    report = quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)
    folder, written = ModelFolder(source), CanonicalCheckpoint(tmp_path / "out")
    kept = [name for name in folder.names() if name.removesuffix(".weight") not in layers]
    assert sorted(written.plain_names()) == sorted(kept)
    assert report.kept == len(kept)
    assert any("1 biases that are all zero" in note for note in report.notes)
    for plain in kept:
        assert same_bytes(np.asarray(folder.tensor(plain)), np.asarray(written.tensor(plain)))
    assert written.config["quantization_config"]["quant_method"] == "qalora"
    edit(tmp_path / "gptq", lambda tensors: tensors.update({name: np.ones(256, np.float16)}))
    with pytest.raises(InputError, match=r"bias is not zero.*up_proj\.bias"):
        quantize(tmp_path / "gptq", tmp_path / "out2", SETTINGS)


def test_autogptqs_own_config_file_is_read(source: Path, tmp_path: Path) -> None:
    make_gptq_folder(tmp_path / "gptq", source)
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    own = config.pop("quantization_config")
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"packed weights but says nowhere how.*quantize_config\.json"):
        quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)
    own.pop("quant_method")
    (tmp_path / "gptq" / "quantize_config.json").write_text(json.dumps(own))
    assert quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS).changed == 0


@pytest.mark.parametrize("sym", [True, False])
def test_a_config_without_the_format_means_v1(source: Path, tmp_path: Path, sym: bool) -> None:
    layers = make_gptq_folder(tmp_path / "gptq", source, sym=sym, config={"checkpoint_format": None})
    report = quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)
    written = CanonicalCheckpoint(tmp_path / "out")
    for name, layer in layers.items():
        expected = np.float16(-layer["zeros"] * layer["scales"].astype(np.float64) + 0.0)
        assert np.array_equal(written.group_affine(name).offset, expected.T)
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["checkpoint_format"] == "gptq"
    reason = settings["checkpoint_format_reason"]
    assert reason.startswith("gptq (v1), the meaning of a config without checkpoint_format")
    assert ("confirm" if sym else "do not contradict") in reason
    assert f"format: {reason}" in report.notes


@pytest.mark.parametrize(
    ("stored", "sym", "config", "message"),
    [
        (
            "gptq_v2",
            True,
            {"checkpoint_format": None},
            "not say.*means gptq.*look like gptq_v2.*--checkpoint-format gptq_v2$",
        ),
        (
            "gptq_v2",
            False,
            {"checkpoint_format": None},
            r"not say.*read as gptq, codes lie -\d.*--checkpoint-format gptq_v2$",
        ),
        (
            "gptq_v2",
            True,
            {"checkpoint_format": "gptq"},
            "says gptq but .*look like gptq_v2.*--checkpoint-format gptq_v2$",
        ),
        ("gptq_v2", False, {"checkpoint_format": "gptq"}, r"says gptq but .*codes lie -.*--checkpoint-format gptq_v2$"),
        (
            "gptq",
            True,
            {"checkpoint_format": "gptq_v2"},
            "says gptq_v2 but .*look like gptq .*--checkpoint-format gptq$",
        ),
        (
            "gptq",
            False,
            {"checkpoint_format": "gptq_v2"},
            r"says gptq_v2 but .*codes lie \+.*--checkpoint-format gptq$",
        ),
        ("gptq", True, {"checkpoint_format": "marlin"}, "GPTQ variant 'marlin'"),
        ("gptq", True, {"pack_dtype": "int64"}, "packed in int64"),
        ("gptq", True, {"bits": 3}, "has 4 bits, the config says 3"),
    ],
)
def test_values_that_contradict_the_config_are_refused(
    source: Path, tmp_path: Path, stored: str, sym: bool, config: dict, message: str
) -> None:
    layers = make_gptq_folder(tmp_path / "gptq", source, stored=stored, sym=sym, config=config)
    with pytest.raises(InputError, match=message):
        quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()
    if "-format gptq" in message:
        quantize(tmp_path / "gptq", tmp_path / "out", QuantizeSettings(checkpoint_format=stored))
        name, layer = next(iter(layers.items()))
        written = CanonicalCheckpoint(tmp_path / "out").group_affine(name)
        expected = np.float16(-layer["zeros"] * layer["scales"].astype(np.float64) + 0.0)
        assert np.array_equal(written.offset, expected.T)


def test_the_option_against_the_values_is_followed_and_said(source: Path, tmp_path: Path) -> None:
    make_gptq_folder(tmp_path / "gptq", source, stored="gptq_v2")
    report = quantize(tmp_path / "gptq", tmp_path / "out", QuantizeSettings(checkpoint_format="gptq"))
    assert "format gptq as told, although the stored zeros look like gptq_v2" in report.notes


def test_symmetric_by_config_but_not_by_values(source: Path, tmp_path: Path) -> None:
    make_gptq_folder(tmp_path / "gptq", source, sym=False, config={"sym": True})
    with pytest.raises(InputError, match="says symmetric but a layer's zero points differ"):
        quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_that_autogptq_lost_are_refused(source: Path, tmp_path: Path, bits: int) -> None:
    make_gptq_folder(tmp_path / "gptq", source, bits=bits, sym=False, stored="autogptq")
    with pytest.raises(InputError, match=r"up to \d+ zero points .* are lost.*AutoGPTQ.*quantize the source"):
        quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)


def set_order(folder: Path, order: np.ndarray, module: str = "model.layers.0.mlp.down_proj") -> None:
    edit(folder, lambda tensors: tensors.update({f"{module}.g_idx": order.astype(np.int32)}))


def test_activation_order_is_refused_with_the_reason(source: Path, tmp_path: Path) -> None:
    make_gptq_folder(tmp_path / "gptq", source, config={"desc_act": True})
    quantize(tmp_path / "gptq", tmp_path / "in-order", SETTINGS)  # desc_act, but the order is trivial
    set_order(tmp_path / "gptq", np.random.default_rng(0).permutation(np.arange(256) // 32))
    with pytest.raises(InputError, match=r"do not lie together \(desc_act.*down_proj\.g_idx.*desc_act=False"):
        quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)
    edit(tmp_path / "gptq", lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.g_idx"))
    with pytest.raises(InputError, match="desc_act without g_idx"):
        quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)


@pytest.mark.parametrize(
    ("order", "size"),
    [
        (np.arange(256)[::-1] // 32, 32),  # groups in another order
        (np.repeat([3, 3, 0, 7, 7, 7, 7, 1], 32), 32),  # a group used twice, another never
        (np.repeat([0, 1, 2, 3, 4], [64, 64, 64, 32, 32]), 32),
        (np.repeat(np.arange(4), 64), 64),
    ],
)
def test_groups_in_any_order_whose_columns_lie_together_are_exact(
    source: Path, tmp_path: Path, order: np.ndarray, size: int
) -> None:
    module = "model.layers.0.mlp.down_proj"
    layers = make_gptq_folder(tmp_path / "gptq", source)
    set_order(tmp_path / "gptq", order)
    layers[module]["g_idx"] = order
    quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)
    matrix = CanonicalCheckpoint(tmp_path / "out").group_affine(module)
    assert matrix.group_size == size
    assert np.array_equal(matrix.dequantize().astype(np.float64), values(layers[module]))


@pytest.mark.parametrize(
    "order", [np.arange(255) // 32, np.arange(256) // 16, np.arange(256) // 32 - 1, np.zeros((2, 128))]
)
def test_an_order_that_points_nowhere_is_refused(source: Path, tmp_path: Path, order: np.ndarray) -> None:
    make_gptq_folder(tmp_path / "gptq", source)
    set_order(tmp_path / "gptq", order)
    with pytest.raises(InputError, match="g_idx does not give 256 columns one of 8 groups each"):
        quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)


def test_shapes_that_do_not_fit_and_rules_are_refused(source: Path, tmp_path: Path) -> None:
    make_gptq_folder(tmp_path / "gptq", source)
    with pytest.raises(InputError, match="rules cannot be applied"):
        quantize(tmp_path / "gptq", tmp_path / "out", QuantizeSettings(rules=(QuantizeRule(match="*", bits=8),)))

    def cut(tensors: dict[str, np.ndarray]) -> None:
        name = "model.layers.0.mlp.up_proj.qweight"
        tensors[name] = tensors[name][:, :-8].copy()

    edit(tmp_path / "gptq", cut)
    with pytest.raises(InputError, match=r"do not fit a layer of 256 × 128.*up_proj"):
        quantize(tmp_path / "gptq", tmp_path / "out", SETTINGS)
