"""What this machine can run: runtimes, CPU features, GPU, and how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "missing", "note"]
# Distribution -> (what needs it, how to get it). Stages need the first group, verify-parity the second.
STAGES = ("torch", "transformers", "accelerate", "safetensors", "gguf", "onnx", "onnx-ir", "mobius-onnx")
OPTIONAL = {
    "peft": "only to exchange adapters in tests: pip install peft",
    "bitsandbytes": "8-bit and paged optimizers on CUDA: pip install 'qalora-export[cuda]'",
    "triton": "the dequantize kernel on CUDA: pip install 'qalora-export[cuda]'",
}
# CPU flags that edge kernels choose between, and what their absence means.
CPU_FLAGS = {
    "avx2": "without it the prebuilt llama.cpp wheel does not start",
    "avx512f": "without it ONNX Runtime uses its AVX2 kernels",
    "avx512_vnni": "without it int8 dot products take more instructions",
    "amx_int8": "llama.cpp built for AMX has crashed on Q4_1 prompts: use a build without AMX if it does",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    subject: str
    status: Status
    detail: str


def examine() -> list[Finding]:
    """Everything `doctor` prints; imports torch only to ask about the GPU."""
    from qalora_runtimes.launch import available

    findings = [Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    findings += [_package(name, f"pip install {name}") for name in STAGES]
    for runtime in available():
        fix = f"pip install {runtime.package}"
        detail = f"{runtime.package} {runtime.version}" if runtime.version else f"not installed: {fix}"
        findings.append(Finding(f"runtime {runtime.name}", "ok" if runtime.version else "missing", detail))
    findings += [_package(name, fix, optional=True) for name, fix in OPTIONAL.items()]
    return [*findings, *_cpu(), _gpu(), _disk()]


def _package(name: str, fix: str, *, optional: bool = False) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "note" if optional else "missing", fix if optional else f"not installed: {fix}")


def _cpu() -> list[Finding]:
    from qalora_runtimes.fingerprint import machine

    description = machine()
    flags = set(description.get("flags", ()))
    lines = [Finding("cpu", "ok", f"{description.get('model') or platform.machine()}")]
    if not flags:
        return [*lines, Finding("cpu flags", "note", f"not known on {sys.platform}")]
    for flag, meaning in CPU_FLAGS.items():
        present = flag in flags
        noteworthy = present if flag == "amx_int8" else not present
        lines.append(Finding(f"cpu {flag}", "note" if noteworthy else "ok", meaning if noteworthy else str(present)))
    return lines


def _gpu() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("gpu", "note", "torch is not installed, so nothing could ask")
    if not torch.cuda.is_available():
        return Finding("gpu", "note", "no CUDA device: training and quantization run on the CPU")
    properties = torch.cuda.get_device_properties(0)
    return Finding(
        "gpu", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    )


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    return Finding("disk", "ok" if free > 10 * 2**30 else "note", f"{free / 2**30:.1f} GiB free here")
