"""Small tokenizers in the form that each family's real one has: its kind, normalizer, splitting and habits with BOS."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED, O200K
from samples.base.tokenizer import CHAT_TEMPLATE
from tests.formats.gguf.tokenizer.synthetic import byte_level, sentencepiece, with_bos, with_tokens

Raw = dict[str, Any]
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREFIXED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
WITHOUT_BOS = CHAT_TEMPLATE.removeprefix("{{- bos_token }}")
TURNS = ("<start_of_turn>", "<end_of_turn>")
# As Gemma's: a system turn goes before the first user turn, the assistant is called model.
GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set prefix = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set prefix = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for message in rest -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') + message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


DECODER = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FIRST_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _gemma() -> Raw:
    raw = sentencepiece(normalizer=REPLACE, pre_tokenizer=AT_SPACES, lines_apart=True)
    return with_bos(with_tokens(raw, TURNS), "<s>") | {"decoder": {"type": "Sequence", "decoders": DECODER}}


def _sentencepiece() -> Raw:
    raw = with_bos(sentencepiece(normalizer=PREFIXED), "<s>")
    return raw | {"decoder": {"type": "Sequence", "decoders": [*DECODER, FIRST_SPACE]}}


def _bytes(name: str, *, bos: bool = False, nfc: bool = False) -> Raw:
    raw = byte_level(NAMED[name].splits, ignore_merges=NAMED[name].ignore_merges)
    raw |= {"decoder": BYTES} | ({"normalizer": {"type": "NFC"}} if nfc else {})
    return with_bos(raw, "<s>") if bos else raw


# Form -> tokenizer.json, `tokenizer_class` (ONNX Runtime GenAI goes by it), chat template.
FORMS: Mapping[str, tuple[Callable[[], Raw], str, str]] = {
    "Gemma": (_gemma, "GemmaTokenizer", GEMMA_TEMPLATE),
    "SentencePiece": (_sentencepiece, "LlamaTokenizer", CHAT_TEMPLATE),
    "Llama 3": (lambda: _bytes("llama-bpe", bos=True), "PreTrainedTokenizerFast", CHAT_TEMPLATE),
    "Qwen": (lambda: _bytes("qwen2", nfc=True), "Qwen2Tokenizer", WITHOUT_BOS),
    "StarCoder": (lambda: _bytes("starcoder"), "GPT2Tokenizer", WITHOUT_BOS),
    "cl100k": (lambda: _bytes("dbrx"), "GPT2Tokenizer", WITHOUT_BOS),
    "o200k": (lambda: byte_level((O200K,)) | {"decoder": BYTES}, "GPT2Tokenizer", WITHOUT_BOS),
}


GGUF_DIFFERS = ("o200k",)  # llama.cpp has only its nearest form, which `export gguf --allow-text-differences` takes


@cache
def _json(form: str) -> str:
    return json.dumps(FORMS[form][0]())


def save_tokenizer(form: str, folder: Path) -> dict[str, int]:
    """tokenizer.json and tokenizer_config.json into `folder`. Returns bos, eos, pad ids and the vocabulary's size."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_json(form), encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    _, named, tokenizer.chat_template = FORMS[form]
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(_json(form), encoding="utf-8")  # as it was, whatever Transformers made of it
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": named}), encoding="utf-8")
    ids = {name: int(getattr(tokenizer, name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return ids | {"vocab_size": len(tokenizer)}
