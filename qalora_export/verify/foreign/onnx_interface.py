"""What every loop that generates asks of a decoder graph by name: `logits`, and a KV cache.

A quantizer that replaces the last product may give its output another name (Olive's block-wise RTN and HQQ passes:
`logits_Q4`); the graph computes the same, and no runtime finds the answer. An export without past keys and values can
only run a whole text again for each token. Both are seen here before a runtime fails on them.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_export.formats.onnx.layout import graph_file

if TYPE_CHECKING:
    import onnx

LOGITS = "logits"
CACHE = re.compile(r"^(past|present)\w*\.\d+\.(key|value)$")
NO_CACHE = (
    "the graph has no KV cache (inputs past_key_values.0.key … and outputs present.0.key …), which a runtime needs to "
    "generate; export it again with one (Optimum's and Olive's task text-generation-with-past, or the model builder)"
)


def has_cache(model: onnx.ModelProto, genai: Any) -> bool:
    """genai: genai_config.json, which may give the cache names of its own, or None."""
    if genai is not None:
        return True
    return any(CACHE.match(value.name) for value in model.graph.input)


def output_in_place_of_logits(model: onnx.ModelProto, genai: Any) -> str | None:
    """The name of the one output that can only be the logits, where none has the name that runtimes ask for."""
    names = [value.name for value in model.graph.output]
    others = [name for name in names if not CACHE.match(name)]
    return others[0] if len(others) == 1 and others[0] != LOGITS and _asked(genai) == LOGITS else None


def _asked(genai: Any) -> Any:
    """The name under which genai_config.json has the logits."""
    found = genai
    for key in ("model", "decoder", "outputs"):
        found = found.get(key) if isinstance(found, dict) else None
    return found.get(LOGITS, LOGITS) if isinstance(found, dict) else LOGITS


def with_logits(folder: Path, name: str, target: Path) -> Path:
    """A copy of an ONNX folder at `target` whose output `name` is called logits; returns `target`."""
    import onnx

    shutil.copytree(folder, target, symlinks=True)
    file = graph_file(target)
    model = onnx.load(file, load_external_data=False)
    for value in (*model.graph.output, *model.graph.value_info):
        if value.name == name:
            value.name = LOGITS
    for node in model.graph.node:
        for values in (node.input, node.output):
            for place, value in enumerate(values):
                if value == name:
                    values[place] = LOGITS
    onnx.save(model, file)
    return target
