"""PEFT's own classes, config, files and arithmetic on one side, ours on the other, over the same quantized base.

PEFT wires QA-LoRA to GPTQ layers through GPTQLoraLinear; its documented hook for custom modules lets that very class
wrap our QALoraLinear, so injection, QALoraLinearVariant, save_pretrained and from_pretrained below are all PEFT's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.variants import QALoraLinearVariant

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import InputError
from qalora_export.grid import difference
from qalora_export.models.loading import load_model
from qalora_export.qalora.adapter_files import load_adapter, save_adapter
from qalora_export.qalora.attach import attach, quantized_linears
from qalora_export.qalora.layer import QALoraLinear
from qalora_export.qalora.merge import merge
from qalora_export.recipe import TrainSettings
from tests.models import make_tiny_canonical, make_tiny_model
from tests.qalora.layers import naive_weight

TARGETS = ("*.q_proj", "*.v_proj", "*.gate_proj", "*.down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden 96 and 192: in/pool² is no power of two, so a mistaken factor or rounding shows."""
    folder = tmp_path_factory.mktemp("interop")
    source = make_tiny_model(folder / "model", hidden_size=96, intermediate_size=192, num_key_value_heads=4)
    return make_tiny_canonical(folder / "base.qalora", source)


def ids() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 24)))


def inputs(module: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 7, module.in_features, generator=generator)


def wire(config: LoraConfig) -> LoraConfig:
    config._register_custom_module({QALoraLinear: GPTQLoraLinear})
    return config


def for_peft(base: Path) -> torch.nn.Module:
    """PEFT looks up the device of a quantized layer on an attribute named like GPTQ's."""
    model = load_model(base)
    for layer in quantized_linears(model).values():
        layer.qweight = layer.codes
    return model


def trained_by_us(base: Path, folder: Path, **overrides: object) -> torch.nn.Module:
    model = load_model(base)
    settings = TrainSettings(**{"rank": 4, "alpha": 12.0, "targets": TARGETS, "seed": 3} | overrides)
    generator = torch.Generator().manual_seed(4)
    for name in attach(model, settings):
        model.get_submodule(name).lora_B.data.normal_(0, 0.02, generator=generator)
    save_adapter(model, folder, base=base, settings=settings)
    return model


def unrounded(layer: QALoraLinear, x: torch.Tensor) -> torch.Tensor:
    """x·(s·q + m + scaling·B A)ᵀ in float64: our function before offset_eff is rounded to float16, as PEFT's is."""
    delta = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    wide = delta.repeat_interleave(layer.pool, dim=1)
    return x.double() @ (naive_weight(layer) + wide).T


@pytest.mark.parametrize("pool", [None, 32])
def test_peft_computes_the_function_we_saved(base: Path, tmp_path: Path, pool: int | None) -> None:
    ours = trained_by_us(base, tmp_path / "adapter", pool=pool)
    config = wire(LoraConfig.from_pretrained(str(tmp_path / "adapter")))
    theirs = PeftModel.from_pretrained(for_peft(base), str(tmp_path / "adapter"), config=config).eval()
    checked = 0
    for name, layer in quantized_linears(ours).items():
        wrapped = theirs.base_model.model.get_submodule(name)
        assert isinstance(wrapped, GPTQLoraLinear) == (layer.lora_A is not None)
        if layer.lora_A is None:
            continue
        assert isinstance(wrapped.lora_variant["default"], QALoraLinearVariant)
        assert torch.equal(wrapped.lora_A["default"].weight, layer.lora_A)
        x = inputs(layer)
        expected = unrounded(layer, x)
        torch.testing.assert_close(wrapped(x).double(), expected, rtol=2e-5, atol=2e-5)
        assert (layer(x) - layer_without_adapter(layer, x)).abs().max() > 0.1  # the adapter is not a rounding error
        torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=0.02)  # ours rounds offsets to float16
        checked += 1
    assert checked == 8
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits, ours(ids()).logits, rtol=0, atol=0.1)


def layer_without_adapter(layer: QALoraLinear, x: torch.Tensor) -> torch.Tensor:
    return (x.double() @ naive_weight(layer).T).float()


