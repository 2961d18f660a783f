"""The reference: PyTorch, float32, eager attention, one sequence at a time, every position, layer by layer.

A long sequence has fused attention where the family has any: the same sums in another order, NMSE 1e-13 on SmolLM2
where a gate allows 1e-6, in three fifths of the time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from qalora_runtimes.protocol import CHUNK, LongSequence
from torch import nn

from qalora_export.errors import InputError
from qalora_export.models.loading import load_model
from qalora_export.qalora.layer import QALoraLinear
from qalora_export.safety import sha256_bytes
from qalora_export.verify.metrics import following_ids, position_metrics
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.layerwise import Change, DequantizedCheckpoint, LayerwiseModel
from qalora_export.verify.store import Arrays, remembered

PACKAGES = ("ml-dtypes", "numpy", "safetensors", "torch", "transformers")  # whose code the reference passes through
# The mean of four draws was a seventh of the truth at one position in thirty that amplifies a single direction: what a
# draw gives there is the square of one normal number.
NOISE_DRAWS, ULP = 16, 2.0**-23
FUSED = "sdpa"  # of torch
SIMULATED_BLOCK = 32  # int8 activation blocks of llama.cpp's Q8_1


@dataclass(frozen=True)
class Reference:
    """logprobs: float32 (positions, vocabulary), whole prompts. decoded: the same, token by token with KV cache.

    frequencies: the rotary embedding the model really uses, radians per position, (head size / 2,).
    """

    logprobs: NDArray[np.float32]
    decoded: NDArray[np.float32] | None
    frequencies: NDArray[np.float32]


def reference_logprobs(checkpoint: Path, probes: ProbeSet, *, threads: int, decode: bool = False) -> Reference:
    """Run the probe set through the checkpoint, or take what an earlier run computed (verify.store).

    Raises InputError when the reference's own numbers are in doubt.
    """

    def compute() -> Arrays:
        with fixed_threads(threads), torch.inference_mode():
            model = LayerwiseModel(checkpoint)
            answers = model.run(probes.sequences(), decode=decode)
        return dict(zip(("logprobs", "decoded"), answers, strict=False)) | {"frequencies": model.frequencies}

    what = "reference with decode" if decode else "reference"
    found = remembered(what, compute, of=checkpoint, packages=PACKAGES, probes=probes.ids_sha256, threads=threads)
    if not np.isfinite(found["logprobs"]).all():
        raise InputError(
            "the checkpoint gives NaN or infinite logits in PyTorch",
            where=checkpoint,
            why="no runtime can be compared with that",
            fix="repair or retrain the model",
        )
    return Reference(found["logprobs"], found.get("decoded"), found["frequencies"])


def simulated_int8_logprobs(checkpoint: Path, probes: ProbeSet, *, threads: int) -> NDArray[np.float32]:
    """The same model with the input of every quantized layer rounded to int8, SIMULATED_BLOCK in-features per step.

    What int8 kernels do to activations, without any runtime. Kept as the reference is.
    """

    def compute() -> Arrays:
        with fixed_threads(threads), torch.inference_mode():
            model = LayerwiseModel(checkpoint, rounding=round_to_int8)
            return {"logprobs": model.run(probes.sequences(), decode=False)[0]}

    asked = {"probes": probes.ids_sha256, "threads": threads, "block": SIMULATED_BLOCK}
    return remembered("int8 simulation", compute, of=checkpoint, packages=PACKAGES, **asked)["logprobs"]


def long_logprobs(checkpoint: Path, sequence: LongSequence, *, threads: int) -> NDArray[np.float32]:
    """The reference at the positions of one long sequence, float32 (k, vocabulary). Kept as the reference is."""

    def compute() -> Arrays:
        with fixed_threads(threads), torch.inference_mode():
            model = LayerwiseModel(checkpoint, attention=FUSED)
            return {"logprobs": model.at(sequence.ids, sequence.at, chunk=CHUNK)}

    asked = {
        "sequence": sha256_bytes(sequence.ids, sequence.at),
        "threads": threads,
        "chunk": CHUNK,
        "attention": FUSED,
    }
    return remembered("long sequence", compute, of=checkpoint, packages=PACKAGES, **asked)["logprobs"]


def rounding_noise(
    checkpoint: Path, probes: ProbeSet, exact: NDArray[np.float32], *, threads: int
) -> NDArray[np.float64]:
    """What float32 rounding alone makes of each position: NMSE, float64 (positions,).

    Every number that enters or leaves a linear layer, and every hidden state between decoder layers, is off by up to
    one unit in the last place, at random; the mean of NOISE_DRAWS such runs against the undisturbed one, whose
    log-probabilities are `exact` (reference_logprobs). Kept as the reference is.
    """

    def compute() -> Arrays:
        with fixed_threads(threads), torch.inference_mode():
            return {"noise": noise_of(lambda noise: LayerwiseModel(checkpoint, noise=noise), probes, exact)}

    asked = {"probes": probes.ids_sha256, "threads": threads}
    return remembered("rounding noise", compute, of=checkpoint, packages=PACKAGES, **asked)["noise"]


def noise_of(
    model: Callable[[Change], LayerwiseModel], probes: ProbeSet, exact: NDArray[np.float32]
) -> NDArray[np.float64]:
    """rounding_noise of any model. model: with this noise; exact: what it answers without any.

    Wants torch.inference_mode.
    """
    following, total = following_ids(probes.ids, probes.lengths), np.zeros(len(exact))
    draws = model(ulps(0)).copies(probes.sequences(), NOISE_DRAWS)
    for start, length in zip(probes.starts, probes.lengths, strict=True):
        part = slice(start, start + length)
        for draw in itertools.islice(draws, NOISE_DRAWS):
            total[part] += position_metrics(exact[part], draw, following[part]).nmse
    return total / NOISE_DRAWS


def ulps(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that moves every value by up to one unit in the last place, at random."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.rand(x.shape, generator=generator).mul_(2 * ULP).add_(1 - ULP).mul_(x)


def float32_model(checkpoint: Path) -> Any:
    """The whole checkpoint in float32, its quantized layers plain, for looking inside one sequence.

    Raises InputError when its numbers are in doubt.
    """
    model = load_model(checkpoint, dtype=torch.float32, attention="eager")
    canonical = DequantizedCheckpoint(checkpoint)
    for name in canonical.modules:
        layer = model.get_submodule(name)
        if not isinstance(layer, QALoraLinear):
            raise InputError("Transformers did not build the quantized layer", where=f"{checkpoint}: {name}")
        weight = torch.from_numpy(canonical.tensor(f"{name}.weight"))
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return model


def round_to_int8(x: torch.Tensor, block: int = SIMULATED_BLOCK) -> torch.Tensor:
    """What an int8 kernel sees of x (…, in): blocks rounded to steps of absmax / 127."""
    blocks = x.unflatten(-1, (-1, block))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    rounded: torch.Tensor = (torch.round(blocks / step.clamp_min(torch.finfo(x.dtype).tiny)) * step).flatten(-2)
    return rounded


@contextlib.contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """A fixed thread count, so the order of sums does not change between runs on one machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
