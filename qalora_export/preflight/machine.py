"""What this machine has: speed of a matrix product and of the disk, memory, free space. Measured in about a second."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_export.errors import InputError
from qalora_export.memory import available_bytes, total_bytes
from qalora_export.safety import sha256_bytes

MATRIX, GPU_MATRIX = 512, 4096
PRODUCT_SECONDS, TRIALS = 0.5, 3
WRITTEN = 16 * 2**20
NVIDIA = Path("/dev/nvidiactl")  # there when the driver is loaded


@dataclass(frozen=True, slots=True)
class Machine:
    """flops: of a float32 matrix product per second, on the device that the stages use. write, hash: bytes per second.
    free: bytes on the disk of `out`. memory, memory_free: bytes of RAM, None where nobody knows. gpu: its name.
    """

    flops: float
    write: float
    hash: float
    free: int
    memory: int | None = None
    memory_free: int | None = None
    gpu: str | None = None

    def seconds_to_write(self, nbytes: float) -> float:
        """A tensor's way to the disk: written, read back, compared, hashed."""
        return nbytes * (1 / self.write + 3 / self.hash)


def measure(out: Path) -> Machine:
    """Try this machine. A file beside `out` is written and taken away. InputError where nothing can be written."""
    folder = nearest(out)
    gpu, flops = _product()
    write, digest = _disk(folder)
    free = shutil.disk_usage(folder).free
    return Machine(flops, write, digest, free, total_bytes(), available_bytes(), gpu)


def gpu_note(machine: Machine) -> str:
    """What a user should know about the GPU that is used, or is not."""
    if machine.gpu is not None:
        return f"quantization and training run on {machine.gpu}"
    if NVIDIA.exists():
        return (
            "quantization and training run on the CPU: there is an NVIDIA device, but this torch cannot use it "
            "(a build without CUDA, CUDA_VISIBLE_DEVICES, or the driver)"
        )
    return "quantization and training run on the CPU: no CUDA device"


def nearest(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    return next(found for found in (path.absolute(), *path.absolute().parents) if found.exists())


def _product() -> tuple[str | None, float]:
    import torch

    cuda = torch.cuda.is_available()
    size = GPU_MATRIX if cuda else MATRIX
    matrix: Any = torch.ones(size, size, device="cuda" if cuda else "cpu")
    name, done = torch.cuda.get_device_name() if cuda else None, 0
    float((matrix @ matrix)[0, 0])  # the first one starts threads; reading a value waits for the device
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < PRODUCT_SECONDS or not done:
        float((matrix @ matrix)[0, 0])
        done += 1
    return name, done * 2 * size**3 / elapsed  # the mean, not the best: other work on the machine counts


def _disk(folder: Path) -> tuple[float, float]:
    content = os.urandom(WRITTEN)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".qalora-") as file:
            began = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter() - began
    except OSError as error:
        raise InputError(
            "nothing can be written here",
            where=folder,
            why=error.strerror or str(error),
            fix="choose another `out`, or change the permissions of this folder",
        ) from error
    return WRITTEN / written, WRITTEN / _best(lambda: sha256_bytes(content))


def _best(work: Any) -> float:
    best = float("inf")
    for _ in range(TRIALS):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best