def test_several_pool_lengths_become_one_for_peft(base: Path, tmp_path: Path) -> None:
    """PEFT knows one qalora_group_size; a module that pools 96 is saved as one that pools 32 three times over."""
    model = load_model(base)
    settings = TrainSettings(rank=4, targets=("*.q_proj",))
    attach(model, settings)
    layers = quantized_linears(model)
    down, query = layers["model.layers.0.mlp.down_proj"], layers["model.layers.0.self_attn.q_proj"]
    down.attach_adapter(6, 7.0, pool=96)
    for layer in (down, query):
        layer.lora_B.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "adapter", base=base, settings=settings)

    config = wire(LoraConfig.from_pretrained(str(tmp_path / "adapter")))
    assert config.qalora_group_size == 32
    theirs = PeftModel.from_pretrained(for_peft(base), str(tmp_path / "adapter"), config=config)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
        x = inputs(layers[name])
        found = theirs.base_model.model.get_submodule(name)(x)
        torch.testing.assert_close(found.double(), unrounded(layers[name], x), rtol=2e-5, atol=2e-5)

    again = load_model(base)
    load_adapter(again, tmp_path / "adapter")
    back = quantized_linears(again)["model.layers.0.mlp.down_proj"]
    assert (back.pool, back.scaling) == (96, down.scaling)
    assert torch.equal(back.lora_A, down.lora_A)


def trained_by_peft(base: Path, folder: Path, **overrides: object) -> PeftModel:
    """An adapter made, trained for some steps and saved by PEFT alone."""
    torch.manual_seed(5)
    settings = {
        "r": 4,
        "lora_alpha": 2,
        "use_qalora": True,
        "qalora_group_size": 32,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    } | overrides
    model = get_peft_model(for_peft(base), wire(LoraConfig(**settings)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
    model.save_pretrained(str(folder))
    return model.eval()


PEFT_VARIANTS = {
    "plain": {},
    "rank and alpha patterns": {
        "rank_pattern": {"down_proj": 6, r"^model.layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {r"layers.\d.self_attn.v_proj": 7},
    },
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.1},
}


@pytest.mark.parametrize("variant", PEFT_VARIANTS)
def test_an_adapter_trained_by_peft_imports_and_merges(base: Path, tmp_path: Path, variant: str) -> None:
    theirs = trained_by_peft(base, tmp_path / "peft", **PEFT_VARIANTS[variant])
    model = load_model(base)
    names = load_adapter(model, tmp_path / "peft")
    assert len(names) == 6
    for name in names:
        layer, wrapped = model.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert wrapped.lora_B["default"].weight.abs().max() > 0
        assert torch.equal(layer.lora_A, wrapped.lora_A["default"].weight)
        x = inputs(layer)
        torch.testing.assert_close(wrapped(x).double(), unrounded(layer, x), rtol=2e-5, atol=2e-5)

    report = merge(base, tmp_path / "peft", tmp_path / "merged")
    assert (report.convention, report.adapted, report.logits_differing) == ("peft", 6, 0)
    assert report.changed_offsets > 0
    with torch.no_grad():
        plain, merged = load_model(base)(ids()).logits, load_model(tmp_path / "merged")(ids()).logits
        wanted = theirs(ids()).logits
    moved, missed = (wanted - plain).square().sum(), (wanted - merged).square().sum()
    assert missed < 1e-2 * moved  # what remains is the rounding of offsets to float16


def test_round_trip_through_peft_merges_to_the_same_offsets(base: Path, tmp_path: Path) -> None:
    """Saved by us, loaded and saved again by PEFT (which drops our manifest), imported by us: same offsets."""
    trained_by_us(base, tmp_path / "ours")
    config = wire(LoraConfig.from_pretrained(str(tmp_path / "ours")))
    PeftModel.from_pretrained(for_peft(base), str(tmp_path / "ours"), config=config).save_pretrained(
        str(tmp_path / "theirs")
    )
    merge(base, tmp_path / "ours", tmp_path / "a", compare_logits=False)
    assert merge(base, tmp_path / "theirs", tmp_path / "b", compare_logits=False).convention == "peft"
    left, right = CanonicalCheckpoint(tmp_path / "a"), CanonicalCheckpoint(tmp_path / "b")
    assert sum(difference(left.group_affine(m), right.group_affine(m)).total for m in left.modules) == 0


def test_plain_peft_lora_is_refused_with_the_reason(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_model(base.parent / "model"), config).save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(InputError, match="plain LoRA"):
        load_adapter(load_model(base), tmp_path / "lora", convention="peft")
    with pytest.raises(InputError, match="does not say how it pools"):
        load_adapter(load_model(base), tmp_path / "lora")


def test_pool_of_32_over_a_group_of_128_cannot_merge(base: Path, tmp_path: Path) -> None:
    wide = make_tiny_model(tmp_path / "model", hidden_size=128, intermediate_size=256)
    coarse = make_tiny_canonical(tmp_path / "base", wide, group=128)
    fine = make_tiny_canonical(tmp_path / "fine", wide, group=32)
    trained_by_peft(fine, tmp_path / "peft")
    with pytest.raises(InputError, match="trained with pooling 32 over a base with group size 128: cannot merge"):
        merge(coarse, tmp_path / "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()
