"""The decoder graph, without weights, from mobius-onnx (MIT, onnxruntime project)."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_export.errors import InputError
from qalora_export.formats.onnx.corrections import correct
from qalora_export.models.families import family_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from mobius import ModelPackage

# mobius-onnx's own "cpu" concatenates the weights of q, k and v. Ours stay apart: each keeps its own bits and group
# size, and its bytes in the file are the checkpoint's.
PROVIDER = "qalora-cpu"
IR_VERSION = 10
GRAPH_NAME = "qalora"
# Names of symbolic dimensions: mobius' -> those by which transformers.js makes an empty cache.
TOTAL = "total_sequence_length"
DIMENSIONS = {
    "batch": "batch_size",
    "sequence_len": "sequence_length",
    "past_sequence_len": "past_sequence_length",
    "past_sequence_len + sequence_len": TOTAL,
    "past_seq_len + seq_len": TOTAL,
}


def build_graph(config: Mapping[str, Any], *, untied_head: bool = False) -> ModelPackage:
    """A KV-cache decoder with GroupQueryAttention, float32 activations, weight initializers without data.

    config: the checkpoint's config.json. untied_head: the checkpoint holds an lm_head of its own although config.json
    ties it to the embeddings (a quantized head). Raises InputError when mobius-onnx cannot build the architecture.

    Every call answers a graph of its own. It is built once: an export and its verification ask several times.
    """
    from mobius import ModelPackage

    source = family_of(config).exported(config, "onnx")
    source.pop("quantization_config", None)
    if untied_head:
        source["tie_word_embeddings"] = False
    built = _built(json.dumps(source))
    return ModelPackage({"model": built["model"].clone(deep_copy=True)}, config=copy.deepcopy(built.config))


@functools.lru_cache(maxsize=4)
def _built(config: str) -> ModelPackage:
    """config: JSON, ready for mobius."""
    import mobius

    _register_provider()
    with tempfile.TemporaryDirectory(prefix="qalora-onnx-") as folder:
        (Path(folder) / "config.json").write_text(config, encoding="utf-8")
        try:
            package = mobius.build(
                folder, execution_provider=PROVIDER, dtype="f32", load_weights=False, trust_remote_code=False
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"mobius-onnx cannot build this architecture: {error}", where="config.json") from error
    if list(package) != ["model"]:
        raise InputError(f"expected one decoder graph, got {', '.join(package)}", where="config.json")
    model = package["model"]
    correct(model, json.loads(config))
    name_dimensions(model)
    model.ir_version = IR_VERSION
    model.graph.name = GRAPH_NAME  # mobius names it after the folder, which is temporary
    return package


def name_dimensions(model: ir.Model) -> None:
    """Give every symbolic dimension of mobius' the name that hosts know it by, in place.

    Raises InputError when the graph takes or gives a tensor with a dimension of another name.
    """
    import onnx_ir as ir

    outer = [*model.graph.inputs, *model.graph.outputs]
    for value in (*outer, *(value for node in model.graph for value in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size) for size in value.shape])
    for value in outer:
        names = {str(size.value) for size in value.shape or () if not isinstance(size, int)}
        if unknown := sorted(names - set(DIMENSIONS.values())):
            raise InputError(f"mobius-onnx calls a dimension {unknown[0]!r}", where=value.name or "")


def _renamed(size: int | ir.SymbolicDim) -> int | str | ir.SymbolicDim:
    return size if isinstance(size, int) else DIMENSIONS.get(str(size.value), size)


def _register_provider() -> None:
    import onnx_ir as ir
    from mobius import EpCapabilities, ep_registry, register_ep

    if PROVIDER not in ep_registry:
        register_ep(
            EpCapabilities(
                name=PROVIDER,
                gqa_dtypes=frozenset({ir.DataType.FLOAT}),
                supports_past_present_share_buffer=True,
            )
        )
