"""The exported folder and file in a real Chromium: transformers.js and wllama, from loopback, with threads, offline.

Token ids, rendered chats and greedy answers equal Python's and Transformers'. Logits: where nothing is rounded (ONNX at
accuracy level 1; wllama on the F32 twin) within gate G2's bound of PyTorch's, else away by what the same runtime in
Python is, which verify-parity has judged (assert_as_noisy).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from qalora_runtimes.launch import run_runner
from qalora_runtimes.protocol import make_job
from qalora_runtimes.scoring import log_softmax

import qalora_export as q
from qalora_export.models.loading import load_tokenizer
from qalora_export.verify.reference.logits import float32_model
from qalora_export.verify.runtimes.twin import write_twin
from samples.web.make import make
from tests.formats.onnx.helpers import prefill
from tests.formats.onnx.test_genai import CHATS, TEXTS
from tests.web.node import Answers, browse
from tests.web.reference import ANSWER, G2_NMSE, NEW_TOKENS, assert_as_noisy, expected, nmse

THREADS = 2
JOB = {"texts": TEXTS, "chats": CHATS, "answer": ANSWER, "new_tokens": NEW_TOKENS, "threads": THREADS}
EXACT = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": False}


def judged(found: Answers) -> dict[str, Any]:
    """What was said, once nothing else went wrong: no error, no other host, and threads really there."""
    assert found.said["errors"] == found.said["elsewhere"] == []
    assert found.said["isolated"]
    assert found.said["threads"] == THREADS
    return found.said


@pytest.mark.parametrize("level", [1, 4])
def test_the_onnx_folder_in_transformers_js(level: int, tuned: Path, browser: Path, tmp_path: Path) -> None:
    q.export_onnx(tuned, tmp_path / "onnx", q.OnnxSettings(accuracy_level=level))
    make(tmp_path / "onnx", tmp_path / "site", browser)
    tokenizer = load_tokenizer(tuned)
    found = browse(browser, tmp_path / "site", tmp_path / "work", {"module": "ask_onnx.js", "job": JOB}, len(tokenizer))
    said = judged(found)
    assert said["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS]
    assert said["rendered"] == rendered
    assert said["rendered_ids"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    logits, greedy = expected(tuned, ANSWER, NEW_TOKENS)
    assert said["greedy"] == greedy
    assert said["text"] == tokenizer.decode(greedy, skip_special_tokens=True)
    ids = np.array([said["prompt"]])
    reference = log_softmax(logits[0])
    away = nmse(reference, found.logits["wasm"])
    if level == 1:
        assert away.max() <= G2_NMSE, away
    else:
        assert_as_noisy(away, nmse(reference, prefill(tmp_path / "onnx", ids)[0]))


@pytest.mark.parametrize("path", ["exact", "shipped"])
def test_the_gguf_file_in_wllama(path: str, tuned: Path, browser: Path, tmp_path: Path) -> None:
    """wllama takes texts, never ids: that it made Hugging Face's ids of them is proven by the logits behind each."""
    artifact = tmp_path / "model.gguf"
    q.export_gguf(tuned, artifact)
    served = artifact
    if path == "exact":
        served = tmp_path / "twin.gguf"
        write_twin(artifact, served)
    make(served, tmp_path / "site", browser)
    tokenizer = load_tokenizer(tuned)
    unspoken = [i for i in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([i])]
    job = JOB | {"unspoken": unspoken, "params": EXACT if path == "exact" else {}}
    found = browse(browser, tmp_path / "site", tmp_path / "work", {"module": "ask_gguf.js", "job": job}, len(tokenizer))
    said = judged(found)
    sequences = [tokenizer(text)["input_ids"] for text in TEXTS]
    sequences += [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in CHATS]
    assert said["counts"] == [len(ids) for ids in sequences]
    _, greedy = expected(tuned, ANSWER, NEW_TOKENS)
    assert said["greedy"] == greedy[: len(said["greedy"])]
    assert said["text"] == tokenizer.decode(greedy, skip_special_tokens=True)

    spoken = np.setdiff1d(np.arange(len(tokenizer)), unspoken)
    reference = after(tuned, sequences)[:, spoken]
    away = nmse(reference, found.logits["next"][:, spoken])
    if path == "exact":
        assert away.max() <= G2_NMSE, away
    else:
        here = run_runner("llama.cpp", model=artifact, job=make_job(sequences), workdir=tmp_path / "here", threads=1)
        assert here.logprobs is not None, here.message
        ends = np.cumsum([len(ids) for ids in sequences]) - 1
        assert_as_noisy(away, nmse(reference, here.logprobs[ends][:, spoken]))


def after(checkpoint: Path, sequences: list[list[int]]) -> NDArray[np.float32]:
    """PyTorch's float32 log-probabilities after each sequence, (sequences, vocabulary)."""
    model = float32_model(checkpoint)
    with torch.inference_mode():
        return np.concatenate([log_softmax(model(torch.tensor([ids])).logits[0, -1:].numpy()) for ids in sequences])


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_the_sample_page_answers(kind: str, tuned: Path, browser: Path, tmp_path: Path) -> None:
    model = tmp_path / ("onnx" if kind == "onnx" else "model.gguf")
    (q.export_onnx if kind == "onnx" else q.export_gguf)(tuned, model)
    make(model, tmp_path / "site", browser, title="Devices")
    job = {"question": ANSWER[0]["content"], "screenshot": str(tmp_path / "page.png")}
    said = browse(browser, tmp_path / "site", tmp_path / "work", job).said
    assert said["errors"] == said["elsewhere"] == []
    _, greedy = expected(tuned, ANSWER, NEW_TOKENS)
    assert said["answer"] == load_tokenizer(tuned).decode(greedy, skip_special_tokens=True)
    assert json.loads(said["answer"])["room"] == "kitchen"
    assert ("transformers.js" if kind == "onnx" else "wllama") in said["about"]
    assert (tmp_path / "page.png").stat().st_size > 0
