"""Where mobius-onnx 0.1.0 builds another function than Transformers: corrected here, each with the smallest case.

tests/formats/onnx/test_corrections.py shows every fault on mobius' own graph, so that a version without it is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qalora_export.errors import InputError
from qalora_export.models.families import Rope, family_of, rope_of
from qalora_export.models.families.rope import rope_tables

PAST = re.compile(r"past_key_values\.(\d+)\.key")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def correct(model: ir.Model, config: Mapping[str, Any]) -> None:
    """Apply every correction that this config.json needs, in place."""
    family = family_of(config)
    if family.ties_head(config):
        tie_head(model)
    if windowed := family.windowed(config):
        limit_windows(model, windowed, int(config["sliding_window"]))
    if family.local_theta is not None:
        rotate_by_layer(model, windowed, rope_of(config, family.rope_types), family.local_theta(config))
    if (rope := rope_of(config, family.rope_types)).kind == "longrope":
        rotate_by_factors(model, rope)
    if rope.partial != 1.0:
        rotate_in_part(model)
    if family.rotates_pairs:
        rotate_pairs(model)
    if family.fused_qkv:
        fuse_qkv(model, config["num_hidden_layers"])
    scale_attention(model, family.attention_scale(config))
    if family.embedding_scale is not None:
        scale_embedding(model, family.embedding_scale(config))


def limit_windows(model: ir.Model, windowed: tuple[bool, ...], window: int) -> None:
    """Sliding windows are lost (Gemma 2 and 3): from position `window` on, every layer sees everything.

    mobius puts the window into an attention bias and then fuses attention into GroupQueryAttention, which takes none.
    The operator's own attribute is local_window_size (ONNX Runtime, ContribOperators.md): keys within that many
    positions, the query's own included, as `sliding_window` of Transformers.
    """
    for layer, node in _attention(model).items():
        if windowed[layer]:
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window)


def rotate_by_layer(model: ir.Model, windowed: tuple[bool, ...], rope: Rope, local_theta: float) -> None:
    """Every layer rotates by the table of the layers with a window (Gemma 3); the others have a base of their own.

    mobius' fusion into GroupQueryAttention takes the first table it meets for all layers.
    """
    nodes, (context, half) = _attention(model), _table_shape(model)
    tables = {
        local: _rotary_tables(model, "_local" if local else "", rope_tables(theta, factor, 2 * half, context))
        for local, theta, factor in ((True, local_theta, 1.0), (False, rope.theta, rope.factor))
    }
    for layer, node in nodes.items():
        for index, table in zip((7, 8), tables[windowed[layer]], strict=True):
            node.replace_input_with(index, table)


def rotate_by_factors(model: ir.Model, rope: Rope) -> None:
    """mobius computes longrope's factor on cos and sin from the contexts, and ignores one that is stated."""
    context, half = _table_shape(model)
    _rotary_tables(model, "", rope_tables(rope.theta, rope.short, 2 * half, context, rope.magnitude))


def rotate_in_part(model: ir.Model) -> None:
    """GroupQueryAttention has no attribute rotary_embedding_dim, and ONNX Runtime refuses the graph for it.

    How many features are rotated follows from the width of the tables (ContribOperators.md).
    """
    for node in _attention(model).values():
        node.attributes.pop("rotary_embedding_dim", None)


def rotate_pairs(model: ir.Model) -> None:
    """Features rotate with those half a head away, for ERNIE 4.5 too, whose pairs are neighbours."""
    for node in _attention(model).values():
        node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)


def _table_shape(model: ir.Model) -> tuple[int, int]:
    """(context, rotated features / 2) of the one cos/sin table that mobius makes."""
    nodes = _attention(model).values()
    shapes = {tuple(value.shape) for node in nodes for value in node.inputs[7:9]}  # type: ignore[union-attr, arg-type]
    ((context, half),) = shapes
    return context, half


def _rotary_tables(model: ir.Model, suffix: str, tables: tuple[NDArray[np.float32], ...]) -> list[ir.Value]:
    """(cos, sin) as the graph's tables of that name, new or in place of those there."""
    values = []
    for part, numbers in zip(("cos", "sin"), tables, strict=True):
        name = f"model.rotary_emb{suffix}.{part}_cache"
        table = model.graph.initializers.get(name) or ir.Value(name=name)
        table.const_value, table.type = ir.tensor(numbers, name=name), ir.TensorType(ir.DataType.FLOAT)
        table.shape = ir.Shape(numbers.shape)
        if name not in model.graph.initializers:
            model.graph.register_initializer(table)
        values.append(table)
    return values


