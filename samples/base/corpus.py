"""The sample's corpus: the text of Python's own standard library, as documents that are trained on or held out."""

import ast
import hashlib
import sysconfig
from pathlib import Path

import numpy as np

from samples.base.tokenizer import ASSISTANT, END, USER

SKIP_DIRS = {
    "test",
    "tests",
    "site-packages",
    "idlelib",
    "turtledemo",
    "encodings",
    "__pycache__",
    "ensurepip",
    "idle_test",
    "_bundled",
    "config",
}


def library_files() -> list[tuple[str, str]]:
    """(relative name, text) of every standard-library source outside tests, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIP_DIRS.intersection(parts[:-1]) or any(p.startswith("config-") for p in parts):
            continue
        if parts[-1] == "topics.py":  # read as prose below, not as one giant dict literal
            continue
        text = path.read_text(encoding="utf-8", errors="ignore").strip()
        if len(text) > 200:
            found.append(("/".join(parts), text))
    return found


def dialogues(text: str) -> list[str]:
    """Docstrings as one-turn conversations, so that the role tokens have trained embeddings."""
    out = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        doc = ast.get_docstring(node)
        if doc and 20 < len(doc) < 800:
            arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            out.append(f"{USER}\nWhat does {node.name}{arguments[:160]} do?{END}\n{ASSISTANT}\n{doc.strip()}{END}\n")
    return out


def build_corpus() -> tuple[list[str], list[str]]:
    """(training documents, held-out documents); a document is held out by the hash of its name (about 3 %)."""
    from pydoc_data import topics

    documents = library_files()
    pairs: list[tuple[str, str]] = []
    for name, text in documents:
        try:
            talk = dialogues(text)
        except SyntaxError:
            continue
        pairs += [(name, turn) for turn in talk]
    documents += [(f"topics/{key}", value.strip()) for key, value in sorted(topics.topics.items()) for _ in range(2)]
    train, held_out = [], []
    for name, text in documents + pairs:
        target = held_out if hashlib.sha256(name.encode()).digest()[0] < 8 else train
        target.append(text)
    return train, held_out


def shuffled_documents(texts: list[str], seed: int) -> list[str]:
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order]
