"""A model whose widths no single group size divides goes the whole line, scales trained: 32, 128, 16 bits together."""

import json
from pathlib import Path

import pytest

import qalora_export as q
from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import InputError
from tests.conftest import MadeOnce
from tests.models import make_tiny_model
from tests.verify.exports import verified

pytestmark = pytest.mark.usefixtures("warm_runners")

# Asked for 128: 160 in-features fall to 32, 4 heads of 32 keep 128, and nothing divides 208.
WIDTHS = {"hidden_size": 160, "intermediate_size": 208, "head_dim": 32, "num_attention_heads": 4}
GROUPS = {"q_proj": 32, "k_proj": 32, "v_proj": 32, "o_proj": 128, "gate_proj": 32, "up_proj": 32, "down_proj": None}


@pytest.fixture(scope="module")
def line(made_once: MadeOnce) -> Path:
    """model, base and its adapter, trained for two steps with a pool of 64 where the width allows it."""
    return made_once("mixed", make_line)


def make_line(folder: Path) -> None:
    make_tiny_model(folder / "model", **WIDTHS)
    report = q.quantize(folder / "model", folder / "base", q.QuantizeSettings(method="rtn", group_size=128))
    assert any("2 × down_proj: left in 16 bits, 208 in-features" in note for note in report.notes)
    assert json.loads((folder / "base/quantize_report.json").read_text())["notes"] == list(report.notes)
    rows = [{"prompt": f"turn on {n}", "completion": f"on {n}"} for n in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = q.TrainSettings(
        data=str(folder / "data.jsonl"), rank=2, scales=True, max_steps=2, batch_size=4, learning_rate=1e-2
    )
    q.train(folder / "base", folder / "adapter", settings)
    merged = q.merge(folder / "base", folder / "adapter", folder / "merged")
    assert merged.scales_trained and merged.changed_scales and merged.changed_offsets
    assert (merged.changed_codes, merged.changed_other_tensors, merged.logits_differing) == (0, 0, 0)


def test_every_module_has_its_own_group_size(line: Path) -> None:
    modules = CanonicalCheckpoint(line / "merged").modules
    for layer in (0, 1):
        for kind, group in GROUPS.items():
            name = f"model.layers.{layer}.{'self_attn' if kind in 'qkvo' or kind[0] in 'qkvo' else 'mlp'}.{kind}"
            assert modules.get(name) == (None if group is None else (4, group)), name


def test_strict_groups_refuse_it(line: Path, tmp_path: Path) -> None:
    settings = q.QuantizeSettings(method="rtn", group_size=128, strict_groups=True)
    with pytest.raises(InputError, match="160 in-features do not divide into groups of 128"):
        q.quantize(line / "model", tmp_path / "base", settings)


@pytest.mark.slow
def test_it_is_exported_and_verified_on_every_runtime(line: Path, tmp_path: Path) -> None:
    q.export_gguf(line / "merged", tmp_path / "model.gguf")
    q.export_onnx(line / "merged", tmp_path / "onnx")
    assert verified(line, tmp_path / "report", artifacts=tmp_path) == {"pass"}
