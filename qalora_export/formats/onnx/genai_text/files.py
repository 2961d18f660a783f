"""What ONNX Runtime GenAI must be told so that its own tokenizer gives the ids of tokenizer.json.

Two files that no other host reads. tokenizer_module.json overrides keys of tokenizer_config.json; its `tiktoken_file`
names the file that GenAI takes for tokenizer.json (onnxruntime-extensions, operators/tokenizer/tokenizer_jsconfig.hpp).
Both are written only where GenAI would otherwise go wrong:

* SentencePiece models. GenAI cuts their text into words before it joins tokens, unless the class is Gemma's; puts a ▁
  before each text where the decoder strips one, whatever the normalizer does; and loses carriage returns of rules that
  are written as strings, which then replace other rules.
* Splitting steps other than `Split` (`Digits` of StarCoder, Granite, SmolLM2): GenAI does not know them, and splits
  numbers otherwise. They are written as the `Split` steps that they are.
* A tokenizer class that it does not know, and a list of chat templates: it does not load. The default one is named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qalora_export.formats.gguf.tokenizer.pretokenizer import byte_level_json, canonical_splits
from qalora_export.formats.onnx.genai_text.words import GPT2

MODULE, OWN = "tokenizer_module.json", "genai_tokenizer.json"
OWN_KEY = "tiktoken_file"
MODULE_KEYS = {OWN_KEY, "tokenizer_class", "chat_template"}
WITHOUT_WORDS = "GemmaTokenizer"
ANY_BPE = "PreTrainedTokenizer"
CLASSES = {  # of BPE tokenizers, with or without "Fast" behind them
    *("PreTrainedTokenizer", "GemmaTokenizer", "InternLM2Tokenizer", "LlamaTokenizer", "Phi3Tokenizer"),
    *("CodeLlamaTokenizer", "CodeGenTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "BaichuanTokenizer"),
    *("GPTNeoXTokenizer", "TokenizersBackend", "PythonBackend", "MistralCommonBackend"),
}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def genai_files(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """File name -> content, none where GenAI reads the checkpoint's own files right.

    tokenizer: parsed tokenizer.json; settings: parsed tokenizer_config.json.
    """
    if tokenizer.get("model", {}).get("type", "BPE") != "BPE" or "model" not in tokenizer:
        return {}
    overrides: dict[str, Any] = {}
    name = str(settings.get("tokenizer_class") or "")
    if name.removesuffix("Fast") not in CLASSES:
        overrides["tokenizer_class"] = ANY_BPE
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        overrides["chat_template"] = str(named.get("default") or "")
    own = dict(tokenizer)
    if _joins_with_spaces(tokenizer):
        overrides["tokenizer_class"] = WITHOUT_WORDS
        own |= {"model": _with_rules_as_lists(tokenizer["model"]), "decoder": _decoder(tokenizer)}
    elif (splits := canonical_splits(tokenizer.get("pre_tokenizer"))) is not None:
        own["pre_tokenizer"] = _as_splits(tokenizer.get("pre_tokenizer"), splits, name)
    if own == tokenizer:
        return {MODULE: overrides} if overrides else {}
    return {MODULE: overrides | {OWN_KEY: OWN}, OWN: own}


def _joins_with_spaces(tokenizer: Mapping[str, Any]) -> bool:
    """Whether it is a SentencePiece model: ▁ stands for a space."""
    steps = [tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]
    return "▁" in json.dumps(steps, ensure_ascii=False)


def _with_rules_as_lists(model: Mapping[str, Any]) -> dict[str, Any]:
    rules = model["merges"]
    if not any(isinstance(rule, str) and ("\r" in rule or rule.startswith("#")) for rule in rules):
        return dict(model)
    return {**model, "merges": [rule.split(" ") if isinstance(rule, str) else rule for rule in rules]}


def _decoder(tokenizer: Mapping[str, Any]) -> Any:
    """A decoder that strips a space exactly where the tokenizer puts one before every text."""
    steps = list((tokenizer.get("decoder") or {}).get("decoders") or [])
    others = [step for step in steps if step["type"] not in ("Strip", "Metaspace")]
    if not any(step == SPACES for step in others):
        others.insert(0, SPACES)
    wanted = [*others, STRIP] if _puts_a_space(tokenizer) else others
    return tokenizer["decoder"] if steps == wanted else {"type": "Sequence", "decoders": wanted}


def _puts_a_space(tokenizer: Mapping[str, Any]) -> bool:
    """A ▁ goes before each text between added tokens; not where only the very first text gets one."""
    normalizer = tokenizer.get("normalizer") or {}
    if any(step["type"] == "Prepend" for step in [normalizer, *(normalizer.get("normalizers") or [])] if step):
        return True
    words = tokenizer.get("pre_tokenizer") or {}
    metaspace = [step for step in [words, *(words.get("pretokenizers") or [])] if step.get("type") == "Metaspace"]
    return any(step.get("prepend_scheme", "always") == "always" for step in metaspace)


def _as_splits(raw: Any, splits: tuple[str, ...], name: str) -> Any:
    """The pre-tokenizer itself where GenAI sees these expressions in it, else spelled so that it does."""
    steps = raw.get("pretokenizers") or []
    seen = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if not seen and splits == (GPT2,) and not name.startswith("Llama"):
        return raw  # GenAI's own default
    written = tuple(regex.replace("\r", r"\r").replace("\n", r"\n") for regex in seen if regex is not None)
    return raw if written == splits else byte_level_json(splits)
