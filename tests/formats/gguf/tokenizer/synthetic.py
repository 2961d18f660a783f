"""Small tokenizers of every form, trained here, and GGUF files that hold a vocabulary and nothing else."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

from qalora_export.formats.gguf.metadata import Entry
from qalora_export.formats.gguf.tokenizer.pretokenizer import byte_level_json
from tests.formats.gguf.tokenizer.corpus import CORPUS

SPECIAL = ("<unk>", "<s>", "</s>")
CHAT = ("<|user|>", "<|end|>")


def byte_level(splits: tuple[str, ...], *, ignore_merges: bool = False, size: int = 900) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE with these splitting expressions."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = _pre_tokenizer(byte_level_json(splits))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    trained.add_special_tokens([*SPECIAL[1:], *CHAT])
    raw: dict[str, Any] = json.loads(trained.to_str())
    raw["model"]["ignore_merges"] = ignore_merges
    return raw


def sentencepiece(
    *, normalizer: Any = None, pre_tokenizer: Any = None, size: int = 1200, lines_apart: bool = False
) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece-like BPE: words begin with ▁, unknown characters fall back to bytes.

    lines_apart: no token holds a line feed and something else, as in Gemma's, nor more than 16 characters.
    Its rules are ranked as Transformers ranks those of a real SentencePiece model: all ways to a token together.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    if lines_apart:
        lines = pre_tokenizers.Split(Regex("\\n+"), "isolated")
        trained.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(prepend_scheme="first")])
    first = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = [text for text in CORPUS if "\0" not in text]  # llama.cpp reads tokens as C strings
    longest = {"max_token_length": 16} if lines_apart else {}
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=first, show_progress=False, **longest)
    )
    learned = json.loads(trained.to_str())
    raw: dict[str, Any] = json.loads(
        Tokenizer(
            models.BPE(vocab={"<unk>": 0}, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        ).to_str()
    )
    vocab = learned["model"]["vocab"]
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(learned["model"]["merges"])))}
    pairs = [
        (rank, -cut, text[:cut], text[cut:])
        for text, rank in ranks.items()
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    raw["model"] |= {"vocab": vocab, "merges": [[left, right] for *_, left, right in sorted(pairs)]}
    raw["normalizer"] = normalizer
    raw["pre_tokenizer"] = pre_tokenizer
    raw["added_tokens"] = [_added(index, text) for index, text in enumerate(SPECIAL)]
    return with_tokens(raw, CHAT)


def unigram(*, size: int = 400) -> dict[str, Any]:
    """tokenizer.json of a unigram model over words that begin with ▁: their most frequent pieces, no two scores alike.

    Not trained: the trainer's scores differ from run to run.
    """
    words = [f"▁{word}" for text in CORPUS if text.isascii() and text.isprintable() for word in text.split()]
    spans = [(word, at, n) for word in words for at in range(len(word)) for n in range(1, min(7, len(word) - at + 1))]
    count = Counter(word[at : at + n] for word, at, n in spans)
    singles = sorted({character for word in words for character in word})
    pieces = [text for text, _ in count.most_common() if len(text) > 1 and text not in SPECIAL][
        : size - len(singles) - len(SPECIAL)
    ]
    scored = [[text, -math.sqrt(rank + 2)] for rank, text in enumerate([*pieces, *singles])]
    vocab = [[text, 0.0] for text in SPECIAL] + scored
    raw: dict[str, Any] = json.loads(Tokenizer(models.Unigram([("<unk>", 0.0)], unk_id=0)).to_str())
    raw["model"] |= {"vocab": vocab, "unk_id": 0}
    raw["added_tokens"] = [_added(index, text) for index, text in enumerate(SPECIAL)]
    return raw


def with_tokens(raw: dict[str, Any], texts: Iterable[str], *, special: bool = True) -> dict[str, Any]:
    """The same tokenizer.json with added tokens behind its vocabulary."""
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in texts])
    grown: dict[str, Any] = json.loads(tokenizer.to_str())
    return grown


def with_bos(raw: dict[str, Any], text: str) -> dict[str, Any]:
    """The same tokenizer.json with `text` put before every prompt."""
    index = Tokenizer.from_str(json.dumps(raw)).token_to_id(text)
    mark, body = {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [mark, body, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {text: {"id": text, "ids": [index], "tokens": [text]}}
    return raw | {
        "post_processor": {"type": "TemplateProcessing", "single": [mark, body], "pair": pair, "special_tokens": tokens}
    }


def write_vocabulary(path: Path, entries: Iterable[Entry] | Mapping[str, Any], *, name: str = "vocabulary") -> Path:
    """A GGUF file without tensors. entries: typed, or key → value with the type of the Python value."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    if isinstance(entries, Mapping):
        entries = [Entry(key, _kind(value), value) for key, value in entries.items()]
    for entry in entries:
        getattr(writer, f"add_{entry.kind}")(entry.key, entry.value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def hugging_face_ids(raw: Mapping[str, Any], texts: Iterable[str], *, special: bool = True) -> list[list[int]]:
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=special)]


def _kind(value: Any) -> str:
    return {str: "string", bool: "bool", int: "uint32", float: "float32", list: "array"}[type(value)]


def _added(index: int, text: str) -> dict[str, Any]:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **off, "special": True}


def _pre_tokenizer(raw: dict[str, Any]) -> Any:
    """The object that this JSON stands for; tokenizers builds one only inside a whole tokenizer."""
    shell = json.loads(Tokenizer(models.BPE()).to_str()) | {"pre_tokenizer": raw}
    return Tokenizer.from_str(json.dumps(shell)).pre_tokenizer
