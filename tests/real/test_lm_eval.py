"""lm-eval itself on an exported artifact: its requests, its metrics, a task of our own of each kind of request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qalora_export.scores.harness import lm_eval_model
from tests.verify.exports import Exported


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    rows = [{"q": "turn the light", "choices": [" on", " off"], "gold": index % 2} for index in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{q}}",
    }

    def task(name: str, kind: str, metric: str, **more: Any) -> dict[str, Any]:
        return {**common, "task": name, "output_type": kind, "metric_list": [{"metric": metric}], **more}

    generation = {"until": ["\n"], "max_gen_toks": 4}
    return [
        task("choice", "multiple_choice", "acc", doc_to_choice="choices", doc_to_target="gold"),
        task("made", "generate_until", "exact_match", doc_to_target="{{choices[0]}}", generation_kwargs=generation),
        task("text", "loglikelihood_rolling", "word_perplexity", doc_to_text="", doc_to_target="{{q}} on and off"),
    ]


@pytest.fixture
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


@pytest.mark.usefixtures("_quiet")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_its_tasks_run(kind: str, exported: Exported, tasks: list[dict[str, Any]]) -> None:
    import lm_eval  # make test-real installs it; it is none of what make test needs

    with lm_eval_model(getattr(exported, kind)) as model:
        found = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0)["results"]
    assert found["choice"]["acc,none"] == 0.5  # each answer is right twice, whichever is the likelier
    assert found["made"]["exact_match,none"] == 0
    assert found["text"]["word_perplexity,none"] > 100  # of random weights
