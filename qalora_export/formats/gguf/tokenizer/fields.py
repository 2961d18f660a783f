"""tokenizer.json → GGUF tokenizer metadata that llama.cpp reads to the same token ids.

Only what llama.cpp does exactly is accepted; each refusal says what was found. Sources: tokenizers' JSON format,
llama.cpp src/llama-vocab.cpp (impl::load and the tokenizer sessions).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.generation import generation_of
from qalora_export.errors import InputError
from qalora_export.formats.gguf.metadata import Entry
from qalora_export.formats.gguf.tokenizer.byte_level import byte_level_vocabulary
from qalora_export.formats.gguf.tokenizer.sentencepiece import sentencepiece_vocabulary
from qalora_export.formats.gguf.tokenizer.special_tokens import SpecialTokens, special_tokens
from qalora_export.formats.gguf.tokenizer.unigram import unigram_vocabulary
from qalora_export.formats.gguf.tokenizer.vocabulary import Vocabulary, strips_spaces, with_configured_tokens
from qalora_export.safety import inside, read_json
from qalora_export.safety.limits import byte_order_mark


def tokenizer_entries(folder: Path, config: Mapping[str, Any], *, allow_text_differences: bool = False) -> list[Entry]:
    """tokenizer.* entries of the model in `folder`. Raises InputError for anything llama.cpp would do differently.

    allow_text_differences: but for words that llama.cpp cuts elsewhere; another entry says so then.
    """
    raw, settings = _read(folder)
    with _well_formed(folder):
        words = vocabulary(raw, config["vocab_size"], allow_differences=allow_text_differences)
        ids = {token: index for index, token in enumerate(words.tokens)}
        special = special_tokens(folder, raw, settings, ids, generation_of(folder, config).ends)
    return words.entries() + _special_entries(special) + chat_template_entries(folder, settings)


def vocabulary(raw: Mapping[str, Any], rows: int, *, allow_differences: bool = False) -> Vocabulary:
    """The vocabulary of a parsed tokenizer.json as llama.cpp's type of it; `rows`: rows of the embedding matrix."""
    given = raw.get("model")
    model: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    kind = model.get("type")
    if kind == "BPE" and isinstance(model["vocab"], Mapping):
        if model.get("byte_fallback"):
            return sentencepiece_vocabulary(raw, rows)
        return byte_level_vocabulary(raw, rows, allow_differences=allow_differences)
    if kind == "Unigram":
        return unigram_vocabulary(raw, rows)
    raise InputError(
        f"tokenizer model {kind!r} is not supported",
        where="tokenizer.json: model",
        why="supported: BPE over bytes, BPE with byte_fallback, Unigram",
    )


def name_for_llama_cpp(name: str, folder: Path) -> str:
    """general.name of the model in `folder`, of which llama.cpp makes a rule for its tokenizer.

    Behind special tokens of a model named Phi-3 it drops white space: the name must say so exactly when the tokenizer
    does that.
    """
    raw, _ = _read(folder)
    named = any(mark in name.lower() for mark in ("phi-3", "phi3"))
    with _well_formed(folder):
        strips = strips_spaces(raw["added_tokens"])
    if strips:
        return name if named else f"{name} (Phi-3)"
    return re.sub("(?i)phi-?3", "Phi_3", name) if named else name


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json with every added token, and tokenizer_config.json."""
    raw = read_json(inside(folder, "tokenizer.json"))
    settings = read_json(inside(folder, "tokenizer_config.json")) if (folder / "tokenizer_config.json").exists() else {}
    if not isinstance(raw, dict) or not isinstance(settings, dict):
        raise InputError("tokenizer files are not JSON objects", where=folder)
    with _well_formed(folder):
        return with_configured_tokens(raw, settings), settings


@contextlib.contextmanager
def _well_formed(folder: Path) -> Iterator[None]:
    """What a value of another type than the format has leads to, as InputError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"tokenizer files are malformed: {error!r}",
            where=folder,
            fix="load the tokenizer with Transformers and save it again",
        ) from error


def chat_template_entries(folder: Path, settings: Mapping[str, Any]) -> list[Entry]:
    """tokenizer.chat_template and, where a model has several, tokenizer.chat_template.<name>."""
    template: Any = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = inside(folder, "chat_template.jinja").read_text(encoding="utf-8")
        if template.startswith("\ufeff"):
            raise byte_order_mark(folder / "chat_template.jinja")
    if template is None:
        return []
    if isinstance(template, str):
        return [Entry("tokenizer.chat_template", "string", template)]
    try:
        named = {item["name"]: item["template"] for item in template}
    except (TypeError, KeyError) as error:
        raise InputError(
            "chat_template is neither text nor a list of named templates", where=folder / "tokenizer_config.json"
        ) from error
    others = {name: text for name, text in named.items() if name != "default"}
    entries = [Entry("tokenizer.chat_template", "string", named["default"])] if "default" in named else []
    entries += [Entry("tokenizer.chat_templates", "array", list(others))] if others else []
    return entries + [Entry(f"tokenizer.chat_template.{name}", "string", text) for name, text in others.items()]


def _special_entries(special: SpecialTokens) -> list[Entry]:
    numbers = {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        **special.other_ends,
        "padding_token_id": special.pad,
        "unknown_token_id": special.unk,
    }
    entries = [Entry(f"tokenizer.ggml.{key}", "uint32", value) for key, value in numbers.items() if value is not None]
    entries.append(Entry("tokenizer.ggml.add_bos_token", "bool", special.add_bos))
    entries.append(Entry("tokenizer.ggml.add_eos_token", "bool", special.add_eos))
    return entries
