"""transformers.js (onnxruntime-node) and onnxruntime-web's wasm on exported folders, without a single option.

Token ids and rendered chats equal Python's, greedy answers equal Transformers' on the checkpoint, and logits lie as
near to PyTorch's as gates G2 and G3 ask: at accuracy level 1 within G2's bound, at level 4 away by what
onnxruntime in Python is, which verify-parity has judged (assert_as_noisy).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from qalora_runtimes.scoring import log_softmax

import qalora_export as q
from qalora_export.models.loading import load_tokenizer
from tests.formats.onnx.helpers import prefill
from tests.formats.onnx.test_genai import CHATS, TEXTS
from tests.models.families.small import CONFIGS, make_small
from tests.web.node import Answers, run
from tests.web.reference import ANSWER, G2_NMSE, NEW_TOKENS, assert_as_noisy, expected, nmse


def ask(installed: Path, checkpoint: Path, workdir: Path, level: int) -> Answers:
    q.export_onnx(checkpoint, workdir / "onnx", q.OnnxSettings(accuracy_level=level))
    job = {"texts": TEXTS, "chats": CHATS, "answer": ANSWER, "new_tokens": NEW_TOKENS}
    vocabulary = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return run(installed, "run.mjs", workdir / "work", job | {"folder": str(workdir / "onnx")}, vocabulary)


@pytest.mark.parametrize(("name", "level"), [("tuned", 1), ("tuned", 4), ("smollm2", 4)])
def test_a_chat_model(name: str, level: int, request: pytest.FixtureRequest, installed: Path, tmp_path: Path) -> None:
    checkpoint: Path = request.getfixturevalue(name)
    found = ask(installed, checkpoint, tmp_path, level)
    tokenizer = load_tokenizer(checkpoint)
    assert found.said["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS]
    assert found.said["rendered"] == rendered
    assert found.said["rendered_ids"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    logits, greedy = expected(checkpoint, ANSWER, NEW_TOKENS)
    if name == "tuned":
        assert found.said["greedy"] == found.said["wasm_greedy"] == greedy
        assert len(greedy) < NEW_TOKENS  # it ends by itself
        assert found.said["text"] == tokenizer.decode(greedy, skip_special_tokens=True)
        assert json.loads(found.said["text"])["room"] == "kitchen"
    ids = np.array(tokenizer.apply_chat_template(ANSWER, add_generation_prompt=True)["input_ids"])[None]
    assert set(found.logits) == {"node", "wasm"}
    reference = log_softmax(logits[0])
    here = None if level == 1 else nmse(reference, prefill(tmp_path / "onnx", ids)[0])
    for values in found.logits.values():
        away = nmse(reference, values)
        if here is None:
            assert away.max() <= G2_NMSE, away
        else:
            assert_as_noisy(away, here)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_computes_what_pytorch_does(family: str, installed: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.qalora"
    q.quantize(make_small(tmp_path / "model", family), base, q.QuantizeSettings(method="rtn", bits=4))
    found = ask(installed, base, tmp_path, 1)
    logits, greedy = expected(base, ANSWER, NEW_TOKENS)
    away = {name: nmse(log_softmax(logits[0]), values).max() for name, values in found.logits.items()}
    assert set(away) == {"node", "wasm"}
    assert max(away.values()) <= G2_NMSE, away
    assert found.said["greedy"] == found.said["wasm_greedy"] == greedy
