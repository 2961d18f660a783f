"""llama.cpp's own quantizations: its rule for types, its blocks, and that llama.cpp computes what PyTorch scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from qalora_runtimes.launch import run_runner
from qalora_runtimes.protocol import Job

from qalora_export.comparison.k_quants import T, quantize_folder, type_of
from qalora_export.errors import RuntimeUnavailableError
from qalora_export.formats.gguf.read import GgufContents
from qalora_export.models.loading import load_model
from tests.verify.exports import Exported


@pytest.mark.parametrize(
    "name, layers, recipe, kind",
    [
        ("output.weight", 22, "Q4_0", T.Q6_K),
        ("token_embd.weight", 22, "Q4_K_M", T.Q4_K),
        ("blk.0.attn_v.weight", 22, "Q4_K_M", T.Q6_K),
        ("blk.3.attn_v.weight", 22, "Q4_K_M", T.Q4_K),
        ("blk.4.ffn_down.weight", 22, "Q4_K_M", T.Q6_K),
        ("blk.21.ffn_down.weight", 22, "Q4_K_M", T.Q6_K),
        ("blk.0.attn_q.weight", 22, "Q4_K_M", T.Q4_K),
        ("blk.0.ffn_down.weight", 22, "Q4_0", T.Q4_0),
    ],
)
def test_llama_quantize_rule(name: str, layers: int, recipe: str, kind: T) -> None:
    assert type_of(name, layers, recipe) == kind


@pytest.mark.parametrize(
    "name, kind",
    [
        ("token_embd.weight", T.Q8_0),
        ("blk.3.attn_v.weight", T.Q8_0),
        ("blk.0.attn_v.weight", T.Q5_0),
        ("blk.0.attn_q.weight", T.Q5_0),
    ],
)
def test_llama_quantize_falls_back_where_256_does_not_divide(name: str, kind: T) -> None:
    """On the sample base: 384 in-features, 4 layers, the embedding is the output matrix."""
    assert type_of(name, 4, "Q4_K_M", columns=384, tied=True) == kind


@pytest.mark.parametrize(
    "name, recipe, kind",
    [
        ("blk.1.attn_v.weight", "Q3_K_M", T.Q5_K),
        ("blk.2.attn_v.weight", "Q3_K_M", T.Q4_K),
        ("blk.0.ffn_down.weight", "Q3_K_M", T.Q5_K),
        ("blk.1.ffn_down.weight", "Q3_K_M", T.Q4_K),
        ("blk.1.attn_output.weight", "Q3_K_M", T.Q4_K),
        ("blk.1.ffn_up.weight", "Q3_K_M", T.Q3_K),
        ("blk.5.attn_v.weight", "Q2_K", T.Q4_K),
        ("blk.5.ffn_down.weight", "Q2_K", T.Q3_K),
        ("blk.5.attn_q.weight", "Q2_K", T.Q2_K),
        ("output.weight", "Q2_K", T.Q6_K),
        ("output.weight", "F16", T.F16),
    ],
)
def test_fewer_bits_where_llama_quantize_has_fewer(name: str, recipe: str, kind: T) -> None:
    assert type_of(name, 22, recipe, shared=8) == kind
    assert type_of("blk.5.attn_v.weight", 22, "Q2_K", shared=1) == T.Q3_K
    assert type_of("blk.5.attn_q.weight", 22, "Q2_K", columns=384) == T.IQ4_NL
    assert type_of("blk.5.attn_q.weight", 22, "Q2_K", columns=80) == T.F16


@pytest.mark.parametrize("recipe", ["F16", "Q2_K"])
def test_what_is_scored_is_what_llama_cpp_computes(
    recipe: str, exported: Exported, tiny_model: Path, tmp_path: Path
) -> None:
    file = quantize_folder(tiny_model, exported.gguf, tmp_path / "model.gguf", recipe)
    model, contents = load_model(tiny_model, dtype=torch.float32), GgufContents(file)
    weights = {name: weight.data for name, weight in model.named_parameters()}
    assert set(contents.types) == set(weights)
    for name in contents.types:
        found = torch.tensor(contents.dequantized(name))
        change = float((found - weights[name]).norm() / weights[name].norm())
        assert change < (1e-6 if recipe == "F16" else 0.3), name
        weights[name].copy_(found)
    ids = np.arange(3, 40, dtype=np.int32)
    said = run_runner("llama.cpp", model=file, job=Job((ids,), "prefill"), workdir=tmp_path / "run", exact=True)
    assert said.logprobs is not None, said.message
    with torch.no_grad():
        wanted = torch.log_softmax(model(torch.from_numpy(ids)[None].long()).logits[0], -1).numpy()
    kl = (np.exp(wanted) * (wanted - said.logprobs)).sum(1)
    assert kl.max() < (1e-4 if recipe == "F16" else 5e-2)  # activations are float16 there, int8 here


def test_without_llama_cpp_it_says_so(
    exported: Exported, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    with pytest.raises(RuntimeUnavailableError, match="quantizer"):
        quantize_folder(tiny_model, exported.gguf, tmp_path / "model.gguf", "Q4_K_M")
    assert not (tmp_path / "model.gguf").exists()
