"""Special token ids, and whether BOS and EOS are added, read from what the tokenizer really does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_export.errors import InputError
from qalora_export.formats.gguf.tokenizer.token_types import ENDS, FILL_IN, effective_ends
from qalora_export.safety import inside, read_json

PLACES = ("eot_token_id", "eom_token_id")
SPARE_PLACES = ("fim_pad_token_id", "fim_sep_token_id", "fim_rep_token_id")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids or None; add_bos and add_eos: what the post-processor puts around a text.

    other_ends: key of GGUF -> id of an end token beside eos.
    """

    bos: int | None
    eos: int | None
    other_ends: Mapping[str, int]
    pad: int | None
    unk: int | None
    add_bos: bool
    add_eos: bool


def special_tokens(
    folder: Path, raw: Mapping[str, Any], settings: Mapping[str, Any], ids: Mapping[str, int], ends: Sequence[int]
) -> SpecialTokens:
    """raw: tokenizer.json; settings: tokenizer_config.json; ids: token text -> id; ends: that end generation.

    Raises InputError on contradictions. Whether BOS and EOS are added is what the post-processor does; `add_bos_token`
    in tokenizer_config.json is not asked, for Transformers does not ask it either where there is a tokenizer.json.
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
    return SpecialTokens(
        bos=named["bos_token"],
        eos=named["eos_token"],
        other_ends=_other_ends(folder, named["eos_token"], ids, ends),
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


def _other_ends(folder: Path, eos: int | None, ids: Mapping[str, int], ends: Sequence[int]) -> dict[str, int]:
    """Places of GGUF for the end tokens beside eos. Raises InputError when there are not enough.

    llama.cpp ends generation at its eos, eot and eom, at tokens with the texts of ENDS, and at the padding, repository
    and file marks of fill-in-the-middle prompts: a vocabulary without such prompts has three places more there. Those
    that llama.cpp does not know by their text come first.
    """
    texts = {index: text for text, index in ids.items()}
    known = effective_ends(list(ids)) & ENDS
    more = [index for index in dict.fromkeys(ends) if index != eos]
    more.sort(key=lambda index: texts.get(index) in known)
    places = [*PLACES, *(() if FILL_IN & ids.keys() else SPARE_PLACES)]
    unwritten = [texts.get(index, index) for index in more[len(places) :] if texts.get(index) not in known]
    if unwritten:
        raise InputError(
            f"generation ends at {len(more) + 1} tokens",
            where=f"{folder}: eos_token_id of generation_config.json or config.json",
            why=f"GGUF has {1 + len(places)} places for them, and llama.cpp does not know {unwritten[0]!r} by its text",
        )
    return dict(zip(places, more, strict=False))
