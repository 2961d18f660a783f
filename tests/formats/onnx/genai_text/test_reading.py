"""The ids that ONNX Runtime GenAI gives are the predicted ones, on small tokenizers of every form."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qalora_export.formats.gguf.tokenizer.pretokenizer import DEEPSEEK_V3, NAMED, O200K, TEKKEN
from qalora_export.formats.onnx.genai_text.files import MODULE, OWN, genai_files
from qalora_export.formats.onnx.genai_text.reading import GenaiReading
from qalora_export.formats.onnx.genai_text.words import GPT2, KNOWN, NotPredictableError, cut, matchers
from qalora_export.formats.onnx.hosts import genai_notes
from tests.formats.gguf.tokenizer.corpus import CORPUS
from tests.formats.gguf.tokenizer.synthetic import byte_level, hugging_face_ids, sentencepiece, unigram, with_tokens
from tests.formats.onnx.genai_text.asking import genai_ids
from tests.models.families.small import CONFIGS
from tests.models.families.tokenizers import AT_SPACES, FORMS, PREFIXED, REPLACE

BYTES = {
    "Llama 3": byte_level(NAMED["llama-bpe"].splits, ignore_merges=True),
    "Qwen": byte_level(NAMED["qwen2"].splits) | {"normalizer": {"type": "NFC"}},
    "Qwen 3.5": byte_level(NAMED["qwen35"].splits),
    "GPT-2": byte_level((GPT2,)),
    "StarCoder": byte_level(NAMED["starcoder"].splits),
    "o200k": byte_level((O200K,)),
    "Tekken": byte_level((TEKKEN,), ignore_merges=True),
    "DeepSeek V3": byte_level(DEEPSEEK_V3),
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
FIRST = METASPACE | {"prepend_scheme": "first"}
JOINED = {
    "Llama 2": sentencepiece(normalizer=PREFIXED),
    "Yi": sentencepiece(normalizer=REPLACE),
    "Gemma": sentencepiece(normalizer=REPLACE, pre_tokenizer=AT_SPACES, lines_apart=True),
    "Metaspace": sentencepiece(pre_tokenizer=METASPACE),
    "Metaspace, first text": sentencepiece(pre_tokenizer=FIRST),
}
TOKENIZERS = BYTES | JOINED
CLASSES = (
    "LlamaTokenizer",
    "GPT2Tokenizer",
    "GemmaTokenizer",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "Unheard",
)


def texts() -> list[str]:
    """The corpus, white space with line ends in all places, marks and cases, words of more than 100 symbols."""
    chosen = random.Random(0)
    spaces = ["".join(chosen.choices(" \t\n\r\u00a0\u0085.a1/}", k=24)) for _ in range(60)]
    letters = ["".join(chosen.choices("aBéÉ\u0301ǅʰ中क्ि1½/'s \U0001faf4\ua7d3", k=24)) for _ in range(60)]
    added = ["<s>a</s>b", "x<|user|> y <|end|>\n<|end|>", "<|user<|user|>", "<", "<|end|", " <s> <s>"]
    found = [*CORPUS, *spaces, *letters, *added, "人" * 120, "ab" * 90, "x" * 250, "word " * 60, "a,\r\nb " * 20]
    return [text for text in dict.fromkeys(found) if "\0" not in text]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("given", CLASSES)
def test_genai_gives_the_predicted_ids(name: str, given: str, tmp_path: Path) -> None:
    settings = {"tokenizer_class": given, "bos_token": "<s>", "eos_token": "</s>"}
    raw, asked = TOKENIZERS[name], texts()
    files = genai_files(raw, settings)
    reading = GenaiReading(files.get(OWN, raw), settings | files.get(MODULE, {}))
    found = genai_ids(tmp_path / "onnx", raw, settings, asked)
    wrong = {text: (reading.ids(text), ids) for text, ids in zip(asked, found, strict=True) if reading.ids(text) != ids}
    assert not wrong, list(wrong.items())[:3]


@pytest.mark.parametrize("form", sorted({form for _, form, _ in CONFIGS.values()}))
def test_ordinary_text_has_the_ids_of_hugging_face(form: str, tmp_path: Path) -> None:
    from qalora_export.verify.probes.text import PLAIN_TEXTS

    make, given, _ = FORMS[form]
    raw = make()
    settings = {"tokenizer_class": given, "bos_token": "<s>", "eos_token": "</s>"}
    wanted = hugging_face_ids(raw, PLAIN_TEXTS, special=False)
    assert genai_ids(tmp_path / "onnx", raw, settings, PLAIN_TEXTS) == wanted


@pytest.mark.parametrize("strip", ["lstrip", "rstrip"])
def test_tokens_that_strip(strip: str, tmp_path: Path) -> None:
    raw: dict[str, Any] = with_tokens(BYTES["Llama 3"], ["<cut>"])
    for item in raw["added_tokens"]:
        item[strip] = item["content"] == "<cut>"
    asked = ["a <cut>  b", "<cut>", "  <cut>\t\n x", "<cut><cut> y", "<cut> <s>", "<cut>\u2003z"]
    reading = GenaiReading(raw, {"tokenizer_class": "GPT2Tokenizer"})
    found = genai_ids(tmp_path / "onnx", raw, {"tokenizer_class": "GPT2Tokenizer"}, asked)
    assert [reading.ids(text) for text in asked] == found


def test_steps_that_genai_does_not_know_are_written_as_it_does(tmp_path: Path) -> None:
    """`Digits` and a ByteLevel that splits, as in StarCoder, Granite and SmolLM2."""
    raw = BYTES["StarCoder"]
    digits = {"type": "Digits", "individual_digits": True}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spelled = raw | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, bytes_]}}
    asked = ["In 1984 and 2001: 3.14159", "x1 22 333"]
    wanted = hugging_face_ids(spelled, asked, special=False)
    assert wanted == hugging_face_ids(raw, asked, special=False)
    assert OWN in genai_files(spelled, {"tokenizer_class": "GPT2Tokenizer"})
    assert genai_files(raw, {"tokenizer_class": "GPT2Tokenizer"}) == {}
    assert genai_ids(tmp_path / "onnx", spelled, {"tokenizer_class": "GPT2Tokenizer"}, asked) == wanted


def test_rules_with_carriage_returns_are_written_as_lists(tmp_path: Path) -> None:
    """GenAI drops the \\r of a rule that is a string: "} \\r" would become a rule of "}" with nothing."""
    raw = JOINED["Llama 2"]
    raw = raw | {"model": dict(raw["model"])}
    raw["model"]["vocab"] = raw["model"]["vocab"] | {"\r": 5000, "}\r": 5001, "}}": 5002}
    rules = [" ".join(rule) for rule in raw["model"]["merges"]]
    raw["model"]["merges"] = [*rules, "} \r", "} }"]
    settings = {"tokenizer_class": "LlamaTokenizer"}
    asked = ["}\r", "}}", "a }\r b", "}}}"]
    assert all(isinstance(rule, list) for rule in genai_files(raw, settings)[OWN]["model"]["merges"])
    assert genai_ids(tmp_path / "onnx", raw, settings, asked) == hugging_face_ids(raw, asked, special=False)


def test_a_list_of_templates_is_replaced_by_the_default_one() -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    settings = {"tokenizer_class": "CohereTokenizer", "chat_template": templates}
    assert genai_files(BYTES["Qwen"], settings) == {
        MODULE: {"tokenizer_class": "PreTrainedTokenizer", "chat_template": "d"}
    }


@pytest.mark.parametrize("raw", [byte_level((r"\p{Lu}+|\p{N}",)), unigram()], ids=["std::regex", "unigram"])
def test_what_is_not_modelled_is_not_predicted(raw: dict[str, Any]) -> None:
    with pytest.raises(NotPredictableError):
        GenaiReading(raw, {"tokenizer_class": "GPT2Tokenizer"})


def test_words_are_the_whole_text() -> None:
    for isolated in (True, False):
        for alternative in KNOWN:
            for text in texts():
                assert "".join(cut(text, matchers(alternative), isolated=isolated)) == text


def test_matchers_do_not_step_back() -> None:
    assert list(cut("  \n  x", matchers(r"\s*[\r\n]+|\s+(?!\S)|\s+"), isolated=True)) == ["  \n ", " ", "x"]
    assert list(cut("\n  x", matchers(r"\s*[\r\n]+|\s+(?!\S)|\s+"), isolated=True)) == ["\n", " ", " ", "x"]


def test_the_export_says_where_genai_is_not_predictable(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    for raw, said in ((byte_level((r"\p{Lu}+|\p{N}",)), r"no matcher for '\\p{Lu}+'"), (BYTES["Qwen"], "")):
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        assert said in "".join(genai_notes(tmp_path))
        assert bool(genai_notes(tmp_path)) == bool(said)


@pytest.mark.parametrize("declared", [[], [1], {"x": {}}, {"5": "y"}], ids=str)
def test_odd_declarations_of_tokens_are_not_predicted(declared: Any) -> None:
    settings = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": declared}
    if not declared:
        assert GenaiReading(BYTES["Qwen"], settings).ids("a")
        return
    with pytest.raises(NotPredictableError, match="added_tokens_decoder"):
        GenaiReading(BYTES["Qwen"], settings)
