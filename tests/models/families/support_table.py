"""README's table of families: `python -m tests.models.families.support_table` prints it.

quantize, train, merge, GGUF, ONNX and ONNX Runtime GenAI are tests of test_parity.py, which run for every family: GPTQ,
two steps of training, a merge, all gates on the three runtimes. transformers.js: tests/web/test_hosts.py.
"""

from __future__ import annotations

from qalora_export.models.families import FAMILIES
from tests.models.families.small import CONFIGS, VARIANTS
from tests.models.families.tokenizers import GGUF_DIFFERS

STEPS = ("quantize", "train", "merge", "GGUF", "ONNX", "ONNX Runtime GenAI", "transformers.js")
YES = "✓"


def table() -> str:
    """Markdown, one row per family and variant in the order of their names."""
    head = ["| family | tokenizer in its test | " + " | ".join(STEPS) + " |", "|---" * (len(STEPS) + 2) + "|"]
    return "\n".join([*head, *(_row(name) for name in sorted(CONFIGS))])


def _row(name: str) -> str:
    family = next(family for family in FAMILIES if family.name == VARIANTS.get(name, name))
    _, form, own = CONFIGS[name]
    onnx = family.onnx_refused or YES
    gguf = "✓ nearest tokenizer" if form in GGUF_DIFFERS else YES
    gguf += ", context: the window" if "windows" in name else ""
    short = ", original context" if "original_max_position_embeddings" in own else ""
    cells = [name, form, *[YES] * 3, gguf + short, *[onnx + short] * 3]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table())
