"""The folder in ONNX Runtime GenAI: loads, tokenizes, renders chats and generates like Transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import pytest
import torch

from qalora_export.formats.onnx.exact import exact_graph
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.recipe import OnnxSettings

TEXTS = [
    "Turn on the lights",
    "  two spaces",
    "trailing  ",
    "\n\nnew\r\n\r\nlines\n",
    "\ttabs\t\there",
    "1234567890 12 345",
    "don't I'LL we'Ve",
    "naïve café",
    "東京タワー 日本語",
    "🙂👨‍👩‍👧‍👦",
    "<|begin_of_text|>hi<|end|>",
    "<|user|>\nhello<|end|>\n<|assistant|>\n",
    "<|unknown|>",
    "def f(x):\n    return x\n",
    "   \n   \n",
    "\u00a0\u3000",
    "العربية हिन्दी",
    "ﬁ Ⅷ ² ½",
    "",
    " ",
    "a\r\nb\rc",
    "!!!???...",
    "e\u0301 \u200b",
    "١٢٣ ４５６",
]
CHATS = [
    [{"role": "user", "content": "Turn on the lights"}],
    [
        {"role": "system", "content": '  Be "brief" \\ é  '},
        {"role": "user", "content": "a\n\n"},
        {"role": "assistant", "content": '{"device": "lamp"}'},
        {"role": "user", "content": "🙂 東京\t&<>"},
    ],
    [{"role": "user", "content": ""}],
]


@pytest.fixture(scope="module")
def folder(tiny_canonical: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("genai") / "onnx"
    export_onnx(tiny_canonical, out, OnnxSettings(accuracy_level=1))
    return out


def test_token_ids_equal(folder: Path, tiny_canonical: Path) -> None:
    """encode() adds no BOS by default; with add_special_tokens it does what Transformers does."""
    reference, tokenizer = load_tokenizer(tiny_canonical), genai.Tokenizer(str(folder))
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == reference(text, add_special_tokens=False)["input_ids"], repr(text)
    tokenizer.update_options(add_special_tokens="true")
    for text in TEXTS[:-6]:
        assert tokenizer.encode(text).tolist() == reference(text)["input_ids"], repr(text)


@pytest.mark.parametrize("prompt", [True, False])
def test_rendered_chats_equal(prompt: bool, folder: Path, tiny_canonical: Path) -> None:
    reference, tokenizer = load_tokenizer(tiny_canonical), genai.Tokenizer(str(folder))
    for chat in CHATS:
        expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=prompt) == expected


def test_config_names_the_model_as_transformers_sees_it(folder: Path, tiny_canonical: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    source = json.loads((tiny_canonical / "config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == source["max_position_embeddings"]
    assert config["model"]["eos_token_id"] == source["eos_token_id"]
    assert config["search"]["do_sample"] is False


def test_generates_the_same_tokens_as_transformers(folder: Path, tiny_canonical: Path) -> None:
    prompt = [5, 6, 7, 8]
    assert generate(genai.Model(str(folder)), prompt) == transformers_greedy(tiny_canonical, prompt)


def test_exact_graph_can_replace_the_shipped_one_in_memory(tiny_canonical: Path, tmp_path: Path) -> None:
    """add_model_data: int8 folder on disk, float32 graph in memory, the same data file."""
    export_onnx(tiny_canonical, tmp_path / "onnx", OnnxSettings(accuracy_level=4))
    config = genai.Config(str(tmp_path / "onnx"))
    config.add_model_data("model.onnx", exact_graph(tmp_path / "onnx"))
    prompt = [9, 10, 11]
    assert generate(genai.Model(config), prompt) == transformers_greedy(tiny_canonical, prompt)


def generate(model: genai.Model, prompt: list[int], count: int = 12) -> list[int]:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0).tolist()


@torch.no_grad()
def transformers_greedy(checkpoint: Path, prompt: list[int], count: int = 12) -> list[int]:
    model, ids = load_model(checkpoint), list(prompt)
    ends = model.config.eos_token_id
    while len(ids) < len(prompt) + count and ids[-1] != ends:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids
