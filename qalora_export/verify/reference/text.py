"""What Hugging Face's tokenizer answers to the texts and conversations of the probe set: the judge of gate G5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qalora_export.models.loading import load_tokenizer
from qalora_export.verify.probes.probe_set import ProbeSet


def folder_answers(folder: Path, probes: ProbeSet) -> dict[str, Any]:
    """Answers by the tokenizer files in `folder`.

    texts: ids of each text, special tokens added as for a prompt; plain_texts: nothing added; rendered: each
    conversation as a string that ends with the generation prompt; rendered_ids: its ids, nothing added; bos: BOS text.
    """
    tokenizer = load_tokenizer(folder)
    rendered = [
        tokenizer.apply_chat_template([dict(turn) for turn in chat], tokenize=False, add_generation_prompt=True)
        for chat in probes.chats
    ]

    def ids(text: str, *, special: bool) -> list[int]:
        return [int(i) for i in tokenizer(text, add_special_tokens=special)["input_ids"]]

    return {
        "texts": [ids(text, special=True) for text in probes.texts],
        "plain_texts": [ids(text, special=False) for text in probes.texts],
        "rendered": rendered,
        "rendered_ids": [ids(text, special=False) for text in rendered],
        "bos": tokenizer.bos_token or "",
    }