def fuse_qkv(model: ir.Model, layers: int) -> None:
    """One product for q, k and v, split behind it: mobius cuts the weight instead, and its codes would be cut too."""
    table = model.graph.initializers
    for layer in range(layers):
        module = f"model.layers.{layer}.self_attn.qkv_proj"
        parts = [table.pop(f"model.layers.{layer}.self_attn.{name}_proj.weight") for name in "qkv"]
        transposes = [next(iter(part.uses())).node for part in parts]
        products = [next(iter(node.outputs[0].uses())).node for node in transposes]
        if any(part.shape is None for part in parts) or len({node.inputs[0] for node in products}) != 1:
            raise InputError("mobius-onnx projects q, k and v otherwise than expected", where=module)
        rows = [int(part.shape[0]) for part in parts]  # type: ignore[index, arg-type]
        weight = ir.Value(name=f"{module}.weight", type=ir.TensorType(ir.DataType.FLOAT))
        weight.shape = ir.Shape((sum(rows), int(parts[0].shape[1])))  # type: ignore[index, arg-type]
        sizes = ir.Value(name="qkv_sizes", const_value=ir.tensor(np.array(rows, np.int64)))
        sizes.type, sizes.shape = ir.TensorType(ir.DataType.INT64), ir.Shape((3,))
        table[f"{module}.weight"] = weight  # its numbers come later
        sizes = table.get("qkv_sizes") or sizes
        if "qkv_sizes" not in table:
            model.graph.register_initializer(sizes)
        transpose = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{module}/Transpose")
        product = ir.node("MatMul", [products[0].inputs[0], transpose.outputs[0]], name=f"{module}/MatMul")
        product.outputs[0].name = f"v_{module}.MatMul"
        split = ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=3, name=f"{module}/Split")
        ir.convenience.replace_nodes_and_values(
            model.graph,
            products[0],
            [*products, *transposes],
            [transpose, product, split],
            [node.outputs[0] for node in products],
            list(split.outputs),
        )


def scale_attention(model: ir.Model, scale: float) -> None:
    """The factor of q·k is that of the head size for Gemma 3, whatever query_pre_attn_scalar says."""
    for node in _attention(model).values():
        node.attributes["scale"] = ir.AttrFloat32("scale", scale)


def scale_embedding(model: ir.Model, scale: float) -> None:
    """The embedding's factor √hidden is rounded to float16 (Gemma 3) or two decimals (Gemma 2): NMSE 1e-8 and 1e-7."""
    for use in model.graph.initializers[EMBEDDING].uses():
        if use.node.op_type != "Gather":
            continue
        (product,) = [after.node for after in use.node.outputs[0].uses() if after.node.op_type == "Mul"]
        index = next(i for i, value in enumerate(product.inputs) if value is not use.node.outputs[0])
        factor = ir.Value(name="model.embed_tokens.scale", const_value=ir.tensor(np.float32(scale)))
        factor.type, factor.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
        model.graph.register_initializer(factor)
        product.replace_input_with(index, factor)


def _attention(model: ir.Model) -> dict[int, ir.Node]:
    """Decoder layer -> its GroupQueryAttention, known by the KV cache it reads."""
    found = {}
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            cache = next(value.name for value in node.inputs if value is not None and PAST.fullmatch(value.name or ""))
            found[int(PAST.fullmatch(cache or "")[1])] = node  # type: ignore[index]
    return found


def tie_head(model: ir.Model) -> None:
    """Families with a decoder class of their own (SmolLM3, Gemma 3) lose the tie: lm_head asks for a tensor of its own.

    mobius ties lm_head to the embedding of the standard decoder and then replaces that decoder.
    """
    table = model.graph.initializers
    if HEAD not in table or EMBEDDING not in table:
        return
    head = table[HEAD]
    for use in list(head.uses()):
        use.node.replace_input_with(use.idx, table[EMBEDDING])
    table.pop(HEAD)
