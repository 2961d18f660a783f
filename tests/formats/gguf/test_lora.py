"""A trained adapter as a llama.cpp LoRA: the same function as PyTorch with unrounded offsets, over a base file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import InputError
from qalora_export.formats.gguf.lora import LowRank
from qalora_export.formats.gguf.permute import hf_order
from qalora_export.models.loading import load_model
from qalora_export.qalora.adapter_files import save_adapter
from qalora_export.qalora.attach import attach, quantized_linears
from qalora_export.qalora.export_adapter import export_gguf_adapter
from qalora_export.recipe import TrainSettings
from tests.formats.gguf.f32_twin import write_f32_twin
from tests.formats.gguf.llama_cpp import ask, nmse, torch_logprobs
from tests.models import make_tiny_canonical

pytestmark = pytest.mark.usefixtures("warm_runners")

Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, LowRank]]:
    """(symmetric base, adapter folder, the adapter's matrices): pool 64 over groups of 32, B random."""
    folder = tmp_path_factory.mktemp("trained")
    base = make_tiny_canonical(folder / "base", tiny_model, sym=True)
    settings = TrainSettings(rank=4, alpha=6.0, pool=64, targets=("*q_proj", "*k_proj", "*down_proj"))
    model = load_model(base)
    attach(model, settings)
    generator = torch.Generator().manual_seed(0)
    for module in quantized_linears(model).values():
        if module.lora_B is not None:
            module.lora_B.data = 0.02 * torch.randn(module.lora_B.shape, generator=generator)
    save_adapter(model, folder / "adapter", base=base, settings=settings)
    found = {
        name: LowRank(m.lora_A.detach().numpy(), m.lora_B.detach().numpy(), m.scaling)
        for name, m in quantized_linears(model).items()
        if m.lora_A is not None and m.lora_B is not None
    }
    return base, folder / "adapter", found


def test_file_holds_the_adapter_bit_for_bit_in_llama_cpps_row_order(
    trained: tuple[Path, Path, dict[str, LowRank]], tmp_path: Path
) -> None:
    base, adapter, matrices = trained
    report = export_gguf_adapter(base, adapter, tmp_path / "a.gguf")
    assert report.modules == len(matrices) == 6
    assert 0 < report.rounded <= report.offsets  # fp16 rounding of offset_eff is what merging adds
    assert report.largest < 1e-3
    assert report.nmse < 1e-4
    reader = GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.lora.alpha"].contents() == 0.0
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    expected = matrices[Q_PROJ]
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight.lora_a"], np.repeat(expected.a, 64, axis=1))
    rows = tensors["blk.1.attn_q.weight.lora_b"][hf_order(len(expected.b), 4)]
    np.testing.assert_array_equal(rows, np.float32(expected.scaling) * expected.b)
    parents = json.loads((tmp_path / "a.gguf.manifest.json").read_text())["parents"]
    assert [parent["role"] for parent in parents] == ["checkpoint", "adapter"]


def test_llama_cpp_computes_base_plus_adapter(
    trained: tuple[Path, Path, dict[str, LowRank]], tiny_model: Path, tmp_path: Path
) -> None:
    base, adapter, matrices = trained
    export_gguf_adapter(base, adapter, tmp_path / "a.gguf")
    write_f32_twin(base, tmp_path / "twin.gguf")
    ids = [list(range(3, 300, 30))]
    checkpoint = CanonicalCheckpoint(base)
    model = load_model(tiny_model, attention="eager")
    with torch.no_grad():
        for name in checkpoint.modules:
            weight = checkpoint.group_affine(name).dequantize().astype(np.float64)
            if name in matrices:
                update = matrices[name].scaling * (matrices[name].b.astype(np.float64) @ matrices[name].a)
                weight = weight + np.repeat(update, 64, axis=1)
            model.get_submodule(name).weight.copy_(torch.from_numpy(weight))
        expected = torch.log_softmax(model(torch.tensor(ids)).logits[0].double(), -1).numpy()
    with_adapter = ask(tmp_path / "twin.gguf", tmp_path, lora=tmp_path / "a.gguf", ids=ids).logprobs[0]
    assert nmse(expected, with_adapter).max() <= 1e-9
    assert nmse(expected, torch_logprobs(base, ids)[0]).max() > 1e-4  # the adapter does something


def test_what_does_not_fit_is_refused(
    trained: tuple[Path, Path, dict[str, LowRank]], tiny_canonical: Path, tmp_path: Path
) -> None:
    base, adapter, _ = trained
    with pytest.raises(InputError, match="another base"):
        export_gguf_adapter(tiny_canonical, adapter, tmp_path / "a.gguf")
    export_gguf_adapter(base, adapter, tmp_path / "a.gguf")
    with pytest.raises(InputError, match="exists"):
        export_gguf_adapter(base, adapter, tmp_path / "a.gguf")
