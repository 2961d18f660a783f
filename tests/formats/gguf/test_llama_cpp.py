"""llama.cpp itself loads what we write: same log-probs as PyTorch, same token ids, same rendered chats."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.types import F32
from qalora_export.recipe import GgufSettings
from tests.formats.gguf.f32_twin import write_f32_twin
from tests.formats.gguf.llama_cpp import ask, nmse, torch_logprobs
from tests.models import make_tiny_canonical, make_tiny_model

pytestmark = pytest.mark.usefixtures("warm_runners")

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\r\n\r\n",
    "Hello world",
    "  leading and trailing  ",
    "tabs\t\tand\n\nnewlines\r\n  \n x",
    "don't DON'T I'll We'VE it's",
    "1 12 123 1234 12345678 3.14159 1,000",
    "e\u0301 combining",
    "½ ² Ⅷ ٣٤٥",
    "naïve café — 東京 🙂 \U0001f469\u200d\U0001f467",
    "\u00a0nbsp\u2003em\u200bzero\u0085nel\ufeff",
    "\x00\x01\x7f",
    "العربية हिन्दी ไทย",
    "\U000e0001\U0001f1e9\U0001f1ea",
    "ſ 'ſ 'S 'T'RE",
    "!!!\n\n???...",
    "x" * 40,
    "def f(x):\n    return x**2  # ok",
    "<|user|>\nhi<|end|>\n<|assistant|>\n",
    "<|end|><|end|>",
    "<|begin_of_text|>x",
    "<|en d|>",
    "a<|pad|>b <|system|>c",
]
CHATS = [
    [{"role": "user", "content": "Turn on the lights  "}],
    [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "user", "content": " {{ x }} <|end|> é🙂 "},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "b"},
    ],
    [{"role": "user", "content": ""}],
]
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SMOLLM = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


@dataclass(frozen=True)
class Case:
    """A model shape and a tokenizer variant, exported and loaded together."""

    name: str
    config: dict = field(default_factory=dict)
    dtype: str = "float16"
    bits: int = 4
    group: int = 32
    pre_tokenizer: dict | None = None
    ignore_merges: bool = True
    pre: str = "llama-bpe"
    bos: bool = True
    plain_added_token: bool = False


CASES = [
    Case("grouped queries, untied"),
    Case(
        "multi-head, tied, biases",
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        ignore_merges=False,
        pre="smaug-bpe",
        plain_added_token=True,
    ),
    Case(
        "llama3 rope, wide heads, bf16",
        {"head_dim": 64, "rope_parameters": LLAMA3_ROPE},
        "bfloat16",
        3,
        64,
        pre_tokenizer=GPT2,
        ignore_merges=False,
        pre="gpt-2",
        bos=False,
    ),
    Case(
        "linear rope, fp32, padded vocabulary",
        {"vocab_size": 530, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}},
        "float32",
        2,
        128,
        pre_tokenizer=SMOLLM,
        ignore_merges=False,
        pre="smollm",
    ),
]


def spread(vocab: int) -> list[int]:
    """Ten token ids over the whole vocabulary."""
    return np.linspace(0, vocab - 1, 10).astype(int).tolist()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("case")
    source = make_tiny_model(folder / "hf", dtype=case.dtype, **case.config)
    raw = json.loads((source / "tokenizer.json").read_text())
    raw["model"]["ignore_merges"] = case.ignore_merges
    if case.pre_tokenizer:
        raw["pre_tokenizer"] = case.pre_tokenizer
    if not case.bos:
        raw["post_processor"] = None
    if case.plain_added_token:
        raw["added_tokens"][-1]["special"] = False
    (source / "tokenizer.json").write_text(json.dumps(raw))
    make_tiny_canonical(folder / "c", source, bits=case.bits, group=case.group)
    return case, folder


def test_the_f32_twin_is_the_pytorch_model_with_its_tokenizer_and_template(case_folder: tuple[Case, Path]) -> None:
    from transformers import AutoTokenizer

    case, folder = case_folder
    plans = write_f32_twin(folder / "c", folder / "twin.gguf")
    assert {plan.kind for plan in plans} == {F32}
    tokenizer = AutoTokenizer.from_pretrained(folder / "c")
    vocab = json.loads((folder / "c" / "config.json").read_text())["vocab_size"]
    ids = [tokenizer("Turn on the kitchen lights at 7:30")["input_ids"][:10], spread(vocab)]
    answer = ask(folder / "twin.gguf", folder, ids=ids, texts=TEXTS, chats=CHATS)

    for expected, found in zip(torch_logprobs(folder / "c", ids), answer.logprobs, strict=True):
        assert nmse(expected, found).max() <= 1e-9  # measured 1e-14 … 1e-12: float32 sums in another order

    expected_ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert dict(zip(TEXTS, answer.tokens, strict=True)) == dict(zip(TEXTS, expected_ids, strict=True))

    # llama.cpp leaves out a leading BOS where its tokenizer adds one, so that there are not two.
    rendered = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in CHATS]
    assert answer.rendered == [text.removeprefix(tokenizer.bos_token) if case.bos else text for text in rendered]


@pytest.mark.parametrize("layout", ["q4_1", "split"])
def test_shipped_layouts_load_and_agree_to_the_noise_of_int8_activations(
    layout: str, tiny_canonical: Path, tmp_path: Path
) -> None:
    report = export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings(layout=layout))
    lora = next((path for path in report.files if path.name.endswith(".lora.gguf")), None)
    assert (lora is not None) == (layout == "split")
    vocab = json.loads((tiny_canonical / "config.json").read_text())["vocab_size"]
    ids = [spread(vocab)]
    expected = torch_logprobs(tiny_canonical, ids)[0]
    found = ask(tmp_path / "m.gguf", tmp_path, lora=lora, ids=ids).logprobs[0]
    error = nmse(expected, found)
    assert np.isfinite(error).all()
    # Random weights amplify int8 rounding of activations; a dropped offset or remainder gives 0.1 and more.
    assert error.max() < 1e-2
    if lora is not None:
        without = ask(tmp_path / "m.gguf", tmp_path, ids=ids).logprobs[0]
        assert nmse(expected, without).max() > 10 * error.max()
