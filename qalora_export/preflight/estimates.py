"""What each stage takes: bytes left on disk, bytes for a while, memory, rough seconds.

Time is counted work divided by what the machine did in a moment's trial (machine.py). The factors say how much longer
a stage took than its matrix products alone, in CPU seconds of the sample on one core (AVX-512), and in the benchmark of
verify-parity (README) up to 231 M parameters. So it is right about the order of magnitude, and the end of a run shows
it beside what was needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qalora_export.checkpoint.forecast import Forecast
from qalora_export.preflight.machine import Machine
from qalora_export.recipe import EvaluateSettings, QuantizeSettings

if TYPE_CHECKING:
    from qalora_export.qalora.training.plan import TrainPlan
    from qalora_export.verify.check import VerifyForecast

FP32, FP64 = 4, 8  # bytes
GPTQ_FACTOR, TRAIN_FACTOR, ANSWER_FACTOR = 1.2, 2.0, 3.0
SWEEP_FACTOR = 2.0  # a sweep goes column by column
ROUNDING_PER_VALUE = 40.0  # operations of rounding to nearest, as products of this machine
REBUILT_PER_SECOND = 2e9  # codes that training turns into weights, every step anew, by the torch path of two cores
START_SECONDS = 0.5  # of any stage: imports, config, tokenizer
RUN_SECONDS = 1.0  # of one process of verify-parity: start, load, answer the text gate
RUNS_PER_RUNTIME = 8  # prefill and decode of exact and shipped path, texts; the local proof and PyTorch's own passes
LINE, PATHS = 3, 2  # models of a line: original, base, merged; exact and shipped path
KEPT, SCORE, REPORT = 2, 2**12, 2**20  # checkpoints of training at one time; bytes of a score and of a report


@dataclass(frozen=True, slots=True)
class StageForecast:
    """disk: bytes that stay. workspace: bytes beyond those, for a while. memory: bytes above the imports, None where
    it does not grow with the model. on_gpu: whether memory is a GPU's. seconds: rough. detail: for the plan.
    """

    disk: int
    workspace: int = 0
    memory: int | None = None
    seconds: float = START_SECONDS
    detail: str = ""
    on_gpu: bool = False


def quantize(forecast: Forecast, settings: QuantizeSettings, machine: Machine) -> StageForecast:
    """One layer in float32 at a time, and with GPTQ the calibration activations and a Hessian."""
    values, tokens = forecast.quantized_values, forecast.calibration_tokens
    layer = FP32 * values // int(forecast.config["num_hidden_layers"])
    largest = max(out * width for out, width in forecast.shapes.values())
    anew = {name: shape for name, shape in forecast.shapes.items() if name not in forecast.kept}
    seconds = START_SECONDS + machine.seconds_to_write(forecast.nbytes)
    if not tokens:
        seconds += ROUNDING_PER_VALUE * values / machine.flops
        memory = layer + 4 * FP32 * largest
        return StageForecast(forecast.nbytes, 0, memory, seconds, f"{values:,} weights", bool(machine.gpu))
    widest = max(width for _, width in anew.values())
    passes = 2 * 2 * values * tokens  # every layer before and after it is quantized
    solve = sum(
        2 * tokens * width**2 + width**3 + _solving(out, width, width // forecast.modules[name][1], settings.sweeps)
        for name, (out, width) in anew.items()
    )
    seconds += GPTQ_FACTOR * (passes + solve) / machine.flops
    hidden = FP32 * int(forecast.config["hidden_size"]) * tokens
    memory = layer + hidden + 4 * FP64 * widest**2 + 4 * FP32 * largest
    detail = f"{values:,} weights, {tokens:,} tokens"
    return StageForecast(forecast.nbytes, 0, memory, seconds, detail, bool(machine.gpu))


def _solving(out: int, width: int, groups: int, sweeps: int) -> float:
    """Operations of GPTQ and its sweeps on one matrix, in float64, which takes twice the time."""
    grids = 0.0 if not sweeps else (sweeps + 1) * out * (6 * width**2 + 8 / 3 * groups**3)
    return 2 * (2 * out * width**2 + SWEEP_FACTOR * (grids + sweeps * 4 * out * width**2))


def train(forecast: Forecast, made: TrainPlan, machine: Machine) -> StageForecast:
    """Forward and backward of every token, forward of the validation data at every evaluation; every step rebuilds
    every matrix from its codes.
    """
    steps, memory = made.steps.total, made.memory
    tokens = made.tokens * steps / made.steps.per_epoch
    products = 4 * forecast.quantized_values + 6 * _head(forecast)
    looks = 1 + steps // made.steps.evaluate_every if made.validation else 0
    seen = looks * sum(len(sample) for row in made.validation for sample in row)
    looking = 2 * (forecast.quantized_values + _head(forecast)) * seen
    rebuilt = 0 if machine.gpu else 3 * forecast.quantized_values * steps / REBUILT_PER_SECOND
    seconds = START_SECONDS + TRAIN_FACTOR * (products * tokens + looking) / machine.flops + rebuilt
    detail = f"{made.samples:,} samples, {steps:,} steps"
    checkpoints = KEPT * (memory.adapter + memory.optimizer)
    return StageForecast(memory.adapter, checkpoints, memory.total, seconds, detail, bool(machine.gpu))


def merge(forecast: Forecast, machine: Machine) -> StageForecast:
    return StageForecast(forecast.nbytes, seconds=START_SECONDS + 2 * machine.seconds_to_write(forecast.nbytes))


def evaluate(forecast: Forecast, settings: EvaluateSettings, prompts: list[int], machine: Machine) -> StageForecast:
    """prompts: the tokens of each question."""
    seconds = START_SECONDS + answering(forecast, settings, prompts, machine)
    memory = forecast.packed_bytes + FP32 * forecast.plain_values
    return StageForecast(SCORE, 0, memory, seconds, f"{len(prompts):,} questions")


def answering(forecast: Forecast, settings: EvaluateSettings, prompts: list[int], machine: Machine) -> float:
    """Seconds of one model's answers. prompts: the tokens of each question. Answers are counted at their longest."""
    tokens = sum(prompts) + len(prompts) * settings.max_new_tokens
    products = 2 * (forecast.quantized_values + _head(forecast))
    return ANSWER_FACTOR * products * tokens / machine.flops


