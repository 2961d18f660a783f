"""Options that change how a run computes and not what it learns, each beside the run without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qalora_export.qalora.training import stage as train_stage
from tests.qalora.training.runs import PlainRun, Runner


def test_accumulation_equals_the_larger_batch(run: Runner, tiny_canonical: Path, tmp_path: Path) -> None:
    whole = run("whole", batch_size=12, max_steps=4)
    parts = run("parts", batch_size=3, gradient_accumulation=4, max_steps=4)
    for left, right in zip(whole.train_curve, parts.train_curve, strict=True):
        assert left[1] == pytest.approx(right[1], rel=1e-5)
    assert whole.validation_curve[-1][1] == pytest.approx(parts.validation_curve[-1][1], rel=1e-5)


def test_packing_learns_from_the_same_tokens(run: Runner) -> None:
    plain = run("plain", batch_size=24, max_steps=1)
    packed = run("packed", batch_size=24, max_steps=1, packing=True, sequence_length=200)
    assert packed.train_curve[0][1] == pytest.approx(plain.train_curve[0][1], rel=1e-5)
    assert packed.samples == plain.samples and packed.tokens_per_epoch == plain.tokens_per_epoch


def test_gradient_checkpointing_changes_nothing(run: Runner, plain_run: PlainRun, tmp_path: Path) -> None:
    (plain, adapter), checkpointed = plain_run(), run("b", gradient_checkpointing=True)
    assert plain.train_curve == checkpointed.train_curve
    name = "adapter_model.safetensors"
    assert (adapter / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"validation": None},  # batches of different lengths
        # and evaluation, without gradients
        {"gradient_checkpointing": True, "packing": True, "sequence_length": 128, "scales": True},
    ],
)
def test_compiled_layers_are_whole_graphs_that_train_the_same(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Graphs without the code generator (minutes on a CPU), and an error where one would break."""
    plain = run("a", max_steps=2, **options)
    compiled: list[torch.nn.Module] = []
    original = torch.nn.Module.compile

    def whole_graph(module: torch.nn.Module) -> None:
        compiled.append(module)
        original(module, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", whole_graph)
    torch.compiler.reset()
    other = run("b", max_steps=2, compile=True, **options)
    torch.compiler.reset()
    assert [type(module).__name__ for module in compiled] == ["LlamaDecoderLayer"] * 2
    for curve in ("train_curve", "validation_curve"):
        left, right = (dict(getattr(report, curve)) for report in (plain, other))
        assert [right[step] for step in left] == pytest.approx(list(left.values()), rel=1e-5)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b"))
    assert one.keys() == two.keys()


def test_bf16_follows_fp32(run: Runner, plain_run: PlainRun) -> None:
    (exact, _), narrow = plain_run(), run("b", precision="bf16")
    assert exact.train_curve != narrow.train_curve
    assert narrow.train_curve[-1][1] == pytest.approx(exact.train_curve[-1][1], rel=0.05)


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_of_bitsandbytes_follow_the_one_of_torch(
    run: Runner, plain_run: PlainRun, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On a CPU bitsandbytes keeps paged states unpaged, and says so; the numbers are the same."""
    plain, _ = plain_run(rank=32)  # below 4096 values states stay in 32 bits
    states: list[Any] = []
    write = train_stage._write
    monkeypatch.setattr(
        train_stage,
        "_write",
        lambda trainer, *rest, **options: (
            states.extend(trainer.optimizer.state.values()),
            write(trainer, *rest, **options),
        ),
    )
    other = run("b", rank=32, optimizer=name)
    assert other.best_loss == pytest.approx(plain.best_loss, rel=0.02)
    assert (torch.uint8 in {state["state1"].dtype for state in states if "state1" in state}) == ("8bit" in name)
