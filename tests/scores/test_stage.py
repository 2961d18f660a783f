"""evaluate and perplexity: what an artifact answers and predicts in its own runtime is what PyTorch does."""

import json
import math
from pathlib import Path

import pytest
import torch

import qalora_export as q
from qalora_export.errors import InputError
from qalora_export.evaluation import matches
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.scores.running import format_of
from tests.models import TEXT
from tests.verify.exports import Exported

pytestmark = pytest.mark.usefixtures("warm_runners")
QUESTIONS = ("light on", "light off", "a longer question")


def asked(folder: Path, answers: list[str], **settings: object) -> q.EvaluateSettings:
    lines = [json.dumps({"prompt": one, "completion": two}) for one, two in zip(QUESTIONS, answers, strict=True)]
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    return q.EvaluateSettings(data=str(folder / "test.jsonl"), max_new_tokens=4, **settings)  # type: ignore[arg-type]


@pytest.fixture
def own(exported: Exported, tmp_path: Path) -> list[str]:
    """What the checkpoint answers in PyTorch."""
    report = q.evaluate(exported.checkpoint, asked(tmp_path, ["none"] * 3))
    assert (report.exact, report.runtime) == (0, "PyTorch")
    return [miss.answer for miss in report.misses]


@pytest.mark.parametrize("runtime", ["llama.cpp", "onnxruntime", "onnxruntime-genai"])
def test_a_runtime_answers_as_the_checkpoint_does(
    runtime: str, exported: Exported, own: list[str], tmp_path: Path
) -> None:
    artifact = exported.gguf if runtime == "llama.cpp" else exported.onnx
    # GenAI's own decoder drops bytes that are no character (TextHabits.own_decoder); two of the answers have some.
    right = {1} if runtime == "onnxruntime-genai" else {0, 2}
    expected = [answer if index in right else "none" for index, answer in enumerate(own)]
    score = q.evaluate(str(artifact), asked(tmp_path, expected), str(tmp_path / "score.json"), runtime=runtime)
    assert (score.exact, score.total, set(score.wrong), score.runtime) == (len(right), 3, {0, 1, 2} - right, runtime)
    assert score.misses[0].prompt == QUESTIONS[score.wrong[0]]
    written = json.loads((tmp_path / "score.json").read_text())
    assert (written["exact"], written["runtime"], written["match"]) == (len(right), runtime, "exact")


def test_expected_answers_can_be_regular_expressions(exported: Exported, tmp_path: Path) -> None:
    assert matches(" the answer is 42 ", r"\b4\d$", "regex") and not matches("142 is it", r"\b4\d$", "regex")
    assert matches(" 42\n", "42") and not matches("the answer is 42", "42")
    found = q.evaluate(exported.gguf, asked(tmp_path, ["(?s).*", "^$", "[^\\w\\W]"], match="regex"))
    assert found.wrong in ((1, 2), (2,)) and found.match == "regex"
    with pytest.raises(InputError, match=r"no regular expression.*line 2"):
        q.evaluate(exported.gguf, asked(tmp_path, ["a", "(", "b"], match="regex"))


def test_perplexity_is_the_mean_loss_of_windows_in_every_runtime(exported: Exported, tmp_path: Path) -> None:
    content = f"<|end|> ends a turn. {TEXT}"  # a special token in a text is one, whoever reads it
    (tmp_path / "text.txt").write_text(content)
    text, window = str(tmp_path / "text.txt"), 24
    found = q.perplexity(exported.checkpoint, text, str(tmp_path / "out.json"), window=window, limit=3)
    tokenizer, model = load_tokenizer(exported.checkpoint), load_model(exported.checkpoint)
    before = [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
    ids = tokenizer(content, add_special_tokens=False).input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|end|>")
    body = window - len(before)
    losses = []
    for at in range(0, 3 * body, body):
        row = torch.tensor([before + ids[at : at + body]])
        with torch.no_grad():
            losses.append(float(model(row, labels=row).loss))
    assert found.windows == 3 and found.tokens == 3 * (window - 1)
    assert found.nats_per_token == pytest.approx(sum(losses) / 3, abs=1e-4)
    assert json.loads((tmp_path / "out.json").read_text())["perplexity"] == pytest.approx(
        math.exp(found.nats_per_token)
    )
    for artifact in (exported.gguf, exported.onnx):
        other = q.perplexity(artifact, text, window=window, limit=3)
        assert (other.windows, other.tokens) == (found.windows, found.tokens)
        assert other.nats_per_token == pytest.approx(found.nats_per_token, abs=0.05), other.runtime


def test_what_cannot_be_scored_is_refused(exported: Exported, tiny_model: Path, tmp_path: Path) -> None:
    settings = asked(tmp_path, ["a", "b", "c"])
    with pytest.raises(InputError, match="does not run a model folder"):
        q.evaluate(tiny_model, settings, runtime="llama.cpp")
    with pytest.raises(InputError, match="no gguf artifact"):
        q.evaluate(exported.onnx, settings, runtime="llama.cpp")
    with pytest.raises(InputError, match="no runtime is called"):
        q.evaluate(exported.onnx, settings, runtime="onnx")
    with pytest.raises(InputError, match="is a conversation"):
        q.perplexity(exported.gguf, settings.data)
    with pytest.raises(InputError, match="do not fit in the model's context"):
        q.evaluate(exported.gguf, settings.model_copy(update={"max_new_tokens": 100_000}))
    assert format_of(exported.gguf) == "gguf" and format_of(exported.onnx) == "onnx"
    assert format_of(tiny_model) is None and format_of(tmp_path / "test.jsonl") is None
