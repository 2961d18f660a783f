"""Scales and offsets trained through the grid: what is merged is what was trained, and both learn."""

from pathlib import Path

import numpy as np
import torch

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import verify_manifest
from qalora_export.comparison import scales
from qalora_export.models.loading import load_model


def trained(base: Path) -> tuple[torch.nn.Module, list[str]]:
    """A model whose updates are no longer zero."""
    model, names = load_model(base), list(CanonicalCheckpoint(base).modules)
    scales.attach_scales(model, base, names, rank=2, alpha=4.0, seed=1)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("_update.b"):
                parameter.copy_(1e-2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return model, names


def test_an_untrained_layer_is_the_base(tiny_canonical: Path) -> None:
    model, name = load_model(tiny_canonical), next(iter(CanonicalCheckpoint(tiny_canonical).modules))
    scales.attach_scales(model, tiny_canonical, [name], rank=2, alpha=4.0, seed=1)
    found, wanted = model.get_submodule(name).merged(), CanonicalCheckpoint(tiny_canonical).group_affine(name)
    for part in ("codes", "scale", "offset"):
        np.testing.assert_array_equal(getattr(found, part), getattr(wanted, part))


def test_the_written_checkpoint_computes_what_was_trained(tiny_canonical: Path, tmp_path: Path) -> None:
    model, names = trained(tiny_canonical)
    scales.write_merged(model, tiny_canonical, tmp_path / "merged.qalora")
    assert verify_manifest(tmp_path / "merged.qalora") == []
    base, merged = CanonicalCheckpoint(tiny_canonical), CanonicalCheckpoint(tmp_path / "merged.qalora")
    before, after = base.group_affine(names[0]), merged.group_affine(names[0])
    np.testing.assert_array_equal(before.codes, after.codes)
    assert (before.scale != after.scale).any() and (before.offset != after.offset).any()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, load_model(merged.path)(ids).logits, rtol=0, atol=1e-5)
        layer, x = model.get_submodule(names[0]), torch.eye(after.shape[1])
        np.testing.assert_array_equal(layer(x).T.numpy(), after.dequantize())


def test_both_updates_get_gradients_and_nothing_else(tiny_canonical: Path) -> None:
    model, names = trained(tiny_canonical)
    model(torch.arange(3, 19)[None]).logits.square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {f"{name}.{part}_update.{m}" for name in names for part in ("scale", "offset") for m in "ab"}
