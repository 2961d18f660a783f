"""The train stage in one process: what it learns, what it keeps, how it stops and goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import verify_manifest
from qalora_export.data.samples import IGNORED, load_samples
from qalora_export.data.sequence_packing import collate, one_per_row
from qalora_export.errors import InputError
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.qalora.adapter_files import load_adapter
from qalora_export.qalora.training import folder as training_folder
from qalora_export.qalora.training import trainer as adapter_trainer
from qalora_export.qalora.training.plan import plan
from qalora_export.recipe import TrainSettings
from tests.qalora.training.runs import PlainRun, Runner, folder_bytes


def validation_loss(base: Path, files: dict[str, str], adapter: Path | None) -> float:
    """Mean loss per answer token by the plain model, one sample at a time, in float64."""
    model = load_model(base)
    if adapter is not None:
        load_adapter(model, adapter)
    total = count = 0.0
    for sample in load_samples(Path(files["validation"]), load_tokenizer(base), sequence_length=512):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sample.ids])).logits[0].double()
        for position in range(1, len(sample)):
            if sample.labels[position] != IGNORED:
                total -= float(logits[position - 1].log_softmax(-1)[sample.labels[position]])
                count += 1
    return total / count


@pytest.mark.parametrize("scales", [False, True])
def test_loss_falls_and_the_adapter_is_the_measured_one(
    scales: bool, run: Runner, tmp_path: Path, tiny_canonical: Path, files: dict[str, str]
) -> None:
    report = run(max_steps=20, learning_rate=3e-3, scales=scales)
    assert report.best_loss is not None and report.initial_loss is not None
    assert report.best_loss < report.initial_loss - 1
    assert report.final_train_loss < report.train_curve[0][1] - 1
    assert report.initial_loss == pytest.approx(validation_loss(tiny_canonical, files, None), rel=1e-5)
    assert report.best_loss == pytest.approx(validation_loss(tiny_canonical, files, tmp_path / "adapter"), rel=1e-5)
    assert [step for step, _ in report.train_curve] == list(range(1, 21))
    assert [step for step, _ in report.validation_curve] == list(range(0, 21, 2))
    assert verify_manifest(tmp_path / "adapter") == []


@pytest.mark.pictures
def test_the_record_stands_beside_the_adapter(run: Runner, tmp_path: Path) -> None:
    report = run()
    record = tmp_path / report.record
    assert {p.name for p in record.iterdir()} == {
        "run.json",
        "metrics.jsonl",
        "report.json",
        "loss.png",
        "loss.svg",
        "tensorboard",
    }
    saved = json.loads((record / "report.json").read_text())
    assert saved["best_loss"] == report.best_loss and saved["settings"]["rank"] == 4
    assert saved["tokens_per_second"] > 0 and saved["peak_memory_bytes"] > 2**20
    metrics = [json.loads(line) for line in (record / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in metrics if "loss" in row] == [loss for _, loss in report.train_curve]
    assert list((record / "tensorboard").glob("events.out.tfevents*"))


def test_the_best_adapter_is_kept_not_the_last(
    run: Runner, tmp_path: Path, tiny_canonical: Path, files: dict[str, str]
) -> None:
    data = tmp_path / "one.jsonl"  # learning this one answer by heart forgets the others
    data.write_text(json.dumps({"prompt": "turn on the fan in the hall", "output": '{"room": "kitchen"}'}))
    report = run(data=str(data), max_steps=16, learning_rate=0.01, schedule="constant", evaluate_every=1)
    best_step, best = min(report.validation_curve[1:], key=lambda point: point[1])
    assert best_step < 16, "the run must get worse again for this test to say anything"
    assert (report.kept_step, report.best_loss) == (best_step, best)
    assert validation_loss(tiny_canonical, files, tmp_path / "adapter") == pytest.approx(best, rel=1e-5)


def test_without_validation_the_last_adapter_is_kept(run: Runner, tmp_path: Path) -> None:
    report = run(validation=None)
    assert (report.kept_step, report.best_loss, report.validation_curve) == (6, None, ())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_same_seed_gives_the_same_bytes(run: Runner, plain_run: PlainRun, tmp_path: Path) -> None:
    run("same")
    run("other", seed=6)
    assert folder_bytes(tmp_path / "same") == folder_bytes(plain_run()[1])
    assert folder_bytes(tmp_path / "other") != folder_bytes(plain_run()[1])


def test_targets_limit_the_adapter(run: Runner, tiny_canonical: Path) -> None:
    report = run(targets=("*.q_proj", "*.v_proj"))
    base = CanonicalCheckpoint(tiny_canonical)
    shapes = [base.entry(f"{name}.scale").shape for name in base.modules if name.endswith(("q_proj", "v_proj"))]
    assert report.trainable_parameters == sum(4 * (out + groups) for out, groups in shapes)


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


@pytest.mark.parametrize(
    ("moment", "optimizer"),
    [("checkpoint", "adamw_torch"), ("step", "adamw_torch"), ("adapter", "adamw_torch"), ("step", "paged_adamw_8bit")],
)
def test_an_interrupted_run_ends_like_an_undisturbed_one(
    run: Runner, plain_run: PlainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, optimizer: str
) -> None:
    """Cut off inside the write of the second checkpoint, between two, and after the last before the adapter."""
    options = {
        "max_steps": 7,
        "evaluate_every": 2,
        "packing": True,
        "sequence_length": 128,
        "batch_size": 4,
        "optimizer": optimizer,
    }
    undisturbed, whole = plain_run(**options)

    calls = {"mark_complete": 0, "training_step": 0}

    def die_at(name: str, limit: int, original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            if calls[name] == limit:
                raise Killed
            return original(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        if moment == "checkpoint":
            patch.setattr(training_folder, "mark_complete", die_at("mark_complete", 2, training_folder.mark_complete))
        elif moment == "step":
            step = adapter_trainer.AdapterTrainer.training_step
            patch.setattr(adapter_trainer.AdapterTrainer, "training_step", die_at("training_step", 6, step))
        else:
            patch.setattr(training_folder, "write_lines", die_at("mark_complete", 1, training_folder.write_lines))
        with pytest.raises(Killed):
            run("cut", **options)
    assert not (tmp_path / "cut").exists()
    resumed = run("cut", **options)
    assert resumed.resumed_from == {"checkpoint": 2, "step": 4, "adapter": 7}[moment]
    assert resumed.train_curve == undisturbed.train_curve
    assert resumed.validation_curve == undisturbed.validation_curve
    assert folder_bytes(tmp_path / "cut") == folder_bytes(whole)


def test_a_changed_run_is_not_resumed(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training_folder, "write_lines", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run()
    with pytest.raises(InputError, match="cannot resume") as error:
        run(learning_rate=2e-3)
    assert error.value.why == "changed since then: settings.learning_rate"
    assert run(learning_rate=2e-3, resume=False).resumed_from == 0


def test_an_existing_output_is_refused_unless_forced(run: Runner, tmp_path: Path) -> None:
    run()
    with pytest.raises(InputError, match="exists already"):
        run()
    before = folder_bytes(tmp_path / "adapter")
    run(force=True, seed=3)
    assert folder_bytes(tmp_path / "adapter") != before


def test_the_plan_counts_what_the_trainer_does(tiny_canonical: Path, files: dict[str, str], run: Runner) -> None:
    settings = TrainSettings(**files, batch_size=5, gradient_accumulation=2, epochs=2.5, rank=4)
    made = plan(tiny_canonical, settings)
    assert (made.steps.per_epoch, made.steps.total, made.steps.evaluate_every) == (3, 8, 1)
    report = run(batch_size=5, gradient_accumulation=2, epochs=2.5, max_steps=-1)
    assert report.steps == made.steps.total and report.trainable_parameters == made.memory.trainable_parameters
    samples = load_samples(Path(files["data"]), load_tokenizer(tiny_canonical), sequence_length=512)
    assert made.tokens == sum(int(collate(one_per_row([s]))["input_ids"].numel()) for s in samples)
