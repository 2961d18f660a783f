"""evaluate: greedy whatever the model's generation config says, every end token ends, what it needs of a record."""

import json
import shutil
from pathlib import Path

import pytest

from qalora_export.errors import InputError
from qalora_export.evaluation import end_ids, evaluate
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.recipe import EvaluateSettings
from tests.data.files import write

HOSTILE = {
    "num_beams": 4,
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 3,
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 6,
    "length_penalty": 3.0,
    "forced_eos_token_id": 7,
    "bad_words_ids": [[n] for n in range(100, 200)],
    "suppress_tokens": list(range(200, 300)),
    "max_length": 3,
    "num_return_sequences": 4,
}
STEPS = 6


def greedy(folder: Path, ids: list[int], ends: list[int]) -> list[int]:
    """The slow, obvious way: the most likely next token, one whole forward pass each."""
    import torch

    model, answer = load_model(folder), list[int]()
    with torch.no_grad():
        while len(answer) < STEPS:
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
            if answer[-1] in ends:
                break
    return answer


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def ask(model: Path, expected: str) -> tuple[list[int], Path]:
    """Token ids of a question, and a data file that expects `expected` as its answer."""
    turns = [{"role": "user", "content": "turn on the lights"}]
    ids = load_tokenizer(model).apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    path = write(model.parent / "data.jsonl", {"messages": [*turns, {"role": "assistant", "content": expected}]})
    return list(ids), path


def test_answers_are_greedy_under_a_hostile_generation_config(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps(HOSTILE))
    tokenizer = load_tokenizer(model)
    ids, _ = ask(model, "")
    answer = tokenizer.decode(greedy(model, ids, end_ids(model, tokenizer)), skip_special_tokens=True).strip()
    _, data = ask(model, answer)
    score = evaluate(model, EvaluateSettings(data=str(data), max_new_tokens=STEPS))
    assert (score.exact, score.misses) == (1, ())


def test_an_end_token_that_only_config_json_names_ends_the_answer(model: Path) -> None:
    ids, _ = ask(model, "")
    tokenizer = load_tokenizer(model)
    first, second = greedy(model, ids, [])[:2]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": [tokenizer.eos_token_id, second]}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    assert end_ids(model, tokenizer) == [tokenizer.eos_token_id, second]
    _, data = ask(model, tokenizer.decode([first]).strip())
    assert evaluate(model, EvaluateSettings(data=str(data), max_new_tokens=STEPS)).exact == 1


def test_any_format_with_an_answer_can_be_evaluated_and_others_name_the_line(model: Path, tmp_path: Path) -> None:
    row = {"instruction": "turn on the lights", "response": "x"}
    data = write(tmp_path / "a.jsonl", row, {"text": "no answer"})
    assert evaluate(model, EvaluateSettings(data=str(data), limit=1, max_new_tokens=1)).total == 1
    with pytest.raises(InputError, match=r"last turn must be the assistant's.*line 2"):
        evaluate(model, EvaluateSettings(data=str(data), max_new_tokens=1))
    with pytest.raises(InputError, match=r"do not fit in the model's context.*line 1"):
        evaluate(model, EvaluateSettings(data=str(data), limit=1, max_new_tokens=250))


def test_a_question_that_the_template_renders_to_nothing_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for m in messages if m['role'] == 'assistant' %}x{% endfor %}")
    data = write(tmp_path / "a.jsonl", {"instruction": "turn on the lights", "response": "x"})
    with pytest.raises(InputError, match=r"to nothing.*line 1"):
        evaluate(model, EvaluateSettings(data=str(data), max_new_tokens=1))
