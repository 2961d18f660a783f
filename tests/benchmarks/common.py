"""What the training benchmarks share: shapes, the machine's name, interleaved timing, one JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

# LlamaConfig by name; weights are random, so nothing is downloaded.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def config_of(shape: str, *, layers: int | None, sequence: int) -> Any:
    """The LlamaConfig of a shape, optionally with fewer layers."""
    from transformers import LlamaConfig

    values = SHAPES[shape] | {"max_position_embeddings": max(sequence, 4096), "use_cache": False}
    config = LlamaConfig(**values | ({"num_hidden_layers": layers} if layers else {}))
    config._attn_implementation = "sdpa"
    return config


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "capability": [properties.major, properties.minor],
        }
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0].strip() if version.exists() else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's queue drained before and after."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


class Timing(NamedTuple):
    """Medians of one call: wall seconds, and seconds of CPU over all threads (steadier on a busy machine)."""

    wall: float
    cpu: float


def interleaved(works: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, Timing]:
    """Time every call. Each repeat takes them all in turn, so drift of the machine hits all alike."""
    for work in works.values():  # compile, fill caches
        work()
    times: dict[str, list[Timing]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            began = time.process_time()
            wall = seconds(work, device)
            times[name].append(Timing(wall, time.process_time() - began))
    return {name: Timing(*map(statistics.median, zip(*values, strict=True))) for name, values in times.items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