def export(nbytes: int, machine: Machine) -> StageForecast:
    return StageForecast(nbytes, seconds=START_SECONDS + machine.seconds_to_write(nbytes))


def verify(
    forecast: Forecast, found: VerifyForecast, runtimes: list[str], machine: Machine, *, answers: float = 0.0
) -> StageForecast:
    """Every position through every runtime several times, whole prompts and token by token; and the reference.

    answers: seconds of one model's answers to the task, if one is asked: of the three models of the line in PyTorch and
    of both paths of every runtime.
    """
    logprobs = FP32 * found.positions * int(forecast.config["vocab_size"])
    products = 2 * (forecast.quantized_values + _head(forecast)) * found.positions
    runs = RUNS_PER_RUNTIME * len(runtimes)
    seconds = runs * (RUN_SECONDS + ANSWER_FACTOR * products / machine.flops)
    seconds += machine.seconds_to_write(found.workspace) + (LINE + PATHS * len(runtimes)) * answers
    detail = f"{found.positions:,} positions, {len(runtimes)} runtime{'s' * (len(runtimes) != 1)}"
    return StageForecast(REPORT, found.workspace, 3 * logprobs, seconds, detail)


def _head(forecast: Forecast) -> int:
    """Weights of lm_head."""
    return int(forecast.config["vocab_size"]) * int(forecast.config["hidden_size"])


def needed(stages: Mapping[str, StageForecast]) -> int:
    """Bytes the run needs on the disk at most: what stays, and the largest of what comes and goes."""
    return sum(stage.disk for stage in stages.values()) + max((s.workspace for s in stages.values()), default=0)
