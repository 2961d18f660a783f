"""Special token ids, and whether BOS and EOS are added, read from what the tokenizer really does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_export.errors import InputError
from qalora_export.formats.gguf.tokenizer.token_types import ENDS
from qalora_export.safety import inside, read_json


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids or None; add_bos and add_eos: what the post-processor puts around a text."""

    bos: int | None
    eos: int | None
    eot: int | None
    eom: int | None
    pad: int | None
    unk: int | None
    add_bos: bool
    add_eos: bool


def special_tokens(
    folder: Path, raw: Mapping[str, Any], settings: Mapping[str, Any], ids: Mapping[str, int]
) -> SpecialTokens:
    """raw: tokenizer.json; settings: tokenizer_config.json; ids: token text -> id. Raises InputError on contradictions.

    eot and eom are the first end-of-generation ids of generation_config.json beside eos: chat models end a turn with
    them. Whether BOS and EOS are added is what the post-processor does; `add_bos_token` in tokenizer_config.json is not
    asked, for Transformers does not ask it either where there is a tokenizer.json.
    """
    mapped = (
        read_json(inside(folder, "special_tokens_map.json")) if (folder / "special_tokens_map.json").exists() else {}
    )
    named = {
        role: _id_of(role, settings.get(role, mapped.get(role)), ids)
        for role in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    before, after = added_around(raw.get("post_processor"))
    for role, found, allowed in (("bos_token", before, "start"), ("eos_token", after, "end")):
        if found and found != [named[role]]:
            raise InputError(
                f"the post-processor puts tokens {found} at the {allowed}, {role} is {named[role]}",
                where="tokenizer.json: post_processor",
                why=f"llama.cpp can add exactly one {role} there",
            )
    more = [index for index in dict.fromkeys(_generation_ends(folder)) if index != named["eos_token"]]
    texts = {index: text for text, index in ids.items()}
    unwritten = [texts.get(index) for index in more[2:] if texts.get(index) not in ENDS]
    if unwritten:
        raise InputError(
            f"generation ends at {len(more) + 1} tokens",
            where=f"{folder}/generation_config.json: eos_token_id",
            why=f"GGUF has a place for three, and llama.cpp does not know {unwritten[0]!r} as an end by its text",
        )
    eot, eom = (*more, None, None)[:2]
    return SpecialTokens(
        bos=named["bos_token"],
        eos=named["eos_token"],
        eot=eot,
        eom=eom,
        pad=named["pad_token"],
        unk=named["unk_token"],
        add_bos=bool(before),
        add_eos=bool(after),
    )


def added_around(processor: Any) -> tuple[list[int], list[int]]:
    """(ids put before a single text, ids put after it). Raises InputError for processors that do anything else."""
    before: list[int] = []
    after: list[int] = []
    for step in _processors(processor):
        if step.get("type") == "ByteLevel":  # adjusts offsets only, never ids
            continue
        if step.get("type") != "TemplateProcessing":
            raise InputError(
                f"post-processor {step.get('type')!r} is not supported", where="tokenizer.json: post_processor"
            )
        target = before
        for piece in step["single"]:
            if "Sequence" in piece:
                target = after
            else:
                target += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return before, after


def _processors(processor: Any) -> list[Mapping[str, Any]]:
    if processor is None:
        return []
    if processor.get("type") == "Sequence":
        return list(processor["processors"])
    return [processor]


def _id_of(role: str, token: Any, ids: Mapping[str, int]) -> int | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    if text is None:
        return None
    if text not in ids:
        raise InputError(f"{role} {text!r} is not in the vocabulary", where="tokenizer_config.json")
    return ids[text]


def _generation_ends(folder: Path) -> list[int]:
    if not (folder / "generation_config.json").exists():
        return []
    ends = read_json(inside(folder, "generation_config.json")).get("eos_token_id")
    return [ends] if isinstance(ends, int) else list(ends or [])
