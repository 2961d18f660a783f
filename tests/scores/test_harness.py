"""The lm-eval model: what its requests get is what PyTorch computes; lm-eval itself is a stand-in here."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.scores import harness
from tests.verify.exports import Exported

pytestmark = pytest.mark.usefixtures("warm_runners")


class LM:
    """lm_eval.api.model.LM as far as it matters."""

    def __init__(self) -> None:
        self.ready = True


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("lm_eval.api.model")
    module.LM = LM  # type: ignore[attr-defined]
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    harness._model_class.cache_clear()
    yield
    harness._model_class.cache_clear()


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


class Reference:
    """The same in PyTorch, one text at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self.model, self.tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
        bos = self.tokenizer.bos_token_id
        self.before = [bos] if self.tokenizer("a").input_ids[0] == bos else []

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def score(self, context: str, rest: str) -> float:
        whole, start = self.ids(context + rest), len(self.ids(context))
        ids = self.before + whole
        with torch.no_grad():
            rows = torch.log_softmax(self.model(torch.tensor([ids])).logits[0], -1)
        begin = max(len(self.before) + start, 1)
        return float(sum(rows[at - 1, ids[at]] for at in range(begin, len(ids))))


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_requests_are_answered_as_in_pytorch(kind: str, exported: Exported, lm_eval: None) -> None:
    artifact, wanted = getattr(exported, kind), Reference(exported.checkpoint)
    with harness.lm_eval_model(artifact, window=16) as model:
        assert isinstance(model, LM) and model.ready
        pairs = [("turn the light", " on"), ("turn the light", " off please"), ("", "light")]
        for (total, greedy), pair in zip(model.loglikelihood([request(*p) for p in pairs]), pairs, strict=True):
            assert total == pytest.approx(wanted.score(*pair), abs=0.3) and not greedy
        (rolling,) = model.loglikelihood_rolling([request("turn the light off")])
        assert rolling == pytest.approx(wanted.score("", "turn the light off"), abs=0.3)
        options = {"until": [], "max_gen_toks": 5}
        (answer,) = model.generate_until([request("turn the light", options)])
        assert answer
        stop = answer.strip()[0]
        (cut,) = model.generate_until([request("turn the light", options | {"until": [stop]})])
        assert stop not in cut and answer.startswith(cut)
        with pytest.raises(InputError, match="greedy"):
            model.generate_until([request("a", {"do_sample": True})])
        assert model.loglikelihood([]) == model.loglikelihood_rolling([]) == model.generate_until([]) == []


def test_long_texts_are_cut_into_windows_and_long_contexts_lose_their_beginning(
    exported: Exported, lm_eval: None
) -> None:
    with harness.lm_eval_model(exported.onnx, window=8) as model:
        text = "turn the light off and then on again, twice"
        (whole,) = model.loglikelihood_rolling([request(text)])
        assert whole < -10
        (short, _), (long, _) = model.loglikelihood([request("light", " on"), request(text, " on")])
        assert short < 0 and long < 0


def test_without_lm_eval_it_says_so(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    harness._model_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with (
        pytest.raises(RuntimeUnavailableError, match=r"qalora-export\[lm-eval\]"),
        harness.lm_eval_model(exported.onnx),
    ):
        pass
