"""When the Triton kernels are used: for tensors on a GPU, when Triton is installed. Everything else takes torch."""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TRITON = importlib.util.find_spec("triton") is not None
DEVICES = {"cuda"}  # tests add "cpu" to run the kernels in Triton's interpreter

# Batches of up to this many rows go through fused_linear; 0 keeps it off. Off by default because the crossover is a
# property of the GPU: the fused kernel reads 0.6 bytes of a 4-bit weight where dequantize + cuBLAS moves 4.6 (read,
# write, read back), which wins while the product waits for memory, and loses once it is bound by arithmetic, since
# every block of rows dequantizes again. On paper that is between 64 and 300 rows; tests/benchmarks/train_cuda.py
# measures it.
fused_rows = 0


def applies(tensor: Tensor) -> bool:
    """True when the kernels take tensors of this device. Says once what it costs that Triton is missing on a GPU."""
    if tensor.device.type not in DEVICES:
        return False
    if not TRITON and not torch.compiler.is_compiling():
        _warn_once()
    return TRITON


_warned = False


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        logger.warning(
            "Triton is not installed: layers are dequantized by torch, which moves about 10 times the memory of the "
            "kernel and needs 6 more bytes per weight of the largest layer; pip install 'qalora-export[cuda]'"
        )
