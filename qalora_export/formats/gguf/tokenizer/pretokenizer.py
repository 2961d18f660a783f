r"""llama.cpp's pre-tokenizers by name, and which of them is the one in a tokenizer.json.

llama.cpp knows splitting expressions by name (`tokenizer.ggml.pre`, src/llama-vocab.cpp) and ties `ignore_merges` and a
default for BOS to the name. Here each name stands for the expressions in Hugging Face's spelling, applied one after the
other, each isolating its matches. tokenizer.json spells the same thing in several ways, so its steps are brought to
that form first: `Digits` is `\p{N}`, a `ByteLevel` that splits is GPT-2's expression.

A tokenizer is exported only under a name whose expressions are its own; guessing here is how "right weights, wrong
output" begins. tests/formats/gguf/tokenizer/test_pretokenizer.py asks llama.cpp about every name; tests/real compares
the list of names with llama.cpp's source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
MARKED_WORDS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT, DIGITS, DIGIT_TRIPLES = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
PUNCTUATION_RUNS = r"[\p{P}\$\+<=>\^~\|`]+"  # Hugging Face's Punctuation step: category P and all of ASCII's
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]"
LATIN_TO_GEORGIAN = (  # as DeepSeek LLM spells it
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ"
    "-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)


def _cl100k(digits: str, words: str = WORDS, symbols: str = SYMBOLS) -> str:
    """The expression of OpenAI's cl100k, which many models vary in their rule for digits."""
    return f"{CONTRACTIONS}|{words}|{digits}|{symbols}|{SPACES}"


def _cased(upper: str, lower: str, digits: str, tail: str) -> str:
    """The form of OpenAI's o200k: a word ends where a lower-case letter meets an upper-case one."""
    lead, symbols = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    return f"{lead}{upper}*{lower}+{tail}|{lead}{upper}+{lower}*{tail}|{digits}|{symbols}|{SPACES}"


O200K = _cased(UPPER, LOWER, DIGIT_TRIPLES, CONTRACTIONS + "?")
TEKKEN = _cased(UPPER, LOWER, DIGIT, "")


def _ascii_cased(letters: str, digits: str, tail: str) -> str:
    """llama.cpp's form of it: only ASCII letters have a case, all others count as both."""
    return _cased(f"(?:(?={letters})[^a-z])", f"(?:(?={letters})[^A-Z])", digits, tail)


CJK = "[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK_V3 = (
    DIGIT_TRIPLES,
    CJK,
    ASCII_PUNCTUATION
    + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a name means to llama.cpp. splits: expressions, each isolating its matches, in order.

    ignore_merges: a piece that is a token stays whole, whatever the merges say. add_bos: when the file does not say.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _table(*rows: tuple[str, PreTokenizer]) -> dict[str, PreTokenizer]:
    return {name: row for names, row in rows for name in names.split()}


