"""The stage on tiny models: the same numbers as with the whole model in memory, and everything else bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import verify_manifest
from qalora_export.checkpoint.model_folder import ModelFolder, as_float32
from qalora_export.data.calibration import calibration_windows
from qalora_export.errors import InputError
from qalora_export.grid import difference
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.models.skeleton import Skeleton
from qalora_export.quantization.gptq import gptq
from qalora_export.quantization.hessian import Hessian
from qalora_export.quantization.rtn import round_to_nearest
from qalora_export.quantization.rules import Plan, parse_rule
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import QuantizeSettings
from tests.checkpoint.files import same_bytes
from tests.models import TEXT, make_tiny_model

SAMPLES, LENGTH = 40, 128  # more than one batch of 4096 tokens, and a smaller last one


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    return path


def settings(text: Path, *rules: str, **values: object) -> QuantizeSettings:
    rules_ = tuple(parse_rule(rule) for rule in rules)
    return QuantizeSettings(
        calibration=str(text), calibration_samples=SAMPLES, sequence_length=LENGTH, rules=rules_, **values
    )


def whole_model_gptq(folder: Path, chosen: QuantizeSettings) -> dict:
    """The obvious way: the whole model in memory, its own forward from the token ids again for every layer."""
    model = load_model(folder)
    windows = calibration_windows(
        Path(chosen.calibration), load_tokenizer(folder), samples=SAMPLES, length=LENGTH, seed=chosen.seed
    )
    plan = Plan(chosen.bits, chosen.group_size, chosen.sym)
    results = {}
    for index, layer in enumerate(model.model.layers):
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        hessians = {name: Hessian(module.in_features, torch.device("cpu")) for name, module in linears.items()}
        handles = [
            module.register_forward_pre_hook(lambda _, inputs, hessian=hessians[name]: hessian.add(inputs[0]))
            for name, module in linears.items()
        ]
        with torch.no_grad():
            for begin in range(0, len(windows), 4096 // LENGTH):
                model(input_ids=torch.from_numpy(windows[begin : begin + 4096 // LENGTH]), use_cache=False)
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            matrix = gptq(module.weight.data, hessians[name].value(), plan, where=name, sweeps=chosen.sweeps)
            results[f"model.layers.{index}.{name}"] = matrix
            module.weight.data = torch.from_numpy(matrix.dequantize())
    return results


@pytest.mark.parametrize(("bits", "sym"), [(4, False), (3, True)])
def test_streaming_gives_the_whole_models_numbers(
    tiny_model: Path, text: Path, tmp_path: Path, bits: int, sym: bool
) -> None:
    chosen = settings(text, bits=bits, sym=sym)
    report = quantize(tiny_model, tmp_path / "q", chosen)
    written, expected = CanonicalCheckpoint(tmp_path / "q"), whole_model_gptq(tiny_model, chosen)
    assert set(written.modules) == set(expected)
    for name, matrix in expected.items():
        assert difference(written.group_affine(name), matrix).total == 0, name
        assert written.group_affine(name).is_symmetric == sym
    assert report.calibration_tokens == SAMPLES * LENGTH
    assert report.bits_per_weight == bits + 1
    assert all(module.output_error is not None and 0 < module.output_error < 0.2 for module in report.modules)


def test_same_inputs_same_bytes_and_no_paths(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize(tiny_model, tmp_path / name / "q", settings(text))
    first, second = (sorted((tmp_path / name / "q").iterdir()) for name in ("a", "b"))
    assert [path.name for path in first] == [path.name for path in second]
    for left, right in zip(first, second, strict=True):
        assert left.read_bytes() == right.read_bytes(), left.name
    manifest = (tmp_path / "a" / "q" / "manifest.json").read_text()
    assert str(tmp_path) not in manifest
    assert str(text.parent) not in manifest
    recorded = json.loads(manifest)["settings"]
    assert recorded["calibration"]["name"] == text.name
    assert recorded["bits"] == 4
    assert verify_manifest(tmp_path / "a" / "q") == []


def test_rtn_of_every_source_dtype_and_sharding(tmp_path: Path) -> None:
    """Biases, a tied head, bf16 and fp32 sources, shards: matrices by RTN, the rest bit for bit."""
    for dtype in ("bfloat16", "float32"):
        source = make_tiny_model(tmp_path / dtype, dtype=dtype, tie_word_embeddings=True, attention_bias=True)
        if dtype == "float32":
            load_model(source).save_pretrained(source, max_shard_size="200KB")
            (source / "model.safetensors").unlink()
            assert len(list(source.glob("*.safetensors"))) > 1
        report = quantize(source, tmp_path / f"{dtype}.q", QuantizeSettings(method="rtn", group_size=64))
        folder, written = ModelFolder(source), CanonicalCheckpoint(tmp_path / f"{dtype}.q")
        kept = [name for name in folder.names() if name.removesuffix(".weight") not in written.modules]
        assert sorted(written.plain_names()) == sorted(kept)
        assert len(kept) == report.kept
        assert any(name.endswith("q_proj.bias") for name in kept)
        for name in kept:
            assert same_bytes(np.asarray(folder.tensor(name)), np.asarray(written.tensor(name))), name
        for name in written.modules:
            weight = torch.from_numpy(as_float32(folder.tensor(f"{name}.weight")))
            assert (
                difference(written.group_affine(name), round_to_nearest(weight, Plan(4, 64, False), where=name)).total
                == 0
            )


def test_without_data_the_grid_of_least_squared_error_is_another(tiny_model: Path, tmp_path: Path) -> None:
    report = quantize(tiny_model, tmp_path / "q", QuantizeSettings(method="mse", group_size=64))
    assert (report.method, report.calibration_tokens) == ("mse", 0)
    folder, written = ModelFolder(tiny_model), CanonicalCheckpoint(tmp_path / "q")
    for name in written.modules:
        weight = torch.from_numpy(as_float32(folder.tensor(f"{name}.weight")))
        expected = round_to_nearest(weight, Plan(4, 64, False), where=name, mse=True)
        assert difference(written.group_affine(name), expected).total == 0


def test_the_result_loads_and_its_report_counts(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    report = quantize(tiny_model, tmp_path / "q", settings(text, "*.1.*=bits:8,group:64", "*.v_proj=skip"))
    model = load_model(tmp_path / "q")
    written, folder = CanonicalCheckpoint(tmp_path / "q"), ModelFolder(tiny_model)
    assert written.modules["model.layers.1.self_attn.v_proj"] == (8, 64)
    assert "model.layers.0.self_attn.v_proj" not in written.modules
    for module in report.modules:
        exact = as_float32(folder.tensor(f"{module.name}.weight"))
        error = written.group_affine(module.name).dequantize() - exact
        assert module.changed == np.count_nonzero(error)
        np.testing.assert_allclose(module.relative_error, np.linalg.norm(error) / np.linalg.norm(exact), rtol=1e-4)
        np.testing.assert_allclose(module.largest_change, np.abs(error).max(), rtol=1e-6)
    ids = torch.arange(3, 40)[None]
    source = load_model(tiny_model)
    with torch.no_grad():
        for name in written.modules:
            source.get_submodule(name).weight.copy_(torch.from_numpy(written.group_affine(name).dequantize()))
        assert torch.equal(model(input_ids=ids).logits, source(input_ids=ids).logits)


def test_lm_head_when_a_rule_names_it(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    report = quantize(tiny_model, tmp_path / "q", settings(text, "lm_head=bits:8,sym:true"))
    assert report.modules[-1].name == "lm_head"
    assert report.modules[-1].output_error < 1e-3
    assert CanonicalCheckpoint(tmp_path / "q").group_affine("lm_head").is_symmetric


def test_layers_go_back_to_the_meta_device(tiny_model: Path) -> None:
    skeleton = Skeleton(ModelFolder(tiny_model), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    with skeleton.materialized("model.layers.1"):
        real = {name for name, parameter in skeleton.model.named_parameters() if not parameter.is_meta}
        assert real
        assert all(name.startswith("model.layers.1.") for name in real)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.fixture
def broken(tiny_model: Path, tmp_path: Path):
    """A copy of the tiny model whose config and weights a test may change."""
    from safetensors.numpy import load_file, save_file

    def make(*, config: dict | None = None, weights=None) -> Path:
        folder = tmp_path / "broken"
        folder.mkdir()
        for path in tiny_model.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        loaded = json.loads((folder / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps(loaded))
        if weights is not None:
            tensors = load_file(folder / "model.safetensors")
            weights(tensors)
            save_file(tensors, folder / "model.safetensors")
        return folder

    return make


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["NewForCausalLM"]}, r"unsupported architecture NewForCausalLM.*supported: "),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantized already \(awq\).*unquantized model"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantized already \(bitsandbytes\)"),
        ({"quantization_config": {"quant_method": "qalora"}}, r"quantized already \(qalora\).*canonical already"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantized already \(fp8\)"),
        ({"quantization_config": "yes"}, r"quantized already \(unknown\)"),
        ({"num_hidden_layers": 3}, r"no tensor 'model\.layers\.2\."),
        ({"intermediate_size": 512}, r"shape \(256, 128\), the config says \(512, 128\).*gate_proj"),
    ],
)
def test_sources_we_cannot_take_are_refused(broken, text: Path, tmp_path: Path, config: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(broken(config=config), tmp_path / "out", settings(text))
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_leaves_nothing_behind(broken, text: Path, tmp_path: Path) -> None:
    def poison(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan

    for method in ("gptq", "rtn"):
        with pytest.raises(InputError, match=r"NaN or infinite.*model\.layers\.1\.mlp\.up_proj\.weight"):
            quantize(
                broken(weights=poison) if method == "gptq" else tmp_path / "broken",
                tmp_path / "out",
                settings(text, method=method),
            )
        assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_gptq_needs_calibration_text(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs calibration text.*--calibration FILE.*rtn"):
        quantize(tiny_model, tmp_path / "out", QuantizeSettings())


def test_an_existing_output_is_kept_unless_forced(tiny_model: Path, tmp_path: Path) -> None:
    rtn = QuantizeSettings(method="rtn")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        quantize(tiny_model, tmp_path / "out", rtn)
    quantize(tiny_model, tmp_path / "out", rtn, force=True)
    assert CanonicalCheckpoint(tmp_path / "out").modules
