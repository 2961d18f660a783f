"""Saving and loading: ours bit for bit, others by their convention, the rest refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from qalora_export.checkpoint.manifest import parent_of, read_manifest
from qalora_export.errors import InputError, QaloraError, UnsafeInputError
from qalora_export.models.loading import load_model
from qalora_export.qalora.adapter_files import load_adapter, save_adapter
from qalora_export.qalora.attach import attach, quantized_linears
from qalora_export.recipe import TrainSettings
from tests.models import make_tiny_canonical
from tests.qalora.adapters import QUERY, foreign_adapter, own_adapter


@pytest.fixture(scope="module")
def saved(tiny_canonical: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    return own_adapter(tiny_canonical, folder, data="/somewhere/private/data.jsonl"), folder


def test_reloads_bit_for_bit(saved: tuple[torch.nn.Module, Path], tiny_canonical: Path) -> None:
    before, folder = saved
    after = load_model(tiny_canonical)
    names = load_adapter(after, folder)
    assert len(names) == 4
    for name, layer in quantized_linears(before).items():
        again = quantized_linears(after)[name]
        assert (again.lora_A is None) == (layer.lora_A is None) == (name not in names)
        if layer.lora_A is not None:
            assert torch.equal(again.lora_A, layer.lora_A)
            assert torch.equal(again.lora_B, layer.lora_B)
            assert again.scaling == layer.scaling
    ids = torch.arange(30).view(1, -1)
    assert torch.equal(before(ids).logits, after(ids).logits)


def test_manifest_chains_to_the_base_and_names_no_machine_path(
    saved: tuple[torch.nn.Module, Path], tiny_canonical: Path
) -> None:
    _, folder = saved
    manifest = read_manifest(folder)
    assert manifest["kind"] == "adapter"
    assert manifest["parents"][0]["sha256"] == parent_of(tiny_canonical, "base").sha256
    assert manifest["settings"]["train"]["data"] == "data.jsonl"
    assert set(manifest["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    for path in folder.iterdir():
        assert b"/somewhere" not in path.read_bytes()
        assert str(tiny_canonical.parent).encode() not in path.read_bytes()


def test_equal_adapters_give_equal_bytes(tiny_canonical: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        own_adapter(tiny_canonical, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_without_the_manifest_it_is_a_peft_adapter_of_the_same_function(
    saved: tuple[torch.nn.Module, Path], tiny_canonical: Path, tmp_path: Path
) -> None:
    before, folder = saved
    shutil.copytree(folder, tmp_path / "uploaded")
    (tmp_path / "uploaded" / "manifest.json").unlink()
    after = load_model(tiny_canonical)
    load_adapter(after, tmp_path / "uploaded")
    for name, layer in quantized_linears(before).items():
        assert torch.equal(quantized_linears(after)[name].effective_offset(), layer.effective_offset())


def test_loading_replaces_every_adapter(saved: tuple[torch.nn.Module, Path], tiny_canonical: Path) -> None:
    model = load_model(tiny_canonical)
    attach(model, TrainSettings(rank=2))
    load_adapter(model, saved[1])
    assert sum(layer.lora_A is not None for layer in quantized_linears(model).values()) == 4


def test_refuses_to_overwrite_or_to_save_nothing(tiny_canonical: Path, tmp_path: Path) -> None:
    model, settings = load_model(tiny_canonical), TrainSettings()
    with pytest.raises(InputError, match="no adapter to save"):
        save_adapter(model, tmp_path / "a", base=tiny_canonical, settings=settings)
    attach(model, settings)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="exists already"):
        save_adapter(model, tmp_path / "a", base=tiny_canonical, settings=settings)
    save_adapter(model, tmp_path / "a", base=tiny_canonical, settings=settings, force=True)
    assert (tmp_path / "a" / "manifest.json").is_file()


def test_adapter_of_another_base_is_refused(
    saved: tuple[torch.nn.Module, Path], tiny_model: Path, tmp_path: Path
) -> None:
    other = make_tiny_canonical(tmp_path / "other", tiny_model, sym=True)
    with pytest.raises(InputError, match=r"trained over another base.*base\.qalora.*other"):
        load_adapter(load_model(other), saved[1])


DAMAGE = {
    "flipped bit": lambda f: _flip(f / "adapter_model.safetensors"),
    "truncated": lambda f: (f / "adapter_model.safetensors").write_bytes(b"abc"),
    "edited config": lambda f: _edit(f / "adapter_config.json", lambda c: c.update(r=8)),
    "missing tensors": lambda f: (f / "adapter_model.safetensors").unlink(),
}


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)


def _edit(path: Path, change: object) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused(
    saved: tuple[torch.nn.Module, Path], tiny_canonical: Path, tmp_path: Path, case: str
) -> None:
    shutil.copytree(saved[1], tmp_path / "a")
    DAMAGE[case](tmp_path / "a")
    with pytest.raises(InputError, match="differ from their manifest"):
        load_adapter(load_model(tiny_canonical), tmp_path / "a")


FORGED = {
    "kind": (lambda m: m.update(kind="merged"), "holds a merged"),
    "no settings": (lambda m: m.update(settings=[]), "lists no modules"),
    "no modules": (lambda m: m["settings"].update(adapter={}), "lists no modules"),
    "no parents": (lambda m: m.update(parents=[]), "another base"),
    "parents of nothing": (lambda m: m.update(parents=None), "no list of tables"),
    "pool of text": (lambda m: m["settings"]["adapter"]["modules"][QUERY].update(pool="32"), "not usable"),
    "pool zero": (lambda m: m["settings"]["adapter"]["modules"][QUERY].update(pool=0), "not usable"),
    "pool not a multiple": (lambda m: m["settings"]["adapter"]["modules"][QUERY].update(pool=33), "not usable"),
    "pool too long": (lambda m: m["settings"]["adapter"]["modules"][QUERY].update(pool=96), "do not fit"),
    "module missing": (lambda m: m["settings"]["adapter"]["modules"].pop(QUERY), "not usable"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_manifests_are_refused(
    saved: tuple[torch.nn.Module, Path], tiny_canonical: Path, tmp_path: Path, case: str
) -> None:
    change, reason = FORGED[case]
    shutil.copytree(saved[1], tmp_path / "a")
    _edit(tmp_path / "a" / "manifest.json", change)
    with pytest.raises(QaloraError, match=reason):
        load_adapter(load_model(tiny_canonical), tmp_path / "a")


@pytest.mark.parametrize(("convention", "scaling"), [("sum", 2.0), ("mean", 2.0 / 32), ("peft", 2.0 * 128 / 32**2)])
def test_foreign_adapters_need_a_convention(
    tiny_canonical: Path, tmp_path: Path, convention: str, scaling: float
) -> None:
    folder, model = foreign_adapter(tmp_path / "f"), load_model(tiny_canonical)
    with pytest.raises(InputError, match="does not say how it pools"):
        load_adapter(model, folder)
    assert load_adapter(model, folder, convention=convention) == [QUERY]
    assert model.get_submodule(QUERY).scaling == scaling
    assert model.get_submodule(QUERY).pool == 32


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_foreign_tensors_widen_exactly(tiny_canonical: Path, tmp_path: Path, dtype: type) -> None:
    a, b = np.full((4, 4), 0.1, dtype), np.full((128, 4), 0.2, dtype)
    folder = foreign_adapter(tmp_path / "f", {f"{QUERY}.lora_A.weight": a, f"{QUERY}.lora_B.weight": b})
    model = load_model(tiny_canonical)
    load_adapter(model, folder, convention="sum")
    assert np.array_equal(model.get_submodule(QUERY).lora_A.detach().numpy(), a.astype(np.float32))


def tensors(a: tuple[int, ...] = (4, 4), b: tuple[int, ...] = (128, 4), name: str = QUERY) -> dict[str, np.ndarray]:
    return {f"{name}.lora_A.weight": np.ones(a, np.float32), f"{name}.lora_B.weight": np.ones(b, np.float32)}


FOREIGN = {
    "plain LoRA": (tensors(a=(4, 128)), {}, "plain LoRA adapter"),
    "plain LoRA that claims use_qalora": (tensors(a=(4, 128)), {"use_qalora": True}, "plain LoRA adapter"),
    "pool shorter than the group": (tensors(a=(4, 8)), {}, "trained with pooling 16 over a base with group size 32"),
    "columns do not divide": (tensors(a=(4, 5)), {}, "5 columns for 128"),
    "declared pool disagrees": (tensors(), {"use_qalora": True, "qalora_group_size": 64}, "qalora_group_size is 64"),
    "rank disagrees with the config": (tensors(a=(3, 4), b=(128, 3)), {}, "says rank 4, lora_A has 3"),
    "rank of A and B disagree": (tensors(b=(128, 5)), {}, "do not fit a matrix"),
    "B of another matrix": (tensors(b=(64, 4)), {}, "do not fit a matrix"),
    "module the base has not": (tensors(name="model.layers.7.q_proj"), {}, "has not quantized"),
    "module that is not quantized": (tensors(name="lm_head"), {}, "has not quantized"),
    "half a pair": ({f"{QUERY}.lora_A.weight": np.ones((4, 4), np.float32)}, {}, "missing"),
    "no tensors": ({}, {}, "no tensors"),
    "a vector": (tensors() | {f"{QUERY}.lora_A.weight": np.ones(4, np.float32)}, {}, "no finite matrix"),
    "NaN": (tensors() | {f"{QUERY}.lora_A.weight": np.full((4, 4), np.nan, np.float32)}, {}, "no finite matrix"),
    "integers": (tensors() | {f"{QUERY}.lora_A.weight": np.ones((4, 4), np.int32)}, {}, "expected a float tensor"),
    "an extra tensor": (tensors() | {"lm_head.weight": np.ones((4, 4), np.float32)}, {}, "cannot merge"),
    "the same place twice": (
        tensors() | {f"base_model.model.{QUERY}.lora_A.weight": np.ones((4, 4), np.float32)},
        {},
        "same place",
    ),
    "dora": (tensors(), {"use_dora": True}, "use_dora"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_adapters_without_a_lossless_form_are_refused(tiny_canonical: Path, tmp_path: Path, case: str) -> None:
    content, config, reason = FOREIGN[case]
    folder = foreign_adapter(tmp_path / "f", content, **config)
    convention = "auto" if config.get("use_qalora") else "sum"
    with pytest.raises(QaloraError, match=reason):
        load_adapter(load_model(tiny_canonical), folder, convention=convention)


def test_pickled_or_absent_adapters(tiny_canonical: Path, tmp_path: Path) -> None:
    model = load_model(tiny_canonical)
    with pytest.raises(InputError, match="adapter folder not found"):
        load_adapter(model, tmp_path / "none")
    folder = foreign_adapter(tmp_path / "f")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        load_adapter(model, folder, convention="mean")
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match="file not found"):
        load_adapter(model, folder, convention="mean")
    (folder / "adapter_model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(UnsafeInputError, match="symbolic link"):
        load_adapter(model, folder, convention="mean")
