"""Recipes: one TOML file → frozen, strict settings. Every stage takes one of these; flags beat the recipe."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety.confined import Confined, FailedError, OutOfBoundsError
from qalora_export.safety.paths import local_path
from qalora_export.safety.regular import regular_file

Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[32, 64, 128]
GridName = Literal["affine16", "q4_k", "q2_k"]
Positive = Annotated[int, Field(gt=0)]


MAX_RECIPE_BYTES = 2**20
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(?<!\.gguf)")  # owner/name


def _at_home(path: str) -> str:
    return str(local_path(path)) if path.startswith("~") else path


LocalPath = Annotated[str, AfterValidator(_at_home)]  # ~ means the home folder wherever settings come from
SettingsT = TypeVar("SettingsT", bound=BaseModel)


class Settings(BaseModel):
    """Frozen, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class QuantizeRule(Settings):
    """Overrides for the modules whose dotted name matches a shell pattern; the first matching rule wins."""

    match: str
    skip: bool = False
    bits: Bits | None = None
    group_size: GroupSize | None = None
    sym: bool | None = None
    grid: GridName | None = None


class QuantizeSettings(Settings):
    """method "gptq" (Hessian from calibration text) or "rtn" (round to nearest, no data)."""

    method: Literal["gptq", "rtn"] = "gptq"
    bits: Bits = 4
    group_size: GroupSize = 32
    grid: GridName = Field(
        default="affine16",
        description="affine16: free float16 scale and offset; q4_k, q2_k: those of GGUF Q4_K and Q2_K, whose bits and "
        "groups they have",
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
    seed: int = 0
    rules: tuple[QuantizeRule, ...] = ()
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = Field(default=None, description="when importing GPTQ")
    dequantize: bool = Field(default=False, description="GGUF: take types without a canonical form as float, anew")


class TrainSettings(Settings):
    """QA-LoRA on Transformers' Trainer. Batch size is per device; targets are shell patterns on module names."""

    data: LocalPath | None = None
    validation: LocalPath | None = None
    format: Literal["auto", "chat", "instruction", "text"] = "auto"
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    pool: Positive | None = Field(
        default=None, description="pool length: each module's own group size (default), or a multiple of it"
    )
    targets: tuple[str, ...] = ("*",)
    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: int = -1
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
    seed: int = 0


class EvaluateSettings(Settings):
    """Exact match: greedy answer to everything before the last assistant turn, compared as text."""

    data: LocalPath
    limit: Positive | None = None
    max_new_tokens: Positive = 64
    batch_size: Positive = 32


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
    seed: int = 0
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
                close = difflib.get_close_matches(name, RUNNERS, n=1)
                hint = f", did you mean {close[0]!r}?" if close else f"; known are {', '.join(RUNNERS)}"
                raise ValueError(f"no runtime is called {name!r}{hint}")
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
    export: ExportSettings = ExportSettings()
    verify: VerifySettings = VerifySettings()


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a TOML recipe; `overrides` maps dotted keys ("train.rank") to values and beats the file.

    Relative paths in the recipe are relative to the recipe's own folder. Raises InputError with "did you mean",
    UnsafeInputError for a file that is no recipe by its size or takes too long to parse.
    """
    raw = _parsed(regular_file(path, "recipe"))
    _resolve_paths(raw, path.parent)
    for dotted, value in (overrides or {}).items():
        *tables, leaf = dotted.split(".")
        target = raw
        for table in tables:
            target = target.setdefault(table, {}) if isinstance(target, dict) else target
        if not isinstance(target, dict):
            raise InputError("a setting lies below a value that is not a table", where=dotted, fix="check the key")
        target[leaf] = value
    return validated(Recipe, raw, where=path)


def _parsed(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Parsed in a confined process: a key of many dots takes memory by their square."""
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UnsafeInputError(f"the recipe is larger than {MAX_RECIPE_BYTES:,} bytes", where=path)
    try:
        raw: dict[str, Any] = Confined(_tables)(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError("the recipe is not valid TOML", where=path, why=str(error)) from error
    except FailedError as error:
        raise InputError("the recipe is not valid TOML", where=path, why=str(error)) from error
    except OutOfBoundsError as error:
        raise UnsafeInputError("the recipe cannot be parsed", where=path, why=str(error)) from error
    return raw


def _tables(text: str) -> Any:
    # TOML's dates become strings, which no setting takes.
    return json.loads(json.dumps(tomllib.loads(text), default=str))


def validated(model: type[SettingsT], raw: dict[str, Any], *, where: object) -> SettingsT:
    """Validate a table of settings; one InputError naming every offending key."""
    try:
        # JSON mode: lists become tuples, numbers stay strict.
        return model.model_validate_json(json.dumps(raw, default=str))
    except RecursionError as error:
        raise InputError("settings nest too deeply", where=where) from error
    except ValidationError as error:
        problems = [_explain(model, item) for item in error.errors()]
        raise InputError("settings are not valid", where=where, why="; ".join(problems)) from error


def dump_toml(settings: BaseModel) -> str:
    """The resolved settings as TOML that load_recipe reads back to the same object (unset values left out)."""
    lines: list[str] = []
    _dump_table(settings.model_dump(mode="json", exclude_none=True), "", lines)
    return "\n".join(lines).strip() + "\n"


def _dump_table(table: dict[str, Any], prefix: str, lines: list[str]) -> None:
    nested = {
        k: v for k, v in table.items() if isinstance(v, dict) or (v and isinstance(v, list) and isinstance(v[0], dict))
    }
    lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if key not in nested]
    for key, value in nested.items():
        for item in value if isinstance(value, list) else [value]:
            header = f"[[{prefix}{key}]]" if isinstance(value, list) else f"[{prefix}{key}]"
            lines += ["", header]
            _dump_table(item, f"{prefix}{key}.", lines)


PATH_KEYS = {
    "": ("model", "out"),
    "quantize": ("calibration",),
    "train": ("data", "validation"),
    "evaluate": ("data",),
    "verify": ("prompts",),
}


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    for table, keys in PATH_KEYS.items():
        target = raw.get(table, {}) if table else raw
        for key in keys:
            if isinstance(target, dict) and isinstance(target.get(key), str):
                path = folder / local_path(target[key])
                if key != "model" or path.exists() or not HUB_ID.fullmatch(target[key]):
                    target[key] = str(path)


def _explain(model: type[BaseModel], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    dotted = ".".join(location)
    if item["type"] != "extra_forbidden":
        return f"{dotted}: {item['msg'].removeprefix('Value error, ')}"
    close = difflib.get_close_matches(location[-1], _keys_at(model, location[:-1]), n=1)
    return f"unknown key {dotted!r}" + (f", did you mean {close[0]!r}?" if close else "")


def _keys_at(model: type[BaseModel], location: Iterable[str]) -> list[str]:
    """Field names of the settings class that sits at a location inside `model`."""
    for part in location:
        if part in model.model_fields:
            model = _settings_class(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _settings_class(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _settings_class(argument):
            return found
    return None
