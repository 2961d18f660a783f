"""Settings of every stage and of the whole line, frozen and strict; recipe_file.py reads them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from qalora_export.errors import did_you_mean
from qalora_export.safety.paths import local_path

Bits = Literal[2, 3, 4, 5, 8]
GroupSize = Literal[32, 64, 128]
GridName = Literal["affine16", "q4_k", "q5_k", "q6_k", "q2_k", "q8_0", "q4_0"]
Preset = Literal["q4_k_m"]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes, which Transformers seeds too

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(?<!\.gguf)")  # owner/name


def _at_home(path: str) -> str:
    return str(local_path(path)) if path.startswith("~") else path


LocalPath = Annotated[str, AfterValidator(_at_home)]  # ~ means the home folder wherever settings come from


class Settings(BaseModel):
    """Frozen, no unknown keys, no silent conversion between types, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("bits", "group_size", "accuracy_level", mode="before", check_fields=False)
    @classmethod
    def _whole(cls, value: object) -> object:
        """pydantic takes 4.0 for Literal[4], strict or not."""
        value = tuple(value) if isinstance(value, list) else value
        if any(isinstance(number, float) for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError("Input should be a valid integer")
        return value


class QuantizeRule(Settings):
    """Overrides for the modules whose dotted name matches a shell pattern; the first matching rule wins."""

    match: str
    skip: bool = False
    bits: Bits | None = None
    group_size: GroupSize | None = None
    sym: bool | None = None
    grid: GridName | None = None


class QuantizeSettings(Settings):
    """method "gptq" (Hessian from calibration text), or without data "mse" (the grid of least squared error in every
    group) or "rtn" (the grid from the least to the largest weight), codes rounded to nearest.
    """

    method: Literal["gptq", "mse", "rtn"] = "gptq"
    bits: Bits = 4
    group_size: GroupSize = 32
    grid: GridName = Field(
        default="affine16",
        description="affine16: free float16 scale and offset; q4_k, q5_k, q2_k: those of GGUF Q4_K, Q5_K and Q2_K, "
        "whose bits and groups they have; q6_k, q8_0, q4_0: Q6_K, Q8_0 and Q4_0, symmetric, for what is not "
        "trained",
    )
    preset: Preset | None = Field(
        default=None, description="q4_k_m: q4_k, more bits where llama.cpp's Q4_K_M has them; rules beat it"
    )
    strict_groups: bool = Field(
        default=False, description="refuse in-features that group_size does not divide, instead of a smaller group"
    )
    sym: bool = False
    calibration: LocalPath | None = Field(default=None, description="text or JSONL file; GPTQ needs one")
    calibration_samples: Positive = 128
    sequence_length: Positive = 512
    damp: Annotated[float, Field(gt=0, lt=1)] = 0.01
    block_size: Positive = 128
    sweeps: Annotated[int, Field(ge=0, le=100)] = Field(
        default=2, description="GPTQ: passes that solve scales and offsets of a row together and choose codes anew"
    )
    seed: Seed = 0
    rules: tuple[QuantizeRule, ...] = ()
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = Field(default=None, description="when importing GPTQ")
    dequantize: bool = Field(default=False, description="GGUF: take types without a canonical form as float, anew")


class TrainSettings(Settings):
    """QA-LoRA on Transformers' Trainer. Batch size is per device; targets are shell patterns on module names."""

    data: LocalPath | None = None
    validation: LocalPath | None = None
    format: Literal["auto", "chat", "instruction", "text"] = "auto"
    rank: Annotated[int, Field(gt=0, le=65536)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    pool: Positive | None = Field(
        default=None, description="pool length: each module's own group size (default), or a multiple of it"
    )
    scales: bool = Field(
        default=False,
        description="QA-LoRA+: scales too, with an adapter of the same rank of their own; merges as exactly",
    )
    targets: tuple[str, ...] = ("*",)
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 3.0
    max_steps: Annotated[int, Field(le=2**31 - 1)] = -1
    batch_size: Positive = 16
    gradient_accumulation: Positive = 1
    gradient_checkpointing: bool = False
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    optimizer: str = "adamw_torch"
    sequence_length: Positive = 512
    too_long: Literal["error", "drop", "truncate"] = Field(
        default="drop",
        description="conversations above sequence_length: left out and counted, cut at the end, or refused",
    )
    packing: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = Field(default=False, description="torch.compile the decoder layers: slow to start, for long runs")
    evaluate_every: Positive | None = Field(default=None, description="steps between evaluations; default ten per run")
    seed: Seed = 0


class EvaluateSettings(Settings):
    """Greedy answers to everything before the last assistant turn, compared with it as text or, match "regex", found by
    it as a regular expression.
    """

    data: LocalPath
    limit: Positive | None = None
    max_new_tokens: Positive = 64
    batch_size: Positive = 32
    match: Literal["exact", "regex"] = "exact"


class CompareSettings(Settings):
    """Which methods `compare` trains and scores, at which bits, seeds and learning rates; None: every method.

    The first seed looks for the learning rate of a trained method with the lowest validation loss, from the middle one
    up or down as long as it falls; the others confirm it (comparison/table.py). Everything else comes from [train] and
    [quantize]. text: held-out text, whose loss then stands in the table and in the claims: thousands of tokens tell
    methods apart that the answers of [evaluate] do not.
    """

    methods: tuple[str, ...] | None = None
    text: LocalPath | None = None
    bits: Annotated[tuple[Literal[2, 3, 4], ...], Field(min_length=1)] = (4, 3, 2)
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-3, 3e-3, 1e-2)
    prove: bool = Field(default=True, description="export every merged checkpoint and run verify-parity on it")
    speed: bool = Field(default=True, description="time llama.cpp on what is deployed as GGUF, beside the 16-bit base")


class GgufSettings(Settings):
    """layout "q4_1": one self-contained file; "split": Q4_0 base and an exact offset adapter.

    allow_text_differences: export a tokenizer of which llama.cpp has the nearest form only (o200k, Tekken); the file,
    its manifest and the report of verify-parity say so.
    """

    layout: Literal["q4_1", "split"] = "q4_1"
    allow_text_differences: bool = False


class OnnxSettings(Settings):
    """accuracy_level is MatMulNBits' attribute: 4 = int8 activations (shipped), 1 = float32.

    allow_text_differences: gate G5 may pass although ONNX Runtime GenAI's own tokenizer gives other ids to ordinary
    text, when they are exactly those that were predicted; the manifest says so.
    """

    accuracy_level: Literal[1, 4] = 4
    allow_text_differences: bool = False


class ExportSettings(Settings):
    """Which formats `run` exports, and how; None leaves one out."""

    gguf: GgufSettings | None = GgufSettings()
    onnx: OnnxSettings | None = OnnxSettings()


class VerifySettings(Settings):
    """Which runtimes must agree, on what. prompts: JSONL (chat or text) or plain text, beside the fixed edge cases."""

    runtimes: tuple[str, ...] | None = Field(default=None, description="default: all that run what was exported")
    prompts: LocalPath | None = None
    sequences: Annotated[int, Field(ge=16)] = 24
    positions: Annotated[int, Field(ge=1000)] = 1000
    max_length: Positive = 128
    long_length: Positive = Field(default=4096, description="tokens of one long sequence, or the model's context")
    threads: Positive = 2
    seed: Seed = 0
    scored: Positive = Field(
        default=32, description="questions of [evaluate] that every model and runtime answers, for the table of costs"
    )
    without_parents: bool = Field(
        default=False,
        description="a merged checkpoint may pass though its base or adapter is not here; the verdict says so",
    )
    max_kl: Annotated[float, Field(gt=0, description="mean KL of the shipped path, nats")] = 0.1
    min_top1: Annotated[float, Field(ge=0, le=1, description="share of positions with the same first choice")] = 0.8

    @field_validator("runtimes")
    @classmethod
    def _known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        from qalora_runtimes.launch import RUNNERS

        for name in names or ():
            if name not in RUNNERS:
                raise ValueError(f"no runtime is called {name!r}, {did_you_mean(name, RUNNERS)}")
        return names


class Recipe(Settings):
    """The whole line. model: a Transformers folder, a .gguf file, or the id of a model on the Hugging Face hub, taken
    there at `revision`. out is where every artifact goes.
    """

    model: LocalPath
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    out: LocalPath
    quantize: QuantizeSettings = QuantizeSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings | None = None
    compare: CompareSettings = CompareSettings()
    export: ExportSettings = ExportSettings()
    verify: VerifySettings = VerifySettings()
