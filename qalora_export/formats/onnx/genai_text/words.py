r"""How ONNX Runtime GenAI cuts text into words: not by a regular expression, by hand-written matchers for some of them.

onnxruntime-extensions (operators/tokenizer/bpe_utils.hpp, PreTokenizerWithRegEx) looks for known alternatives in the
expression of tokenizer.json, takes them out, and tries their matchers in the order in which the alternatives stand
there. The matchers never step back, so `\s*[\r\n]+` does not find the line end in "  \n  x", and `[\r\n/]*` is taken
for `[\r\n]*`. What is left of an expression goes to std::regex over bytes, which is refused here.

Each matcher is given as a Python expression without a way back (possessive quantifiers), over the text's classes:

    U Lu, Lt · l Ll · o Lm, Lo · m M* · d N* · n \r, \n · space · z other white space · p P* · s S* · c the rest
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from qalora_export.formats.onnx.genai_text.unicode13 import category

CLASS = {"Lu": "U", "Lt": "U", "Ll": "l", "Lm": "o", "Lo": "o", "L": "o", "M": "m", "N": "d", "Z": "z"}
CLASS |= {"P": "p", "S": "s"}
LINE_ENDS, OTHER_SPACES = "\r\n", "\t\f\v"


class NotPredictableError(Exception):
    """This tokenizer takes a way through GenAI that is not modelled; the message says which."""


class Matcher(NamedTuple):
    """pattern: of a word at a position. by_class: over the classes, not the text. ending: over the text, behind it."""

    pattern: re.Pattern[str]
    by_class: bool = True
    ending: re.Pattern[str] | None = None


def _by_class(pattern: str, *, ending: re.Pattern[str] | None = None) -> Matcher:
    return Matcher(re.compile(pattern), ending=ending)


_SUFFIX = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_SUFFIXES = re.compile(_SUFFIX)
_LEAD = "(?>[^ndUlo]?)"
_CASED_1 = _LEAD + r"(?:[Uom]++\Z|[Uom]*+[lom]++|[Uom]++(?<=[om]))"
_CASED_2 = _LEAD + r"[Uom]++[lom]*+"
_SYMBOLS = _by_class(" ?[mpsc]++n*+")
_CONTRACTIONS = Matcher(_SUFFIXES, by_class=False)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"

# Alternative of an expression -> its matcher, in the order in which they are looked for.
KNOWN: dict[str, Matcher] = {
    f"{_BEFORE}{_UPPER}*{_LOWER}+{_ANY_CASE}?": _by_class(_CASED_1, ending=_SUFFIXES),
    f"{_BEFORE}{_UPPER}+{_LOWER}*{_ANY_CASE}?": _by_class(_CASED_2, ending=_SUFFIXES),
    f"{_BEFORE}{_UPPER}*{_LOWER}+": _by_class(_CASED_1),
    f"{_BEFORE}{_UPPER}+{_LOWER}*": _by_class(_CASED_2),
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": _CONTRACTIONS,
    _ANY_CASE: _CONTRACTIONS,
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*": _SYMBOLS,
    r" ?[^\s\p{L}\p{N}]+[\r\n]*": _SYMBOLS,
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+": _by_class("[Ulom]++|[^ndUlom][Ulom]++"),
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*": _by_class(" ?[psc]++n*+"),
    r"[^\r\n\p{L}\p{N}]?\p{L}+": _by_class("[Ulo]++|[^ndUlo][Ulo]++"),
    "'s|'t|'re|'ve|'m|'ll|'d": Matcher(re.compile("'(?:[stmd]|re|ve|ll)"), by_class=False),
    r" ?[^\s\p{L}\p{N}]+": _by_class(" ?[mpsc]++"),
    r" ?\p{L}+| ?\p{N}+": _by_class(" ?[Ulo]++| ?d++"),
    r"[\p{L}]+|[\p{N}]": _by_class("[Ulo]++|d"),
    r"[^\s\p{L}\p{N}]+": _by_class("[mpsc]++"),
    r"\s+(?!\S)|\s+": _by_class(r"[nz ]++\Z|[nz ]+(?=[nz ])|[nz ]"),
    r"\p{N}{1,3}": _by_class("d{1,3}+"),
    r"\s*[\r\n]+": _by_class("[nz ]{2,}+(?<=n)|n++"),
    r"\p{N}": _by_class("d"),
    "[一-龥぀-ゟ゠-ヿ]+": Matcher(re.compile("[一-龥぀-ゟ゠-ヿ]++"), by_class=False),
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""": Matcher(
        re.compile(r"[!-/:-@\[-`{-~][A-Za-z]++"), by_class=False
    ),
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+": _by_class("(?>[^nUlops]?)[Ulom]++"),
    r" ?[\p{P}\p{S}]+[\r\n]*": _by_class(" ?[ps]++n*+"),
}
LLAMA = _ANY_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def matchers(expression: str) -> list[Matcher]:
    """The matchers that GenAI finds in an expression, in the order in which it tries them.

    Raises NotPredictableError when something is left of it.
    """
    rest, found = expression, {}
    for alternative, matcher in KNOWN.items():
        at = rest.find(alternative)
        end = at + len(alternative)
        if at < 0 or (at > 0 and rest[at - 1] != "|") or (end < len(rest) and rest[end] != "|"):
            continue
        found[expression.find(alternative)] = matcher
        rest = rest[:at].removesuffix("|") + rest[end:] if at else rest[end + 1 :]
    if rest:
        raise NotPredictableError(f"GenAI has no matcher for {rest[:60]!r}")
    return [found[place] for place in sorted(found)]


def cut(text: str, found: list[Matcher], *, isolated: bool) -> Iterator[str]:
    """The words of a text. isolated: characters that nothing matches stay together, else each is a word."""
    classes, at, kept = _classes(text), 0, ""
    while at < len(text):
        word = _word(text, classes, at, found)
        at += len(word) or 1
        if not word and isolated:
            kept += text[at - 1]
            continue
        if kept:
            yield kept
            kept = ""
        yield word or text[at - 1]
    if kept:
        yield kept


def _word(text: str, classes: str, at: int, found: list[Matcher]) -> str:
    for matcher in found:
        match = matcher.pattern.match(classes if matcher.by_class else text, at)
        if match and match.end() > at:
            end = match.end()
            suffix = matcher.ending and matcher.ending.match(text, end)
            return text[at : suffix.end() if suffix else end]
    return ""


def _classes(text: str) -> str:
    return "".join(map(_class, text))


@cache
def _class(character: str) -> str:
    if character in LINE_ENDS:
        return "n"
    if character == " ":
        return " "
    if character in OTHER_SPACES:
        return "z"
    found = category(character)
    return CLASS.get(found) or CLASS.get(found[0], "c")
