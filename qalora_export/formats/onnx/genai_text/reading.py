"""A tokenizer as ONNX Runtime GenAI reads it: the ids that its own implementation gives, predicted.

GenAI does not run tokenizer.json, it has a tokenizer of its own that takes vocabulary, merges, added tokens and parts
of the rest from it (onnxruntime-extensions, operators/tokenizer/bpe_*). What it leaves out:

* normalizers: no NFC; of SentencePiece's, a ▁ before a text where the decoder strips one, and ▁ for every space;
* regular expressions (words.py);
* word order in SentencePiece models: it joins tokens inside stretches that end at the first white space behind ten
  symbols, and after a hundred and one in any case; its rules are applied to all places at once, best rule first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from qalora_export.formats.gguf.tokenizer.alphabet import byte_alphabet
from qalora_export.formats.onnx.genai_text.words import GPT2, LLAMA, Matcher, NotPredictableError, cut, matchers

STRIPPED = " \n\r\t"  # around added tokens that strip
STRETCH_ENDS = " \n\r▁"
LEAST, MOST = 10, 100  # symbols of a stretch


class GenaiReading:
    """ids() as GenAI's Tokenizer.encode gives them, without BOS and EOS.

    spaces: whether ▁ stands for a space. normalizes: whether tokenizer.json asks for NFC, which GenAI ignores.

    Raises NotPredictableError where GenAI takes a way that is not modelled (std::regex, unigram models).
    """

    def __init__(self, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """tokenizer: parsed tokenizer.json that GenAI is given; settings: tokenizer_config.json, overrides applied."""
        model = tokenizer.get("model", {})
        if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") or "vocab" not in model:
            raise NotPredictableError(f"GenAI's way with {model.get('type')} models is not modelled")
        self._name = str(settings.get("tokenizer_class", "")).partition("Tokenizer")[0].partition("Backend")[0]
        self.spaces, self._prefix = _decoder_habits(tokenizer.get("decoder"))
        self.normalizes = '"NFC"' in json.dumps(tokenizer.get("normalizer"))
        self._vocab: dict[str, int] = dict(model["vocab"])
        self._bytes = [self._vocab.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
        self._alphabet = byte_alphabet()
        self._ranks = self._rules(model["merges"])
        self._added = _added_tokens(tokenizer, settings)
        self._trie = _trie(self._added)
        self._steps, self._whole, self._by_string = self._pre_tokenizer(tokenizer.get("pre_tokenizer"))
        self._cache: dict[tuple[int, ...], list[int]] = {}

    def ids(self, text: str) -> list[int]:
        found: list[int] = []
        for part, index in self._parts(text):
            if index is not None:
                found.append(index)
            elif part:
                found += self._joined_spaces(part) if self.spaces else self._byte_level(part)
        return found

    def lacks(self, text: str) -> bool:
        """Whether a byte of the text has no token in a byte-level vocabulary; GenAI gives it the id -1."""
        return not self.spaces and any(self._alphabet[byte] not in self._vocab for byte in text.encode("utf-8"))

    def _rules(self, merges: list[Any]) -> dict[tuple[int, int], tuple[int, int]]:
        """(left, right) -> (rank, joined), by ids, where an unknown text has id -1. Rules as strings lose a \\r."""
        ranks = {}
        for rank, rule in enumerate(merges):
            left, right = rule.replace("\r", "").split(" ", 1) if isinstance(rule, str) else rule
            ranks[self._id(left), self._id(right)] = rank, self._id(left + right)
        return ranks

    def _id(self, text: str) -> int:
        """Where spaces are ▁, a text of one raw byte is the byte's token, when nothing else is."""
        index = self._vocab.get(text, -1)
        if index < 0 and self.spaces and len(text) == 1 and text.isascii():
            return self._bytes[ord(text)]
        return index

    def _pre_tokenizer(self, raw: Any) -> tuple[list[list[Matcher]], list[Matcher], bool]:
        """Steps of a sequence, or the one expression; and whether it cuts at a fixed string: GenAI does not."""
        steps: list[list[Matcher]] = []
        if isinstance(raw, Mapping) and raw.get("type") == "Split":
            regex = raw["pattern"].get("Regex")
            return [], matchers(regex) if regex else self._default(), not regex
        for part in raw.get("pretokenizers") or [] if isinstance(raw, Mapping) else []:
            if part["type"] == "Split":
                if "Regex" not in part["pattern"]:
                    break
                steps.append(matchers(_escaped(part["pattern"]["Regex"])))
        return steps, [] if steps else self._default(), False

    def _default(self) -> list[Matcher]:
        return matchers(LLAMA if self.spaces or self._name == "Llama" else GPT2)

    def _parts(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Added tokens and what lies between; behind a token that strips to its right, white space is gone."""
        strip = False
        for part, index in _split_by(self._trie, text):
            if index is None and strip:
                part = part.lstrip(STRIPPED)
            yield part, index
            strip = index is not None and bool(self._added[part].get("rstrip"))

    def _byte_level(self, text: str) -> Iterator[int]:
        words = [text]
        for step in self._steps:
            words = [word for chunk in words for word in cut(chunk, step, isolated=True)]
        for word in words if self._steps else cut(text, self._whole, isolated=False):
            spelled = "".join(self._alphabet[byte] for byte in word.encode("utf-8", "surrogatepass"))
            whole = self._vocab.get(spelled)
            if whole is not None:
                yield whole
            else:
                yield from self._merged(self._vocab.get(character, -1) for character in spelled)

    def _joined_spaces(self, text: str) -> Iterator[int]:
        leading = self._prefix and not self._by_string and text.startswith(" ")
        text = "▁" * (self._prefix and not self._by_string) + text
        if self._name == "Gemma" or leading or self._by_string:
            yield from self._stretches(text)
            return
        for word in cut(text, self._whole, isolated=False):
            word = word.replace(" ", "▁")
            whole = self._vocab.get(word)
            yield from [whole] if whole is not None else self._merged(i for c in word for i in self._symbols(c))

    def _stretches(self, text: str) -> Iterator[int]:
        symbols: list[int] = []
        for at, character in enumerate(text):
            word_begins = at and text[at - 1] not in STRETCH_ENDS and character in STRETCH_ENDS
            if len(symbols) > MOST or (len(symbols) > LEAST and word_begins):
                yield from self._merged(symbols)
                symbols = []
            symbols += self._symbols("▁" if character == " " else character)
        yield from self._merged(symbols)

    def _symbols(self, character: str) -> list[int]:
        """A character's id, or those of its bytes."""
        index = self._id(character)
        return [index] if index >= 0 else [self._bytes[byte] for byte in character.encode("utf-8", "surrogatepass")]

    def _merged(self, symbols: Iterator[int] | list[int]) -> list[int]:
        """Byte-pair encoding as GenAI does it: the best pair, at all its places from the first one on, then again."""
        key = tuple(symbols)
        if key not in self._cache:
            self._cache[key] = self._merge(list(key))
        return self._cache[key]

    def _merge(self, ids: list[int]) -> list[int]:
        while len(ids) > 1:
            pairs = {pair: self._ranks[pair] for pair in pairwise(ids) if pair in self._ranks}
            if not pairs:
                break
            pair = min(pairs, key=lambda pair: pairs[pair][0])
            ids = _replaced(ids, pair, pairs[pair][1])
        return ids


def _replaced(ids: list[int], pair: tuple[int, int], joined: int) -> list[int]:
    """Every occurrence joined, from left to right; what was joined may be the left side of the next one."""
    out: list[int] = []
    at = 0
    current = ids[0]
    while at < len(ids):
        if at + 1 < len(ids) and (current, ids[at + 1]) == pair:
            current = joined
            at += 1
            continue
        out.append(current)
        at += 1
        current = ids[at] if at < len(ids) else -1
    return out


def _decoder_habits(decoder: Any) -> tuple[bool, bool]:
    """Whether spaces are ▁, and whether one goes before each text: GenAI takes both from the decoder's steps."""
    spaces = prefix = False
    for step in (decoder or {}).get("decoders") or []:
        match step:
            case {"type": "Replace", "pattern": {"String": "▁"}}:
                spaces = True
            case {"type": "Metaspace"}:
                spaces |= step.get("replacement") == "▁"
                prefix |= bool(step.get("add_prefix_space", False))
            case {"type": "Strip", "content": " "}:
                prefix = True
    return spaces, prefix


def _added_tokens(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Text -> added token, those of tokenizer.json first, then the ones that only tokenizer_config.json has."""
    found: dict[str, Mapping[str, Any]] = {}
    for item in tokenizer.get("added_tokens") or []:
        found.setdefault(item["content"], item)
    declared = settings.get("added_tokens_decoder") or {}
    if not isinstance(declared, Mapping):
        raise NotPredictableError("added_tokens_decoder of tokenizer_config.json is no table")
    for index, item in declared.items():
        if not isinstance(item, Mapping) or not str(index).isdecimal():
            raise NotPredictableError(f"added_tokens_decoder has an odd entry {str(index)[:20]!r}")
        found.setdefault(str(item.get("content", "")), {**item, "id": int(index)})
    return found


def _escaped(regex: str) -> str:
    for character, spelled in {"\r": r"\r", "\n": r"\n", "\t": r"\t", "\f": r"\f", "\v": r"\v"}.items():
        regex = regex.replace(character, spelled)
    return regex


_Trie = dict[str, Any]
_END = ""


def _trie(added: Mapping[str, Mapping[str, Any]]) -> _Trie:
    root: _Trie = {}
    for text, item in added.items():
        node = root
        for character in text:
            node = node.setdefault(character, {})
        node[_END] = int(item["id"])
    return root


def _split_by(trie: _Trie, text: str) -> Iterator[tuple[str, int | None]]:
    """The longest added token at each place, as GenAI looks for it: a failed start costs what it had matched."""
    begin = at = 0
    while at < len(text):
        node, start, end, index = trie, at, at, None
        while at < len(text) and text[at] in node:
            node = node[text[at]]
            at += 1
            if _END in node:
                index, end = node[_END], at
        if index is None:
            at += 1
            if at >= len(text):
                break
            at -= at - 1 - start
            continue
        if start > begin:
            yield text[begin:start], None
        yield text[start:end], index
        begin = at = end
    if begin < len(text):
        yield text[begin:], None
