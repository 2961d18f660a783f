"""Every reader of files that somebody else may have made: which file is damaged, how, and what reads it.

`read` gets the folder of seeds with one file damaged. It may answer or raise one of our errors, nothing else.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tests.survival.fuzz import mutate, structures
from tests.survival.fuzz.mutate import Mutator

Read = Callable[[Path], object]
BYTES: tuple[Mutator, ...] = (mutate.any_bytes,)
JSON: tuple[Mutator, ...] = (mutate.json_text, mutate.json_text, mutate.json_text, mutate.any_bytes)
LINES: tuple[Mutator, ...] = (mutate.json_lines, mutate.json_lines, mutate.any_bytes)
TENSORS: tuple[Mutator, ...] = (structures.safetensors, structures.safetensors, mutate.any_bytes)
GGUF: tuple[Mutator, ...] = (structures.gguf, structures.gguf, mutate.any_bytes)
GRAPH: tuple[Mutator, ...] = (structures.protobuf, structures.protobuf, structures.protobuf, mutate.any_bytes)
NPZ: tuple[Mutator, ...] = (structures.npz, mutate.any_bytes)
TOML: tuple[Mutator, ...] = (mutate.toml, mutate.toml, mutate.any_bytes)
JINJA: tuple[Mutator, ...] = (mutate.jinja, mutate.any_bytes)


@dataclass(frozen=True)
class Target:
    """file: the one that is damaged. share: cases relative to the others; what takes longer gets fewer.

    sealed: a manifest records the file, so whatever accepts it changed has accepted damage. fragile: the reader may
    remove the folder of the file, as a resumed training does with a checkpoint that is not whole.
    """

    name: str
    file: str
    mutators: tuple[Mutator, ...]
    read: Read
    share: float = 1.0
    sealed: bool = False
    fragile: bool = False


# ------------------------------------------------------------------------------------------------------------ readers


def tensors(folder: Path) -> None:
    from qalora_export.checkpoint.safetensors_file import map_tensor, read_header

    path = folder / "base.qalora/model.safetensors"
    for entry in read_header(path).values():
        map_tensor(path, entry)


def canonical(folder: Path) -> None:
    from qalora_export.checkpoint.canonical import CanonicalCheckpoint

    checkpoint = CanonicalCheckpoint(folder / "base.qalora")
    for module in list(checkpoint.modules)[:2]:
        checkpoint.group_affine(module)
    checkpoint.plain_names()


def model_folder(name: str, folder: Path) -> None:
    from qalora_export.checkpoint.model_folder import ModelFolder

    model = ModelFolder(folder / name)
    model.companions()
    for tensor in model.names()[:3]:
        model.tensor(tensor)


def manifest(folder: Path) -> None:
    from qalora_export.checkpoint.manifest import read_manifest, verify_manifest

    read_manifest(folder / "base.qalora")
    verify_manifest(folder / "base.qalora")


def provenance(folder: Path) -> None:
    from qalora_export.checkpoint.provenance import artifact_links, checkpoint_links, parent_folder

    checkpoint_links(folder / "merged.qalora")
    parent_folder(folder / "merged.qalora", "base")
    artifact_links(folder / "model.gguf", folder / "base.qalora")


def architecture(folder: Path) -> None:
    from qalora_export.checkpoint.model_folder import ModelFolder
    from qalora_export.formats.gguf.metadata import architecture as entries
    from qalora_export.models.families import family_of

    config = ModelFolder(folder / "model").config
    entries(family_of(config), config)


def skeleton(folder: Path) -> None:
    import torch

    from qalora_export.checkpoint.model_folder import ModelFolder
    from qalora_export.models.families import family_of
    from qalora_export.models.skeleton import Skeleton

    model = ModelFolder(folder / "model")
    family_of(model.config)
    Skeleton(model, torch.device("cpu")).check_complete()


def adapter(name: str, convention: str, folder: Path) -> None:
    from qalora_export.checkpoint.canonical import CanonicalCheckpoint
    from qalora_export.qalora.adapter_files import ModuleShape, read_adapter

    base = CanonicalCheckpoint(folder / "base.qalora")
    shapes = {}
    for module, (_, group) in base.modules.items():
        scale = base.entry(f"{module}.scale").shape
        shapes[module] = ModuleShape(scale[0], scale[1] * group, group)
    read_adapter(folder / name, shapes, convention=convention)


def gguf(folder: Path) -> None:
    from qalora_export.formats.gguf.read import read_back

    _first_matrices(read_back(folder / "model.gguf"))


def gguf_split(folder: Path) -> None:
    from qalora_export.formats.gguf.read import read_back

    _first_matrices(read_back(folder / "split.gguf", folder / "split.lora.gguf"))


def gguf_facts(folder: Path) -> None:
    from qalora_export.formats.gguf.read import read_back
    from qalora_export.verify.runtimes.llama_cpp import facts_of

    facts_of(folder / "model.gguf", read_back(folder / "model.gguf").metadata)


def onnx(folder: Path) -> None:
    from qalora_export.formats.onnx.read import read_back

    _first_matrices(read_back(folder / "onnx"))


def onnx_facts(folder: Path) -> None:
    from qalora_export.formats.onnx.read import read_back
    from qalora_export.verify.runtimes.onnxruntime import graph_facts
    from qalora_export.verify.runtimes.onnxruntime_genai import genai_facts

    contents = read_back(folder / "onnx")
    graph_facts(contents)
    genai_facts(folder / "onnx")


def _first_matrices(contents: Any) -> None:
    for module in list(contents.modules)[:2]:
        contents.group_affine(module)
    for name in list(contents.others)[:2]:
        contents.tensor(name)


def tokenizer(folder: Path) -> None:
    from qalora_export.models.loading import load_tokenizer

    found = load_tokenizer(folder / "model")
    found("Turn on the lights, please! é東\0", add_special_tokens=False)


def tokenizer_fields(folder: Path) -> None:
    from qalora_export.formats.gguf.tokenizer.fields import tokenizer_entries

    tokenizer_entries(folder / "model", {"vocab_size": 512})


def text_facts(folder: Path) -> None:
    from qalora_export.verify.runtimes.facts import expected_text_facts

    expected_text_facts(folder / "model")


def template(folder: Path) -> None:
    from qalora_export.data.samples import load_samples
    from qalora_export.models.loading import load_tokenizer

    load_samples(folder / "data.jsonl", load_tokenizer(folder / "model"), sequence_length=512)


def records(file: str, folder: Path) -> None:
    from qalora_export.data.records import iter_records

    list(iter_records(folder / file))


def prompts(file: str, folder: Path) -> None:
    from qalora_export.data.prompts import read_prompts

    read_prompts(folder / file)


class _Letters:
    """A tokenizer of bytes; the readers of data do not depend on which one it is."""

    chat_template, bos_token_id, eos_token_id = None, None, 0

    def __call__(self, text: str, **_: object) -> Any:
        return type("Encoded", (), {"input_ids": list(text.encode("utf-8", "replace"))})


def calibration(file: str, folder: Path) -> None:
    from qalora_export.data.calibration import calibration_windows

    calibration_windows(folder / file, _Letters(), samples=2, length=16, seed=0)


def recipe(folder: Path) -> None:
    from qalora_export.recipe import dump_toml, load_recipe

    dump_toml(load_recipe(folder / "recipe.toml"))


def job(folder: Path) -> None:
    from qalora_runtimes.protocol import read_job

    read_job(folder / "job.npz")


def answers(folder: Path) -> None:
    from qalora_runtimes.protocol import read_answers

    read_answers(folder / "answers.npz", positions=5)


def run_state(folder: Path) -> None:
    from qalora_export.pipeline import _State

    _State(folder / "out" / "run.json")


def run_summary(folder: Path) -> None:
    from qalora_export.cli.run_summary import print_summary
    from qalora_export.model_card import write_card
    from qalora_export.recipe import load_recipe

    loaded = load_recipe(folder / "recipe.toml")
    print_summary(loaded)
    write_card(loaded)


def training_record(folder: Path) -> None:
    from qalora_export.qalora.training.folder import last_checkpoint, prepare

    record = folder / "adapter.training"
    prepare(record, {"settings": {"rank": 4}, "base": "0"}, resume=True, force=False)
    last_checkpoint(record)


# ------------------------------------------------------------------------------------------------------ command line

# Exit codes a command may end with; 70 is a defect and prints its traceback.
DOCUMENTED = range(5)


class Refused(Exception):
    """A command ended with one of the documented codes that are not 0."""


class Misbehaved(AssertionError):
    """A command ended with another code, printed a traceback or something that steers a terminal."""


def command(*words: str, folder: Path) -> None:
    """Run the command line with {} in the words standing for the folder of seeds."""
    run_command([word.replace("{}", str(folder)) for word in words])


def run_command(words: list[str]) -> None:
    from qalora_export.cli.main import main

    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    before, code = (sys.stdout, sys.stderr), None
    sys.stdout = sys.stderr = stream
    try:
        main(words)
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout, sys.stderr = before
        stream.flush()
    said = stream.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]
    steering = {c for c in said if not c.isprintable() and c not in "\n\t\r"}
    if code not in DOCUMENTED or "Traceback" in said or steering:
        raise Misbehaved(f"exit {code}, {sorted(steering)!r}, {said[-3000:]}")
    if code:
        raise Refused(said[-300:])


def stage(*words: str) -> Read:
    return partial(_stage, words)


def _stage(words: tuple[str, ...], folder: Path) -> None:
    command(*words, folder=folder)


WORDS = (
    *("inspect", "quantize", "train", "merge", "evaluate", "export", "gguf", "onnx", "run", "verify-parity", "doctor"),
    *("--help", "--out", "--force", "--facts", "--check", "--bits", "--rule", "--seed", "--set", "--data", "--rank"),
    *("--method", "rtn", "--dry-run", "--learning-rate", "--alpha", "--targets", "--limit", "--max-steps", "--version"),
    *(
        "--gguf",
        "--onnx",
        "--runtime",
        "--threads",
        "--positions",
        "--group-size",
        "--calibration",
        "--recipe",
        "--pool",
    ),
    *("{}/model", "{}/base.qalora", "{}/adapter", "{}/model.gguf", "{}/onnx", "{}/recipe.toml", "{}/data.jsonl", "{}"),
    *("{}/none", "{}/text.txt", "/dev/null", "/dev/zero", "/proc/self/mem", "/", ".", "{}/loop", "{}/fifo", "{}/new"),
    *("train.rank=8", "quantize.rules=[]", "model=\u0000", "*=bits:3", "*.up_proj=skip", "x=bits:", "=", "a.b.c=1"),
)


def arguments(folder: Path) -> None:
    """Random command lines; the damaged `file` is their seed."""
    random = Random((folder / "arguments.txt").read_bytes())
    verbs = (
        ("inspect",),
        ("quantize", "{}/model", "--out", "{}/new", "--method", "rtn"),
        ("train", "{}/base.qalora", "--data", "{}/data.jsonl", "--out", "{}/new", "--dry-run"),
        ("merge", "{}/base.qalora", "{}/adapter", "--out", "{}/new", "--no-compare-logits"),
        ("export", "gguf", "{}/base.qalora", "--out", "{}/new"),
        ("export", "onnx", "{}/none", "--out", "{}/new"),
        ("run", "{}/none.toml"),
        ("verify-parity", "{}/none", "--out", "{}/new"),
        ("evaluate", "{}/none", "--data", "{}/data.jsonl"),
        (),
    )
    words = list(random.choice(verbs))
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(len(words) + 1)
        new = random.choice((*WORDS, *WORDS, *mutate.TEXTS, *map(str, mutate.NUMBERS)))
        words[at : at + random.randrange(2)] = [new] + ([str(mutate.hostile_value(random))] if new[:2] == "--" else [])
    if "/dev/zero" in words or os.sep in words:  # reading all of the machine is no reader's fault
        words = [word for word in words if word not in ("/",)]
    command(*(word.replace("\0", "") for word in words), folder=folder)


ADAPTER = partial(adapter, "adapter", "auto")
INSPECT = ("inspect", "--facts", "--check")
FORCE = ("--out", "{}/new", "--force")
QUANTIZE = stage("quantize", "{}/model", *FORCE, "--method", "rtn")
MERGE = stage("merge", "{}/base.qalora", "{}/adapter", *FORCE, "--no-compare-logits")
TRAIN = stage("train", "{}/base.qalora", "--data", "{}/data.jsonl", *FORCE, "--dry-run")
EVALUATE = stage("evaluate", "{}/model", "--data", "{}/data.jsonl", "--max-new-tokens", "2")

TARGETS = (
    Target("recipe", "recipe.toml", TOML, recipe, 2),
    Target("arguments", "arguments.txt", BYTES, arguments, 0.5),
    Target("config: families", "model/config.json", JSON, architecture, 2),
    Target("config: Transformers", "model/config.json", JSON, skeleton, 0.3),
    Target("shard index", "sharded/model.safetensors.index.json", JSON, partial(model_folder, "sharded"), 2),
    Target("safetensors", "base.qalora/model.safetensors", TENSORS, tensors, 3),
    Target("canonical config", "base.qalora/config.json", JSON, canonical, 2),
    Target("canonical weights", "base.qalora/model.safetensors", TENSORS, canonical, 2),
    Target("manifest", "base.qalora/manifest.json", JSON, manifest, 2),
    Target("manifest of a merge", "merged.qalora/manifest.json", JSON, provenance, 2),
    Target("manifest of a GGUF", "model.gguf.manifest.json", JSON, provenance, 2),
    Target("adapter config", "adapter/adapter_config.json", JSON, ADAPTER, 1, sealed=True),
    Target(
        "adapter weights",
        "adapter/adapter_model.safetensors",
        TENSORS,
        partial(adapter, "adapter", "auto"),
        1,
        sealed=True,
    ),
    Target("adapter manifest", "adapter/manifest.json", JSON, ADAPTER, 1),
    Target("PEFT config", "peft/adapter_config.json", JSON, partial(adapter, "peft", "auto"), 2),
    Target("PEFT weights", "peft/adapter_model.safetensors", TENSORS, partial(adapter, "peft", "auto"), 2),
    Target("authors' config", "authors/adapter_config.json", JSON, partial(adapter, "authors", "mean"), 1),
    Target("GGUF", "model.gguf", GGUF, gguf, 3),
    Target("GGUF facts", "model.gguf", GGUF, gguf_facts, 1),
    Target("GGUF split base", "split.gguf", GGUF, gguf_split, 1),
    Target("GGUF split adapter", "split.lora.gguf", GGUF, gguf_split, 1),
    Target("ONNX graph", "onnx/onnx/model.onnx", GRAPH, onnx, 3),
    Target("ONNX graph facts", "onnx/onnx/model.onnx", GRAPH, onnx_facts, 2),
    Target("ONNX data", "onnx/onnx/model.onnx_data", BYTES, onnx, 0.5),
    Target("GenAI config", "onnx/genai_config.json", JSON, onnx_facts, 2),
    Target("tokenizer: Transformers", "model/tokenizer.json", JSON, tokenizer, 0.5),
    Target("tokenizer config: Transformers", "model/tokenizer_config.json", JSON, tokenizer, 1),
    Target("tokenizer: GGUF", "model/tokenizer.json", JSON, tokenizer_fields, 2),
    Target("tokenizer config: GGUF", "model/tokenizer_config.json", JSON, tokenizer_fields, 2),
    Target("generation config: GGUF", "model/generation_config.json", JSON, tokenizer_fields, 1),
    Target("tokenizer facts", "model/tokenizer.json", JSON, text_facts, 0.3),
    Target("chat template", "model/chat_template.jinja", JINJA, template, 0.5),
    Target("chat data", "data.jsonl", LINES, partial(records, "data.jsonl"), 2),
    Target("chat data, rendered", "data.jsonl", LINES, template, 0.3),
    Target("instructions", "instructions.jsonl", LINES, partial(records, "instructions.jsonl"), 2),
    Target("text data", "text.jsonl", LINES, partial(records, "text.jsonl"), 2),
    Target("plain text", "text.txt", BYTES, partial(records, "text.txt"), 1),
    Target("prompts", "data.jsonl", LINES, partial(prompts, "data.jsonl"), 2),
    Target("prompts, text", "text.txt", BYTES, partial(prompts, "text.txt"), 1),
    Target("calibration", "text.jsonl", LINES, partial(calibration, "text.jsonl"), 2),
    Target("calibration, text", "text.txt", BYTES, partial(calibration, "text.txt"), 1),
    Target("job", "job.npz", NPZ, job, 2),
    Target("answers", "answers.npz", NPZ, answers, 2),
    Target("run.json", "out/run.json", JSON, run_state, 2),
    Target("report.json", "out/report/report.json", JSON, run_summary, 1),
    Target("score", "out/score.merged.json", JSON, run_summary, 1),
    Target("training record", "adapter.training/run.json", JSON, training_record, 1),
    Target("commit mark", "adapter.training/checkpoint-2/complete.json", JSON, training_record, 1, fragile=True),
    Target("inspect a GGUF", "model.gguf", GGUF, stage(*INSPECT, "{}/model.gguf"), 0.3),
    Target("inspect ONNX", "onnx/onnx/model.onnx", GRAPH, stage(*INSPECT, "{}/onnx"), 0.3),
    Target("inspect a checkpoint", "base.qalora/config.json", JSON, stage(*INSPECT, "{}/base.qalora"), 0.3),
    Target("inspect weights", "base.qalora/model.safetensors", TENSORS, stage(*INSPECT, "{}/base.qalora"), 0.3),
    Target("inspect a manifest", "base.qalora/manifest.json", JSON, stage(*INSPECT, "{}/base.qalora"), 0.3),
    Target("inspect an adapter", "adapter/adapter_config.json", JSON, stage(*INSPECT, "{}/adapter"), 0.5),
    Target("inspect a model", "model/config.json", JSON, stage("inspect", "{}/model", "--facts"), 0.3),
    Target("compare", "model.gguf", GGUF, stage("inspect", "{}/model.gguf", "{}/base.qalora"), 0.2),
    Target("quantize", "model/config.json", JSON, QUANTIZE, 0.02),
    Target(
        "quantize weights",
        "model/model.safetensors",
        TENSORS,
        QUANTIZE,
        0.02,
    ),
    Target("GPTQ config", "gptq/config.json", JSON, stage("quantize", "{}/gptq", *FORCE), 0.05),
    Target("GPTQ weights", "gptq/model.safetensors", TENSORS, stage("quantize", "{}/gptq", *FORCE), 0.05),
    Target("export gguf", "base.qalora/config.json", JSON, stage("export", "gguf", "{}/base.qalora", *FORCE), 0.05),
    Target("export onnx", "base.qalora/config.json", JSON, stage("export", "onnx", "{}/base.qalora", *FORCE), 0.02),
    Target(
        "merge",
        "base.qalora/config.json",
        JSON,
        stage("merge", "{}/base.qalora", "{}/adapter", *FORCE, "--no-compare-logits"),
        0.05,
    ),
    Target(
        "train",
        "base.qalora/config.json",
        JSON,
        stage("train", "{}/base.qalora", "--data", "{}/data.jsonl", *FORCE, "--dry-run"),
        0.05,
    ),
    Target(
        "evaluate",
        "model/generation_config.json",
        JSON,
        stage("evaluate", "{}/model", "--data", "{}/data.jsonl", "--max-new-tokens", "2"),
        0.05,
    ),
    Target(
        "evaluate a config",
        "model/config.json",
        JSON,
        stage("evaluate", "{}/model", "--data", "{}/data.jsonl", "--max-new-tokens", "2"),
        0.05,
    ),
)
