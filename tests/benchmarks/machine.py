"""What the CPU benchmarks share: the machine's name, memory of a process, random models of a given shape."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.grid import (
    AFFINE16,
    GRIDS,
    GroupAffine,
    Levels,
    SuperBlockGrid,
    SymmetricGrid,
    SymmetricLevels,
    project,
)
from qalora_export.quantization.presets import MORE_BITS, more_bits
from tests.models import TEXT

PACKAGES = (
    "numpy",
    "gguf",
    "onnx",
    "onnx-ir",
    "mobius-onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "xllamacpp",
    "torch",
    "transformers",
)
RESULTS = Path("build/bench")
STD = 0.02  # of the random weights, as Transformers initializes them


def machine(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """CPU, cores, memory, system, load and versions: what a figure is worth nothing without."""
    info, memory = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    flags = set(_found(info, "flags").split())
    return {
        "cpu": _found(info, "model name") or platform.processor() or platform.machine(),
        "cpu_features": sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "sha_ni"}),
        "cores": os.cpu_count(),
        "memory_bytes": int(_found(memory, "MemTotal").split()[0]) * 1024 if memory.exists() else None,
        "load_average_at_start": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
    }


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak), in which mapped file pages count, or RssAnon (now), without them."""
    return int(_found(Path("/proc/self/status"), field).split()[0]) * 1024


@contextlib.contextmanager
def anonymous_peak(every: float = 0.02) -> Iterator[list[int]]:
    """Yields [bytes]: the largest RssAnon seen in this process, looked at every `every` seconds by a thread.

    Memory that the process made, without pages mapped from files, which the system takes back when it needs them.
    """
    peak, done = [resident_bytes("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(every):
            peak[0] = max(peak[0], resident_bytes("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def reset_peak() -> None:
    """Begin a new VmHWM (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def llama_config(
    *, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int = 2048
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "torch_dtype": "float16",
    }


MIX = "q4_k_m"
LLAMA_2_7B = {"hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "vocab": 32000}
LLAMA_1_1B = {"hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocab": 32000}
TINY = {"hidden": 128, "intermediate": 256, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 512}


def write_random_checkpoint(
    path: Path,
    config: dict[str, Any],
    *,
    group: int = 32,
    bits: int = 4,
    sym: bool = False,
    head_bits: int | None = None,
    grid: str = AFFINE16.name,
    seed: int = 0,
) -> Path:
    """A canonical checkpoint with random weights, streamed; linears of `bits`, lm_head of `head_bits` or float16.

    grid: of the linears, lm_head is affine16 then; "q4_k_m": as that preset mixes them, lm_head and embedding too.
    sym: offset = −2^(bits−1)·s. Otherwise the offset is
    0.8 … 1.2 times that, so nothing is symmetric by chance. Tokenizer: a tiny real one; the rows of the vocabulary
    beyond it are padding.
    """
    from samples.base.tokenizer import train_tokenizer

    folder = path.with_name(f"{path.name}-tokenizer")
    tokenizer = train_tokenizer([TEXT], vocab_size=512)
    tokenizer.save_pretrained(folder)
    config = config | {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    companions = sorted(file for file in folder.iterdir() if file.name.startswith("tokenizer"))
    rng = np.random.default_rng(seed)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    with CanonicalWriter(path, config, companions, kind="base", force=True) as out:
        if grid == MIX:
            out.add_embedding("model.embed_tokens", random_on_grid(rng, vocab, hidden, "q4_k"))
        else:
            out.add("model.embed_tokens.weight", _plain(rng, vocab, hidden))
        for module, rows, columns in linears(config):
            if (kind := grid_of(module, config["num_hidden_layers"], grid)) == AFFINE16.name:
                out.add_quantized(module, random_matrix(rng, rows, columns, group, bits=bits, sym=sym))
            else:
                out.add_quantized(module, random_on_grid(rng, rows, columns, kind))
        for name in norms(config):
            out.add(name, np.ones(hidden, np.float16))
        if grid == MIX:
            out.add_quantized("lm_head", random_on_grid(rng, vocab, hidden, "q6_k"))
        elif head_bits is None:
            out.add("lm_head.weight", _plain(rng, vocab, hidden))
        else:
            out.add_quantized("lm_head", random_matrix(rng, vocab, hidden, group, bits=head_bits, sym=True))
    return path


def grid_of(module: str, layers: int, grid: str) -> str:
    """What a linear layer of the decoder is on, by the rules of the preset where they are asked for."""
    if grid != MIX:
        return grid
    more = module.endswith(MORE_BITS) and more_bits(int(module.split(".")[2]), layers)
    return "q5_k" if more else "q4_k"


def random_on_grid(rng: np.random.Generator, rows: int, columns: int, grid: str) -> GroupAffine:
    """A random matrix with the bits and groups of a grid of super-blocks, its scales and offsets next to that grid."""
    kind = GRIDS[grid]
    assert isinstance(kind, SuperBlockGrid)
    matrix = random_matrix(rng, rows, columns, kind.group_size, bits=kind.bits, sym=kind.symmetric)
    if isinstance(kind, SymmetricGrid):
        level, step = project(matrix.scale.astype(np.float64), kind)
        return GroupAffine.on_levels(matrix.codes, SymmetricLevels(kind, level.view(np.int8), step))
    (scale, scale_step), (offset, offset_step) = (
        project(part.astype(np.float64), kind) for part in (matrix.scale, -matrix.offset)
    )
    return GroupAffine.on_levels(matrix.codes, Levels(kind, scale, offset, scale_step, offset_step))


def linears(config: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(module, out, in) of every linear layer inside the decoder."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = (
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, hidden),
        ("mlp.gate_proj", inner, hidden),
        ("mlp.up_proj", inner, hidden),
        ("mlp.down_proj", hidden, inner),
    )
    for layer in range(config["num_hidden_layers"]):
        for name, rows, columns in shapes:
            yield f"model.layers.{layer}.{name}", rows, columns


def norms(config: dict[str, Any]) -> Iterator[str]:
    for layer in range(config["num_hidden_layers"]):
        yield f"model.layers.{layer}.input_layernorm.weight"
        yield f"model.layers.{layer}.post_attention_layernorm.weight"
    yield "model.norm.weight"


def random_matrix(
    rng: np.random.Generator, rows: int, columns: int, group: int, *, bits: int = 4, sym: bool = False
) -> GroupAffine:
    """Weights of about STD: codes uniform, scale STD · 2^(3 − bits) … twice that."""
    codes = np.frombuffer(rng.bytes(rows * columns), np.uint8).reshape(rows, columns) >> np.uint8(8 - bits)
    scale = (STD * 2.0 ** (3 - bits) * (1 + rng.random((rows, columns // group), np.float32))).astype(np.float16)
    factor = 1 if sym else rng.uniform(0.8, 1.2, scale.shape).astype(np.float32)
    offset = (-np.float32(2 ** (bits - 1)) * scale.astype(np.float32) * factor).astype(np.float16)
    return GroupAffine(codes, scale, offset, bits)


def _plain(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    out = np.empty((rows, columns), np.float16)
    for start in range(0, rows, 1024):
        block = out[start : start + 1024]
        block[:] = STD * rng.standard_normal(block.shape, np.float32)
    return out


def _found(path: Path, key: str) -> str:
    match = re.search(rf"^{key}\s*:\s*(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return match.group(1).strip() if match else ""
