"""The probe set: the user's own prompts and fixed edge cases, the same for every runtime and for a given seed.

Every position of every sequence is compared, never only the last token of one prompt.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.protocol import Chat, conversation

from qalora_export.data.prompts import canonical_json, prompt_text, read_prompts, token_ids
from qalora_export.errors import InputError
from qalora_export.models.families import family_of
from qalora_export.models.families.family import Format
from qalora_export.models.templates import TemplateRefusal
from qalora_export.recipe import VerifySettings
from qalora_export.safety import sha256_bytes
from qalora_export.verify.probes.text import CHATS, EDGE_TEXTS, LONG_TEXT, PLAIN_TEXTS, TEXTS, TOOL_CHATS

TOKENS_PER_TEXT = 1000
OWN_TEXTS, OWN_CHARACTERS = 64, 4000  # of the user's prompts
LONG, PROMPT = "near max_length", "prompt "
TEXT_NAMES = {LONG, *EDGE_TEXTS}


@dataclass(frozen=True)
class ProbeSet:
    """ids int32 (total,): all sequences one after the other; lengths int32 (n,); names: what each sequence is for.

    texts, chats: what gate G5 asks every tokenizer; ordinary: those texts on which a difference is never by design.
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    names: tuple[str, ...]
    texts: tuple[str, ...] = TEXTS
    chats: tuple[Chat, ...] = CHATS
    ordinary: frozenset[str] = frozenset(PLAIN_TEXTS)

    @property
    def sha256(self) -> str:
        """Identity of the probe: ids, lengths, texts and chats."""
        return sha256_bytes(self.ids, self.lengths, self.text_job())

    @property
    def ids_sha256(self) -> str:
        """Identity of the sequences alone: what logits depend on."""
        return sha256_bytes(self.ids, self.lengths)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Index of each sequence's first position, int64 (n,)."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    @property
    def text(self) -> NDArray[np.bool_]:
        """Which positions are of texts that somebody might write, bool (total,): of no random or repeated ids."""
        chosen = [name in TEXT_NAMES or name.startswith(PROMPT) for name in self.names]
        return np.repeat(np.asarray(chosen, bool), self.lengths)

    def sequences(self) -> Iterator[NDArray[np.int32]]:
        return (self.ids[s : s + n] for s, n in zip(self.starts, self.lengths, strict=True))

    def some(self, chosen: Sequence[int]) -> ProbeSet:
        """Those sequences alone, without texts and chats."""
        parts = list(self.sequences())
        names = tuple(self.names[index] for index in chosen)
        return ProbeSet(np.concatenate([parts[i] for i in chosen]), self.lengths[list(chosen)], names)

    def text_job(self) -> bytes:
        """Gate G5's questions as the JSON a runner reads."""
        return canonical_json({"texts": list(self.texts), "chats": list(self.chats)})

    def place(self, position: int) -> str:
        """Human-readable place of a position: sequence name and index inside it."""
        sequence = int(np.searchsorted(self.starts, position, side="right")) - 1
        return f"{self.names[sequence]}[{position - int(self.starts[sequence])}]"


def rendered(tokenizer: Any, chat: Chat, *, generation_prompt: bool = True) -> str:
    """A conversation by the checkpoint's own template, the generation prompt behind it unless told otherwise."""
    parts = conversation(chat)
    options = {"tools": parts.get("tools"), "tokenize": False, "add_generation_prompt": generation_prompt}
    return str(tokenizer.apply_chat_template(parts["messages"], **options))


def make_probes(
    tokenizer: Any, config: dict[str, Any], settings: VerifySettings, *, formats: Collection[Format] = ()
) -> ProbeSet:
    """At least settings.sequences sequences and settings.positions positions, deterministic for a seed.

    formats: of the artifacts; no sequence fills the context that one of them has (models.families.Bound). Raises
    InputError when the model's context cannot hold the probe set's shortest useful sequence.
    """
    vocabulary = int(config["vocab_size"])
    bounds = [bound for fmt in formats if (bound := family_of(config).bound(config, fmt)) is not None]
    # One position stays free: llama.cpp asks for one more than it answers, and takes other RoPE factors past a bound.
    within = (bound.positions - 1 for bound in bounds)
    limit = min(settings.max_length, int(config.get("max_position_embeddings", settings.max_length)), *within)
    if limit < 8:
        raise InputError(
            f"probe sequences of {limit} tokens are too short",
            where="verify.max_length",
            fix="set max_length to 8 or more",
        )
    chosen = list(_edge_cases(tokenizer, vocabulary, limit, settings.seed))
    stream = _fill(tokenizer, vocabulary, limit, settings)
    while len(chosen) < settings.sequences or sum(len(ids) for _, ids in chosen) < settings.positions:
        chosen.append(next(stream))
    sequences = [np.asarray(ids, np.int32) for _, ids in chosen]
    lengths = np.asarray([len(ids) for ids in sequences], np.int32)
    own = tuple(_own_texts(tokenizer, settings))
    return ProbeSet(
        np.concatenate(sequences),
        lengths,
        tuple(name for name, _ in chosen),
        texts=(*TEXTS, *own, *_added_token_texts(tokenizer), *_vocabulary_texts(tokenizer)),
        chats=_chats(tokenizer),
        ordinary=frozenset((*PLAIN_TEXTS, *own)),
    )


