"""Runs that would not do what they were asked to do are refused or stopped, and say what to change."""

from pathlib import Path
from typing import Any

import pytest

from qalora_export.errors import InputError, QaloraError, RuntimeUnavailableError
from tests.qalora.training.runs import Runner


def test_a_loss_that_is_no_number_stops_the_run(run: Runner, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not finite \(nan\) at step \d of 6") as error:
        run(learning_rate=1e6, max_grad_norm=1e9, schedule="constant", warmup_ratio=0.0)
    assert "--learning-rate" in error.value.fix
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"optimizer": "adamw_torsch"}, InputError, "did you mean 'adamw_torch'"),
        ({"optimizer": "paged_adamw_8bit"}, RuntimeUnavailableError, "needs bitsandbytes"),
        ({"data": None}, InputError, "no training data"),
        ({"targets": ("*.z_proj",)}, InputError, "matches the target"),
        ({"sequence_length": 30, "too_long": "error"}, InputError, "samples are longer than sequence_length"),
        ({"sequence_length": 4}, InputError, "24 of 24 samples are longer than sequence_length"),
        ({"pool": 48}, InputError, "pool length 48"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    run: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    kind: type[QaloraError],
    message: str,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)  # absent, wherever the tests run
    with pytest.raises(kind, match=message):
        run(**settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed cannot train packed weights"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM cannot train packed weights"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1 cannot shard"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_MIXED_PRECISION": "bf16"}, "round scales"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "accelerate does not shard here"),  # one CPU process
    ],
)
def test_engines_that_would_not_keep_the_packed_weights_are_refused(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        run()
    assert not (tmp_path / "adapter").exists()


def test_fsdp_takes_only_optimizers_that_work_on_shards(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="paged_adamw_8bit does not work on the shards") as error:
        run(optimizer="paged_adamw_8bit")
    assert "adamw_torch" in error.value.fix
