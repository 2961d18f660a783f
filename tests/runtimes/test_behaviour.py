"""What runtimes generate, each through its own loop: answers, second turns, batches, end tokens, texts, defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qalora_runtimes.arrays import ProtocolError, write_arrays
from qalora_runtimes.behaviour import ANSWER_KEYS, ASKED, END, Question, Request, behind
from qalora_runtimes.heartbeat import Beat
from qalora_runtimes.launch import run_runner
from qalora_runtimes.process import Watch
from qalora_runtimes.protocol import make_job, read_job, write_job

TOKENS = 6
CHAT = {"messages": [{"role": "user", "content": "turn on the kitchen light"}]}
RUNTIMES = {"llama.cpp": "tiny_gguf", "onnxruntime": "tiny_onnx", "onnxruntime-genai": "tiny_onnx"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def asked(tokenizer: Any) -> Request:
    text = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False, add_generation_prompt=True)
    prompt = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    turn = tuple(tokenizer("<|end|>\n<|user|>\nagain<|end|>\n", add_special_tokens=False).input_ids)
    return Request(
        questions=(Question(prompt, TOKENS, chat=CHAT), Question(turn, TOKENS, continues=True)),
        batch=(prompt, prompt[3:]),
        ends=(tokenizer.eos_token_id, 5),
        anchor=tokenizer("a", add_special_tokens=False).input_ids[-1],
        vocabulary=len(tokenizer),
        sequences=(prompt,),
        unprompted=(CHAT,),
        sampled=True,
        scored=(Question(prompt, TOKENS), Question(prompt[2:], 3)),
    )


@pytest.fixture(scope="module")
def greedy(tiny_model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def answer(prompt: list[int]) -> list[int]:
        ids = [*prompt]
        for _ in range(TOKENS):
            with torch.inference_mode():
                ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    return answer


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_float_model_answers_as_pytorch_does(
    name: str, request: pytest.FixtureRequest, asked: Request, greedy: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model, exact = request.getfixturevalue(RUNTIMES[name]), name == "llama.cpp"
    job = replace(make_job([[1]]), behaviour=asked)
    result = run_runner(name, model=model, job=job, workdir=tmp_path, exact=exact, threads=1)
    assert result.status == "ok", (result.message, result.log)
    found, prompt = result.behaviour, [*asked.questions[0].prompt]
    first, second = found["answers"]
    assert first["tokens"] == greedy(prompt)
    assert second["tokens"] == greedy(behind(prompt, first["tokens"], asked.questions[1].prompt))
    assert second["cached"] > len(prompt)
    assert {first["stop"], second["stop"]} == {ASKED}
    wanted = [greedy(prompt), greedy(prompt[2:])[:3]]
    assert [answer["tokens"] for answer in found["scored"]] == wanted
    shown = [None] * 2 if name == "onnxruntime" else [first["text"], found["scored"][1]["text"]]
    assert [answer["text"] for answer in found["scored"]] == shown
    forced = {tokenizer.eos_token_id: END, 5: ASKED}
    assert {int(end): stop for end, stop in found["ends"]["forced"].items()} == forced
    assert found["ends"]["all"] == [tokenizer.eos_token_id]
    if name != "llama.cpp":
        assert found["batch"] == [greedy([*row]) for row in asked.batch]
    if name != "onnxruntime":
        assert found["decoded"] == [tokenizer.decode(prompt, skip_special_tokens=True)]
        assert found["pieces"]["hidden"][-1] == "aa"
        unprompted = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
        assert found["unprompted"] == [
            unprompted.removeprefix(tokenizer.bos_token) if name == "llama.cpp" else unprompted
        ]
        assert found["defaults"]["top_p"] > 0
    if name == "llama.cpp":
        assert found["pieces"]["shown"][-1] == "a<|pad|>a"
        assert first["chat"] == {"text": first["text"], "stop": ASKED}


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_task_alone_is_answered_too(
    name: str, request: pytest.FixtureRequest, asked: Request, greedy: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """On the exact path nothing else is asked."""
    model, prompt = request.getfixturevalue(RUNTIMES[name]), asked.scored[0].prompt
    job = replace(make_job([[1]]), behaviour=Request(scored=(Question(prompt, TOKENS),)))
    result = run_runner(name, model=model, job=job, workdir=tmp_path, exact=name == "llama.cpp", threads=1)
    assert result.status == "ok", (result.message, result.log)
    assert set(ANSWER_KEYS) == set(result.behaviour)
    (answer,) = result.behaviour["scored"]
    made = greedy([*prompt])
    assert answer["tokens"] == made
    if name == "onnxruntime":
        assert answer["text"] is None
    else:  # GenAI drops bytes that are no character
        shown = tokenizer.decode(made, skip_special_tokens=True)
        assert answer["text"].replace("\ufffd", "") == shown.replace("\ufffd", "")


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_task_is_answered_side_by_side_as_one_by_one(
    name: str, request: pytest.FixtureRequest, asked: Request, greedy: Any, tmp_path: Path
) -> None:
    """Prompts and answers of different lengths, more of them than go side by side, some ended by an end token."""
    model, prompt = request.getfixturevalue(RUNTIMES[name]), [*asked.scored[0].prompt]
    prompts = [prompt[cut:] for cut in range(len(prompt) - 2)] * 3
    questions = tuple(Question(tuple(ids), 1 + index % TOKENS) for index, ids in enumerate(prompts))
    job = replace(make_job([[1, 2, 3]] * 5, "both"), behaviour=Request(scored=questions))
    told: list[Beat] = []
    watch = Watch(on_beat=told.append)
    result = run_runner(name, model=model, job=job, workdir=tmp_path, exact=True, threads=1, watch=watch)
    assert result.status == "ok", (result.message, result.log)
    if name == "llama.cpp":
        assert 1 < result.fingerprint["settings"]["sequences"] < len(questions)
    alone = {tuple(question.prompt): greedy([*question.prompt]) for question in questions}
    found = [answer["tokens"] for answer in result.behaviour["scored"]]
    assert found == [_until_the_end(alone[tuple(q.prompt)][: q.tokens], result.behaviour) for q in questions]
    assert all(beat.done <= beat.total for beat in told if beat.total)


def _until_the_end(tokens: list[int], behaviour: Any) -> list[int]:
    ends = [at for at, token in enumerate(tokens) if token in behaviour["ends"]["all"]]
    return tokens[: ends[0] + 1] if ends else tokens


def test_a_request_survives_its_way_through_a_file(asked: Request, tmp_path: Path) -> None:
    job = replace(make_job([[1, 2]]), behaviour=asked)
    write_job(tmp_path / "job.npz", job)
    assert read_job(tmp_path / "job.npz").behaviour == asked
    assert job.longest == len(asked.questions[0].prompt) + TOKENS + len(asked.questions[1].prompt) + TOKENS
    assert replace(asked, questions=(), batch=()).longest == len(asked.scored[0].prompt) + TOKENS
    assert asked.largest == max(asked.ends[0], *asked.questions[0].prompt)


@pytest.mark.parametrize("damage", [b"[]", b"{}", b'{"questions": [{"prompt": ["1"], "tokens": 1}]}'])
def test_a_request_that_is_none_is_refused(damage: bytes, asked: Request, tmp_path: Path) -> None:
    import numpy as np

    ids = np.ones(1, np.int32)
    arrays = {"ids": ids, "lengths": ids, "mode": np.array("prefill"), "behaviour": np.frombuffer(damage, np.uint8)}
    write_arrays(tmp_path / "job.npz", arrays)
    with pytest.raises(ProtocolError, match="behaviour"):
        read_job(tmp_path / "job.npz")