# The first name of several that mean the same is the one we write.
NAMED = _table(
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer((_cl100k(DIGIT_TRIPLES),), ignore_merges=True, add_bos=True),
    ),
    ("glm4 glm5", PreTokenizer((_cl100k(DIGIT_TRIPLES),), ignore_merges=True)),
    ("smaug-bpe dbrx chatglm-bpe", PreTokenizer((_cl100k(DIGIT_TRIPLES),))),
    (
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        PreTokenizer((_cl100k(DIGIT),)),
    ),
    ("qwen35", PreTokenizer((_cl100k(DIGIT, MARKED_WORDS, r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),))),
    ("seed-coder", PreTokenizer((_cl100k(r"\p{N}{1}", symbols=r" ?[^\s\p{L}\p{N}\r\n]+"),))),
    ("ufakzeka", PreTokenizer((f"{WORDS}|{DIGIT}|{SYMBOLS}|{SPACES}",))),
    ("minicpm5", PreTokenizer((DIGIT_TRIPLES, _cl100k(DIGITS)), ignore_merges=True)),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer(
            (
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
                r"\s+(?!\S)|\s+",
            )
        ),
    ),
    (
        "gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum modern-bert exaone4 trillion granite-docling "
        "jina-es jina-de jina-v2-es jina-v2-de",
        PreTokenizer((GPT2,)),
    ),
    (
        "smollm command-r starcoder refact codeshell exaone minerva-7b mellum2",
        PreTokenizer((DIGIT, GPT2)),
    ),
    (
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        PreTokenizer((_ascii_cased(r"\p{L}", DIGIT_TRIPLES, CONTRACTIONS + "?"),)),
    ),
    (
        "granite-embed-multi-97m",
        PreTokenizer((_ascii_cased(r"[\p{L}\p{M}]", DIGIT_TRIPLES, CONTRACTIONS + "?"),), ignore_merges=True),
    ),
    ("tiny_aya cohere2moe", PreTokenizer((r"\d{1,3}(?=(?:\d{3})*(?!\d))", O200K))),
    ("tekken", PreTokenizer((_ascii_cased(r"\p{L}", DIGIT, ""),), ignore_merges=True, add_bos=True)),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer(DEEPSEEK_V3)),
    (
        "spark2_5",
        PreTokenizer((*DEEPSEEK_V3[:2], DEEPSEEK_V3[2].replace(r"[\r\n]*|\s*[\r\n]+", r"|[\r\n]"), DIGIT)),
    ),
    (
        "afmoe",
        PreTokenizer(
            (
                r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
                "[一-鿿㐀-䶿豈-\ufaff぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-\u0e7f຀-\u0effក-\u17ffက-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ]+",
                DEEPSEEK_V3[2],
            )
        ),
    ),
    (
        "youtu",
        PreTokenizer(
            (
                "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + CJK,
                _cased(UPPER, LOWER, DIGIT, CONTRACTIONS + "?"),
            ),
            ignore_merges=True,
        ),
    ),
    (
        "jais-2",
        PreTokenizer(
            (
                _cl100k(DIGIT_TRIPLES).removesuffix(SPACES)
                + r"\s*[\r\n]+|"
                + "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
                + r"|\s{1}",
            )
        ),
    ),
    (
        "exaone-moe",
        PreTokenizer(
            (
                _cl100k(
                    DIGIT, r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+", r" ?[^\s\p{L}\p{N}]+[\r\n/]?"
                ).replace(r"|\s*[\r\n]+|", r"|\s*[\r\n]|"),
            )
        ),
    ),
    ("laguna", PreTokenizer((r"[^\n]+|[\n]+", _cl100k(DIGIT)))),
    (
        "deepseek-coder",
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT)),
    ),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?{LATIN_TO_GEORGIAN}",
                r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
                r"\s+$",
                "[一-龥ࠀ-一가-퟿]+",
                DIGITS,
            )
        ),
    ),
    ("falcon", PreTokenizer((PUNCTUATION_RUNS, GPT2, "[0-9][0-9][0-9]"))),
    ("default", PreTokenizer((PUNCTUATION_RUNS.replace("`", ""), GPT2, DIGITS, "[0-9][0-9][0-9]"))),
    ("bloom poro-chat gpt3-finnish", PreTokenizer((BLOOM,))),
    ("viking", PreTokenizer((BLOOM, DIGIT))),
    ("superbpe", PreTokenizer((DIGITS, r"(?=(\d{3})+(?!\d))"))),
    (
        "chameleon",
        PreTokenizer(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                "([\\t\\n]|    |  )",
                DIGIT,
                PUNCTUATION,
                GPT2,
            ),
            add_bos=True,
        ),
    ),
)


# Names without a counterpart in Hugging Face's form, and why.
_NOT_NAMED = {
    "kimi-k2": "its code in llama.cpp ends words at combining marks, and no expression of tokenizer.json does the same",
    "roberta-bpe jina-v1-en jina-v2-code": "it puts separators around a text, as encoders want it",
    "whitespace": "it joins characters and not bytes, and a text loses its white space",
}
NOT_NAMED = {name: reason for names, reason in _NOT_NAMED.items() for name in names.split()}


def identify(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json, None where it has none."""
    splits = canonical_splits(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    same = (name for name, known in NAMED.items() if (known.splits, known.ignore_merges) == (splits, ignore_merges))
    return next(same, None)


def byte_level_json(splits: tuple[str, ...]) -> dict[str, Any]:
    """tokenizer.json's pre_tokenizer with these expressions and the byte alphabet behind them."""
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in splits
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    return {"type": "Sequence", "pretokenizers": steps}


def canonical_splits(raw: Any) -> tuple[str, ...] | None:
    """Expressions of a byte-level pre_tokenizer in the spelling of NAMED; None when a step has no such form.

    The byte alphabet must come last: a step behind it sees stand-ins instead of characters, and llama.cpp has no such.
    """
    *splits, alphabet = _steps(raw) or [None]
    if alphabet != BYTE_ALPHABET or None in splits or BYTE_ALPHABET in splits:
        return None
    return tuple(str(split) for split in splits)


BYTE_ALPHABET = "\0bytes"  # no expression


def _steps(raw: Any) -> list[str | None]:
    if not isinstance(raw, Mapping):
        return []
    match raw:
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return [step for part in parts for step in _steps(part)]
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"} if not raw.get("invert"):
            return [_spelled(regex)]
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True}:
            # Keeps the matches and drops what lies between: nothing, when the expression ends in every white space
            # and matches every other character somewhere.
            return [_spelled(regex) if regex.endswith(r"|\s+") else None]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return [GPT2, BYTE_ALPHABET] if raw.get("use_regex", True) else [BYTE_ALPHABET]
        case {"type": "Digits"}:
            return [DIGIT if raw.get("individual_digits") else DIGITS]
        case {"type": "Punctuation"}:
            return [{"Isolated": PUNCTUATION, "Contiguous": PUNCTUATION_RUNS}.get(raw.get("behavior", "Isolated"))]
    return [None]


def _spelled(regex: str) -> str:
    """Line ends as escapes, and the contractions in one of their two usual spellings."""
    spelled = regex.replace("\r", r"\r").replace("\n", r"\n")
    return spelled.replace("'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}", f"{CONTRACTIONS}|{WORDS[:-1]}")
