"""Compile every kernel for NVIDIA GPUs without having one; prints a JSON line per kernel with what its PTX holds.

Run in a process of its own without TRITON_INTERPRET (test_kernels_compile.py does): Triton decides at import.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qalora_export.qalora.kernels import dequantize, effective_offset, fused_linear, group_sum
from qalora_export.qalora.kernels.tiles import WORDS

CAPABILITIES = (80, 90)
POINTERS = {"torch.uint8": "*u8", "torch.int16": "*i16", "torch.int32": "*i32", "torch.int64": "*i64"}
INSTRUCTIONS = ("st.global.v4", "cvt.rn.bf16x2.f32", "cvt.rn.f16.f32", "fma.rn.f64", "mma", "ld.local", "st.local")
Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]


def cases() -> Iterator[Case]:
    """(name, kernel, types of arguments, constants, options)"""
    for bits, word in WORDS.items():
        words = {"words": POINTERS[str(word)], "scale": "*fp16", "offset": "*fp16"}
        counts = {"matrix": "*bf16", "groups": "i32", "per_row": "i32"}
        tiles = {"BITS": bits, "RUNS": 4, "BLOCK": 128, "SCALING": 0.1, "INTERPRETED": False}
        yield (
            f"dequantize {bits}",
            dequantize._dequantize,
            {**words, **counts},
            {"a": None, "b": None, **tiles, "RANK": 0, "REPEAT": 1},
            {"enable_fp_fusion": False},
        )
        yield (
            f"adapted dequantize {bits}",
            dequantize._dequantize,
            {**words, "a": "*fp32", "b": "*fp32", **counts},
            {**tiles, "RANK": 16, "REPEAT": 1},
            {"enable_fp_fusion": False},
        )
        for dtype in ("*bf16", "*fp32") if bits == 4 else ("*bf16",):
            yield (
                f"fused_linear {bits} {dtype}",
                fused_linear._fused_linear,
                {"x": dtype, **words, "y": dtype, "rows": "i32", "out": "i32", "runs": "i32"},
                {
                    "BITS": bits,
                    "RUNS_PER_GROUP": 4,
                    "ROWS": fused_linear.ROWS,
                    "OUT": fused_linear.OUT,
                    "RUNS": fused_linear.DEPTH // 8,
                    "INTERPRETED": False,
                },
                {},
            )
    yield (
        "effective_offset",
        effective_offset._effective_offset,
        {"offset": "*fp16", "a": "*fp32", "b": "*fp32", "result": "*fp16", "rows": "i32", "pools": "i32"},
        {"RANK": 16, "REPEAT": 2, "SCALING": 0.1, "ROWS": effective_offset.ROWS, "POOLS": effective_offset.POOLS},
        {"enable_fp_fusion": False},
    )
    yield (
        "group_sum",
        group_sum._group_sum,
        {"x": "*bf16", "sums": "*bf16", "groups": "i32"},
        {"POOL": 32, "WIDTH": 32, "BLOCK": 128, "INTERPRETED": False},
        {},
    )


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any], sm: int) -> Any:
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def main() -> None:
    for name, kernel, types, constants, options in cases():
        for sm in CAPABILITIES:
            result = compiled(kernel, types, constants, options, sm)
            ptx = result.asm["ptx"]
            row = {
                "kernel": name,
                "sm": sm,
                "cubin_bytes": len(result.asm["cubin"]),
                "shared": result.metadata.shared,
                "instructions": {text: ptx.count(text) for text in INSTRUCTIONS},
            }
            print(json.dumps(row))


if __name__ == "__main__":
    main()