def _own_texts(tokenizer: Any, settings: VerifySettings) -> Iterator[str]:
    """The first of the user's own prompts as text: conversations as rendered. NUL has no place in C strings."""
    prompts = read_prompts(Path(settings.prompts)) if settings.prompts else []
    for prompt in prompts[:OWN_TEXTS]:
        text = prompt_text(tokenizer, prompt)[:OWN_CHARACTERS]
        if text and text not in TEXTS and "\0" not in text and _is_unicode(text):
            yield text


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _chats(tokenizer: Any) -> tuple[Chat, ...]:
    """The conversations that the chat template accepts (Gemma's wants no system turn), all if it accepts none.

    Those with tools are for a template that knows of tools.
    """
    if not tokenizer.chat_template:
        return ()
    knows_tools = re.search(r"\btools\b", tokenizer.get_chat_template(tools=[{}]))
    asked: tuple[Chat, ...] = (*CHATS, *TOOL_CHATS) if knows_tools else CHATS
    return tuple(chat for chat in asked if _accepted(tokenizer, chat)) or asked


def _accepted(tokenizer: Any, chat: Chat) -> bool:
    try:
        rendered(tokenizer, chat)
    except TemplateRefusal:
        return False
    return True


def _added_token_texts(tokenizer: Any) -> Iterator[str]:
    """Every added token inside a word, between spaces and doubled: what a tokenizer strips around it shows."""
    added = [text for text in tokenizer.get_added_vocab() if "\0" not in text]
    for start in range(0, len(added), TOKENS_PER_TEXT // 4):
        yield "".join(f"a{text}b {text} c{text}{text}\n" for text in added[start : start + TOKENS_PER_TEXT // 4])


def _vocabulary_texts(tokenizer: Any) -> Iterator[str]:
    """Every token's own text, alone and doubled, a line each: a lost merge rule shows in one of them.

    Doubled because many tokenizers look a whole word up before they apply any rule. Tokens that are no whole
    characters, and NUL, which C strings cannot hold, are left out. Lines that NFC would change come last, so that a
    runtime that does not normalize differs in their texts alone.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    ids = [[i] for i in range(len(tokenizer)) if i not in special]
    lines = [
        (text, text + text.lstrip())
        for text in tokenizer.batch_decode(ids)
        if text and "\ufffd" not in text and "\0" not in text
    ]
    for normalized in (True, False):
        same = [pair for pair in lines if all(map(_is_normalized, pair)) == normalized]
        for start in range(0, len(same), TOKENS_PER_TEXT):
            alone, doubled = zip(*same[start : start + TOKENS_PER_TEXT], strict=True)
            yield "\n".join([*alone, *doubled])


def _is_normalized(text: str) -> bool:
    return unicodedata.is_normalized("NFC", text)


def _edge_cases(tokenizer: Any, vocabulary: int, limit: int, seed: int) -> Iterator[tuple[str, list[int]]]:
    """Sequences that broke real exports: cut to the limit, empty ones left out (a tokenizer may have no BOS)."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    random = np.random.default_rng(seed)
    specials = [i for i in sorted(set(tokenizer.all_special_ids)) if i < vocabulary]
    letter = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    cases = {
        "single BOS": start,
        "one token": letter,
        "one token repeated": start + letter * 24,
        "BOS repeated": start * 5,
        "special tokens": specials,
        "vocabulary ends": [0, 1, 2, vocabulary - 3, vocabulary - 2, vocabulary - 1],
        "random ids": random.integers(0, vocabulary, 48).tolist(),
        LONG: token_ids(tokenizer, LONG_TEXT * (1 + limit // 64)),
        **{name: token_ids(tokenizer, text) for name, text in EDGE_TEXTS.items()},
    }
    for name, ids in cases.items():
        if ids:
            yield name, [int(i) for i in ids[:limit]]


def _fill(tokenizer: Any, vocabulary: int, limit: int, settings: VerifySettings) -> Iterator[tuple[str, list[int]]]:
    """The user's prompts in an order drawn from the seed, each once; then random ids, without end."""
    random = np.random.default_rng(settings.seed + 1)
    prompts = read_prompts(Path(settings.prompts)) if settings.prompts else []
    for index in random.permutation(len(prompts)):
        if ids := token_ids(tokenizer, prompts[index])[:limit]:
            yield f"{PROMPT}{index + 1}", ids
    number = 0
    while True:
        number += 1
        yield f"random {number}", random.integers(0, vocabulary, min(limit, 48)).tolist()
