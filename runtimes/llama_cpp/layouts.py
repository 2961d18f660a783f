"""Parameter structs of llama.cpp's C API (include/llama.h) as tables, recognised by their default values.

llama.cpp passes these structs by value and changes them between releases without a version number. A layout is used
only if `llama_*_default_params()` read through it gives exactly the defaults below, field by field; they are unlike
enough (−1, −1.0, 512, 2048, true/false runs) that a shifted field shows. A release that matches none is not guessed
at: its wheel is driven through the server interface instead.

Checked on xllamacpp 2026.4, 2026.6, 2026.8, 2026.9 and 2026.10. Trailing pointers that an older release lacks are
harmless: callees read their own, shorter struct at the same address.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int8, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from typing import Any

Field = tuple[str, Any, float | None]

KV_F32, KV_F16 = 0, 1  # enum ggml_type
FLASH_ATTENTION_OFF = 0  # enum llama_flash_attn_type; −1 = auto


def _context(*, recurrent: bool, per_sequence: bool, moe_cache: bool, other: bool) -> tuple[Field, ...]:
    """llama_context_params; the four switches are the fields that releases of 2026 added."""
    return (
        ("n_ctx", c_uint32, 512),
        ("n_batch", c_uint32, 2048),
        ("n_ubatch", c_uint32, 512),
        ("n_seq_max", c_uint32, 1),
        *((("n_rs_seq", c_uint32, 0), ("n_outputs_max", c_uint32, 0)) if recurrent else ()),
        *((("n_outputs_max_per_seq", c_uint32, 1),) if per_sequence else ()),
        ("n_threads", c_int32, 4),
        ("n_threads_batch", c_int32, 4),
        *((("ctx_type", c_int32, 0),) if recurrent else ()),
        ("rope_scaling_type", c_int32, -1),
        ("pooling_type", c_int32, -1),
        ("attention_type", c_int32, -1),
        ("flash_attn_type", c_int32, -1),
        ("rope_freq_base", c_float, 0),
        ("rope_freq_scale", c_float, 0),
        ("yarn_ext_factor", c_float, -1),
        ("yarn_attn_factor", c_float, -1),
        ("yarn_beta_fast", c_float, -1),
        ("yarn_beta_slow", c_float, -1),
        ("yarn_orig_ctx", c_uint32, 0),
        ("defrag_thold", c_float, -1),
        ("cb_eval", c_void_p, None),
        ("cb_eval_user_data", c_void_p, None),
        ("type_k", c_int32, KV_F16),
        ("type_v", c_int32, KV_F16),
        *((("moe_cache_size", c_size_t, 0),) if moe_cache else ()),
        ("abort_callback", c_void_p, None),
        ("abort_callback_data", c_void_p, None),
        ("embeddings", c_uint8, 0),
        ("offload_kqv", c_uint8, 1),
        ("no_perf", c_uint8, 1),
        ("op_offload", c_uint8, 1),
        ("swa_full", c_uint8, 1),
        ("kv_unified", c_uint8, 0),
        ("samplers", c_void_p, None),
        ("n_samplers", c_size_t, 0),
        *((("ctx_other", c_void_p, None),) if other else ()),
    )


def _model(*, load: tuple[Field, ...], flags: tuple[Field, ...]) -> tuple[Field, ...]:
    """llama_model_params; how a file is loaded moved from three flags to enums during 2026."""
    return (
        ("devices", c_void_p, None),
        ("tensor_buft_overrides", c_void_p, None),
        ("n_gpu_layers", c_int32, -1),
        ("split_mode", c_int32, 1),
        *load,
        ("main_gpu", c_int32, 0),
        ("tensor_split", c_void_p, None),
        ("progress_callback", c_void_p, None),
        ("progress_callback_user_data", c_void_p, None),
        ("kv_overrides", c_void_p, None),
        ("vocab_only", c_uint8, 0),
        *flags,
        ("check_tensors", c_uint8, 0),
        ("use_extra_bufts", c_uint8, 1),
        ("no_host", c_uint8, 0),
        ("no_alloc", c_uint8, 0),
    )


MMAP_FLAGS = (("use_mmap", c_uint8, 1), ("use_direct_io", c_uint8, 0), ("use_mlock", c_uint8, 0))
CONTEXT_LAYOUTS = (
    _context(recurrent=True, per_sequence=True, moe_cache=True, other=True),
    _context(recurrent=True, per_sequence=True, moe_cache=False, other=True),
    _context(recurrent=True, per_sequence=False, moe_cache=False, other=True),
    _context(recurrent=True, per_sequence=False, moe_cache=False, other=False),
    _context(recurrent=False, per_sequence=False, moe_cache=False, other=False),
)
MODEL_LAYOUTS = (
    _model(load=(("load_mode", c_int32, -1), ("lazy_mode", c_int32, 1)), flags=()),
    _model(load=(("load_mode", c_int32, 1),), flags=()),
    _model(load=(), flags=MMAP_FLAGS),
)


class Batch(ctypes.Structure):
    """llama_batch, unchanged since 2024: logits[i] != 0 asks for the logits of token i."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", ctypes.POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", ctypes.POINTER(c_int32)),
        ("n_seq_id", ctypes.POINTER(c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(c_int32))),
        ("logits", ctypes.POINTER(c_int8)),
    )


def struct_of(layout: tuple[Field, ...]) -> type[ctypes.Structure]:
    return type("Params", (ctypes.Structure,), {"_fields_": [(name, kind) for name, kind, _ in layout]})


def recognise(function: Any, layouts: tuple[tuple[Field, ...], ...]) -> type[ctypes.Structure] | None:
    """The struct through which `function()` (a *_default_params) gives exactly the defaults, else None."""
    for layout in layouts:
        struct = struct_of(layout)
        function.restype = struct
        defaults = function()
        if all(getattr(defaults, name) == value for name, _, value in layout):
            return struct
    return None
