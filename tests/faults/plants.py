"""Faults planted in artifacts: (line, empty folder) -> a line with one thing wrong. The product knows nothing of it.

Those of a merge or an exporter are in wrong_stages.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.faults.line import (
    Line,
    Matrix,
    edit_gguf,
    edit_onnx,
    reseal,
    write_at,
)
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


def lost_merge_onnx(text: str) -> str:
    raw = json.loads(text)
    raw["model"]["merges"] = without_a_rule(raw["model"]["merges"])
    return json.dumps(raw)


def without_a_rule(rules: list) -> list:
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
