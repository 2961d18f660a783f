"""What Hugging Face's tokenizer answers to the texts and conversations of the probe set: the judge of gate G5."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qalora_runtimes.protocol import conversation

from qalora_export.formats.gguf.tokenizer.nearest import nearest_name
from qalora_export.formats.gguf.tokenizer.reading import LlamaCppReading, shows_the_difference
from qalora_export.models.loading import load_tokenizer
from qalora_export.verify.probes.probe_set import ProbeSet, rendered
from qalora_export.verify.reference.genai_text import genai_differences


def folder_answers(folder: Path, probes: ProbeSet) -> dict[str, Any]:
    """Answers by the tokenizer files in `folder`.

    texts: ids of each text, special tokens added as for a prompt; plain_texts: nothing added; rendered: each
    conversation as a string that ends with the generation prompt; rendered_ids: its ids, nothing added; bos: BOS text
    where the tokenizer puts it before a text, else "";
    with_tools: indices of the conversations with tools;
    by_design: kind → {index: (ids, reason)} where llama.cpp answers otherwise because GGUF cannot say it;
    by_permission: the same where the export was told to accept llama.cpp's nearest pre-tokenizer;
    genai: both for ONNX Runtime GenAI's own tokenizer (genai_text.py).
    """
    tokenizer = load_tokenizer(folder)
    conversations = [rendered(tokenizer, chat) for chat in probes.chats]

    asked = {"texts": probes.texts, "rendered_ids": conversations}
    ordinary = {
        "texts": [index for index, text in enumerate(probes.texts) if text in probes.ordinary],
        "rendered_ids": range(len(conversations)),
    }

    def ids(text: str, *, special: bool) -> list[int]:
        return [int(i) for i in tokenizer(text, add_special_tokens=special)["input_ids"]]

    return {
        "texts": [ids(text, special=True) for text in probes.texts],
        "plain_texts": [ids(text, special=False) for text in probes.texts],
        "rendered": conversations,
        "rendered_ids": [ids(text, special=False) for text in conversations],
        "bos": tokenizer.bos_token if tokenizer.bos_token_id in ids("", special=True) else "",
        "with_tools": [index for index, chat in enumerate(probes.chats) if "tools" in conversation(chat)],
        **_by_design(tokenizer, asked),
        "genai": genai_differences(folder, asked, ordinary),
    }


def _by_design(tokenizer: Any, asked: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    reasons = {kind: [shows_the_difference(raw, text) for text in texts] for kind, texts in asked.items()}
    near = nearest_name(raw)
    if near is None and not any(reason for found in reasons.values() for reason in found):
        return {"by_design": {}, "by_permission": {}}
    reader, cuts = LlamaCppReading(raw), f"words are cut as llama.cpp's {near} cuts them, which was accepted"

    def answers(kind: str, reasons: Sequence[str | None]) -> dict[int, tuple[list[int], str]]:
        return {
            index: (reader.ids(asked[kind][index], special=kind == "texts"), reason)
            for index, reason in enumerate(reasons)
            if reason
        }

    return {
        "by_design": {kind: answers(kind, found) for kind, found in reasons.items()},
        "by_permission": {kind: answers(kind, [near and cuts] * len(texts)) for kind, texts in asked.items()},
    }
