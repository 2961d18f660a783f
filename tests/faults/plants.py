"""How each fault is planted: (line, empty folder) -> a line with one thing wrong. The product knows nothing of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

from qalora_export.formats.gguf import export as gguf_export
from qalora_export.models.families.family import Family
from qalora_export.qalora import merge as merging
from qalora_export.qalora.adapter_files import Adapter
from tests.faults.line import (
    GROUP,
    RANK,
    Line,
    Matrix,
    edit_gguf,
    edit_onnx,
    exported,
    merged_wrongly,
    reseal,
    write_at,
)
from tests.models import make_tiny_canonical, make_tiny_model
from tests.qalora.adapters import own_adapter
from tests.verify.exports import float32, gguf_block, gguf_value, onnx_tensor, read_at

Plant = Callable[[Line, Path], Line]
LOST_RULE = 20
HIDDEN, HEADS = 128, 4


def swap_nibbles(m: Matrix) -> None:
    m.codes = (m.codes << 4) | (m.codes >> 4)


def negate_offset(m: Matrix) -> None:
    m.offset = -m.offset


def transpose_scale(m: Matrix) -> None:
    m.scale = np.ascontiguousarray(m.scale.T).reshape(m.scale.shape)


def shift_groups(m: Matrix) -> None:
    m.scale, m.offset = np.roll(m.scale, 1, axis=1), np.roll(m.offset, 1, axis=1)


def one_code(m: Matrix) -> None:
    m.codes[5, 3, 7] ^= 0x01


def nan_offset(m: Matrix) -> None:
    m.offset[9, 2] = np.nan


def in_gguf(change: Callable[[Matrix], None]) -> Plant:
    def plant(line: Line, folder: Path) -> Line:
        line = line.copied(folder, "gguf")
        edit_gguf(line.gguf, change)
        reseal(line, "gguf")
        return line

    return plant


def in_onnx(change: Callable[[Matrix], None]) -> Plant:
    def plant(line: Line, folder: Path) -> Line:
        line = line.copied(folder, "onnx")
        edit_onnx(line.onnx, change)
        reseal(line, "onnx")
        return line

    return plant


def gguf_metadata(key: str, value: bytes) -> Plant:
    def plant(line: Line, folder: Path) -> Line:
        line = line.copied(folder, "gguf")
        write_at(line.gguf, gguf_value(line.gguf, key), value)
        reseal(line, "gguf")
        return line

    return plant


def onnx_text(name: str, change: Callable[[str], str]) -> Plant:
    def plant(line: Line, folder: Path) -> Line:
        line = line.copied(folder, "onnx")
        before = (line.onnx / name).read_text()
        after = change(before)
        assert after != before
        (line.onnx / name).write_text(after)
        reseal(line, "onnx")
        return line

    return plant


def onnx_graph(change: Callable[[object], None]) -> Plant:
    def plant(line: Line, folder: Path) -> Line:
        import onnx

        line = line.copied(folder, "onnx")
        model = onnx.load(line.onnx / "onnx/model.onnx", load_external_data=False)
        change(model)
        (line.onnx / "onnx/model.onnx").write_bytes(model.SerializeToString())
        reseal(line, "onnx")
        return line

    return plant


def unpermuted_rows(line: Line, folder: Path) -> Line:
    """q_proj of layer 0 with its rows in Transformers order."""
    line = line.copied(folder, "gguf")

    def change(m: Matrix) -> None:
        half = HIDDEN // HEADS // 2
        order = np.arange(HIDDEN).reshape(HEADS, 2, half).swapaxes(1, 2).reshape(-1)  # GGUF row -> Transformers row
        back = np.argsort(order)
        m.codes, m.scale, m.offset = m.codes[back], m.scale[back], m.offset[back]

    edit_gguf(line.gguf, change, tensor="blk.0.attn_q.weight", rows=HIDDEN, columns=HIDDEN)
    reseal(line, "gguf")
    return line


def no_permutation() -> object:
    """A family table without the permutation, for exporter and read-back alike: gate G0 cannot see it."""
    return patch.object(Family, "permuted_heads", lambda *_: None)


def exported_without_permutation(line: Line, folder: Path) -> Line:
    with no_permutation():
        return exported(line, folder, "gguf")


def interleaved_rope(model: object) -> None:
    import onnx

    for node in model.graph.node:  # type: ignore[attr-defined]
        if node.op_type == "GroupQueryAttention":
            kept = [a for a in node.attribute if a.name != "rotary_interleaved"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("rotary_interleaved", 1)])


def other_epsilon(model: object) -> None:
    for node in model.graph.node:  # type: ignore[attr-defined]
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 1e-6


def other_rope_tables(line: Line, folder: Path) -> Line:
    """Both tables of base 20,000 instead of 10,000: consistent with each other."""
    line = line.copied(folder, "onnx")
    angles = np.arange(256)[:, None] * 20_000.0 ** (-np.arange(0, 32, 2) / 32)
    for name, values in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
        at = onnx_tensor(line.onnx, f"model.rotary_emb.{name}_cache")
        write_at(line.onnx / "onnx/model.onnx_data", at, values.astype(np.float32).tobytes())
    reseal(line, "onnx")
    return line


def scaled(factor: float, kind: str) -> Plant:
    """A merge that reads every adapter with its scaling off by a factor."""

    def change(adapter: Adapter) -> Adapter:
        modules = {name: replace(m, scaling=m.scaling * factor) for name, m in adapter.modules.items()}
        return Adapter(modules, adapter.convention)

    return lambda line, folder: merged_wrongly(line, folder, kind, change)


def mean_pool(kind: str) -> Plant:
    return scaled(1.0 / GROUP, kind)


def double_alpha(kind: str) -> Plant:
    return scaled(2.0, kind)


def half_rank(kind: str) -> Plant:
    """alpha / (r / 2), and only the first half of the rank's columns used."""

    def change(adapter: Adapter) -> Adapter:
        modules = {
            name: replace(m, a=m.a[: RANK // 2], b=m.b[:, : RANK // 2].contiguous(), scaling=m.scaling * 2)
            for name, m in adapter.modules.items()
        }
        return Adapter(modules, adapter.convention)

    return lambda line, folder: merged_wrongly(line, folder, kind, change)


def foreign_adapter(kind: str) -> Plant:
    """An adapter trained over another base of the same shape, merged by a merge that forgot to ask."""

    def plant(line: Line, folder: Path) -> Line:
        other = folder / "other"
        make_tiny_model(other / "model", seed=1)
        strange = make_tiny_canonical(other / "base.qalora", other / "model")
        own_adapter(strange, other / "adapter")
        shutil.copytree(line.base, folder / line.base.name)
        shutil.copytree(other / "adapter", folder / "adapter")
        line = replace(line, base=folder / line.base.name, adapter=folder / "adapter", merged=folder / "merged")
        right = merging.read_adapter
        with patch.object(merging, "read_adapter", lambda *a, **k: right(*a, **k | {"base": None})):
            merging.merge(line.base, line.adapter, line.merged, compare_logits=False)
        return exported(line, folder, kind)

    return plant


def quantized_head(kind: str) -> Plant:
    """An exporter that quantizes lm_head on its own account; the manifest names the right checkpoint."""

    def plant(line: Line, folder: Path) -> Line:
        from qalora_export.checkpoint.canonical import CanonicalCheckpoint, CanonicalWriter
        from tests.models import round_to_nearest

        source = CanonicalCheckpoint(line.merged)
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        with CanonicalWriter(folder / line.merged.name, config, source.companions(), kind="merged") as out:
            for module in source.modules:
                out.add_quantized(module, source.group_affine(module))
            for name in source.plain_names():
                if name == "lm_head.weight":
                    out.add_quantized("lm_head", round_to_nearest(np.asarray(source.tensor(name)), 4, GROUP))
                else:
                    out.add(name, np.asarray(source.tensor(name)))
        made = exported(replace(line, merged=folder / line.merged.name), folder, kind)
        line = replace(made, merged=line.merged)
        reseal(line, kind, checkpoint=line.merged)
        return line

    return plant


def lost_merge_gguf(line: Line, folder: Path) -> Line:
    right = gguf_export.tokenizer_entries

    def entries(*args: object, **options: object) -> list:
        found = right(*args, **options)
        rules = next(e for e in found if e.key == "tokenizer.ggml.merges")
        return [replace(e, value=_without(rules.value)) if e is rules else e for e in found]

    with patch.object(gguf_export, "tokenizer_entries", entries):
        return exported(line, folder, "gguf")


def lost_merge_onnx(text: str) -> str:
    raw = json.loads(text)
    raw["model"]["merges"] = _without(raw["model"]["merges"])
    return json.dumps(raw)


def _without(rules: list) -> list:
    return [rule for index, rule in enumerate(rules) if index != LOST_RULE]


def no_bos(text: str) -> str:
    raw = json.loads(text)
    del raw["post_processor"]
    return json.dumps(raw)


def altered_template_gguf(line: Line, folder: Path) -> Line:
    line = line.copied(folder, "gguf")
    raw = line.gguf.read_bytes()
    at = raw.index(b"<|assistant|>", raw.index(b"tokenizer.chat_template"))
    write_at(line.gguf, at, b"<|Assistant|>")
    reseal(line, "gguf")
    return line


def other_norm_gguf(tensor: str) -> Plant:
    """One weight of a norm (F32 in GGUF) changed by 1 %."""

    def plant(line: Line, folder: Path) -> Line:
        line = line.copied(folder, "gguf")
        at = gguf_block(line.gguf, tensor)
        value = np.frombuffer(read_at(line.gguf, at, 4), np.float32)[0]
        write_at(line.gguf, at, float32(value * 1.01))
        reseal(line, "gguf")
        return line

    return plant


def other_norm_onnx(tensor: str) -> Plant:
    def plant(line: Line, folder: Path) -> Line:
        line = line.copied(folder, "onnx")
        at = onnx_tensor(line.onnx, tensor)
        value = np.frombuffer(read_at(line.onnx / "onnx/model.onnx_data", at, 2), np.float16)[0]
        write_at(line.onnx / "onnx/model.onnx_data", at, np.float16(value * 1.01).tobytes())
        reseal(line, "onnx")
        return line

    return plant


def unchanged(line: Line, _folder: Path) -> Line:
    """The fault is in the runtime."""
    return line
