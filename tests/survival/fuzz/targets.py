"""Every reader of files that somebody else may have made: which file is damaged, how, and what reads it.

`read` gets the folder of seeds with one file damaged. It may answer or raise one of our errors, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.survival.fuzz import commands, languages, mutate, readers, structures
from tests.survival.fuzz.mutate import Mutator

Read = Callable[[Path], object]
BYTES: tuple[Mutator, ...] = (mutate.any_bytes,)
JSON: tuple[Mutator, ...] = (mutate.json_text, mutate.json_text, mutate.json_text, mutate.any_bytes)
LINES: tuple[Mutator, ...] = (mutate.json_lines, mutate.json_lines, mutate.any_bytes)
TENSORS: tuple[Mutator, ...] = (structures.safetensors, structures.safetensors, mutate.any_bytes)
GGUF: tuple[Mutator, ...] = (structures.gguf, structures.gguf, mutate.any_bytes)
GRAPH: tuple[Mutator, ...] = (structures.protobuf, structures.protobuf, structures.protobuf, mutate.any_bytes)
NPZ: tuple[Mutator, ...] = (structures.npz, mutate.any_bytes)
STORED: tuple[Mutator, ...] = (structures.stored, structures.stored, structures.npz, mutate.any_bytes)
TOML: tuple[Mutator, ...] = (languages.toml, languages.toml, mutate.any_bytes)
JINJA: tuple[Mutator, ...] = (languages.jinja, mutate.any_bytes)


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


ADAPTER = partial(readers.adapter, "adapter", "auto")
INSPECT = ("inspect", "--facts", "--check")
FORCE = ("--out", "{}/new", "--force")
QUANTIZE = commands.stage("quantize", "{}/model", *FORCE, "--method", "rtn")
MERGE = commands.stage("merge", "{}/base.qalora", "{}/adapter", *FORCE, "--no-compare-logits")
TRAIN = commands.stage("train", "{}/base.qalora", "--data", "{}/data.jsonl", *FORCE, "--dry-run")
EVALUATE = commands.stage("evaluate", "{}/model", "--data", "{}/data.jsonl", "--max-new-tokens", "2")

TARGETS = (
    Target("recipe", "recipe.toml", TOML, readers.recipe, 2),
    Target("arguments", "arguments.txt", BYTES, commands.arguments, 0.5),
    Target("config: families", "model/config.json", JSON, readers.architecture, 2),
    Target("config: Transformers", "model/config.json", JSON, readers.skeleton, 0.3),
    Target("shard index", "sharded/model.safetensors.index.json", JSON, partial(readers.model_folder, "sharded"), 2),
    Target("safetensors", "base.qalora/model.safetensors", TENSORS, readers.tensors, 3),
    Target("canonical config", "base.qalora/config.json", JSON, readers.canonical, 2),
    Target("canonical weights", "base.qalora/model.safetensors", TENSORS, readers.canonical, 2),
    Target("manifest", "base.qalora/manifest.json", JSON, readers.manifest, 2),
    Target("manifest of a merge", "merged.qalora/manifest.json", JSON, readers.provenance, 2),
    Target("manifest of a GGUF", "model.gguf.manifest.json", JSON, readers.provenance, 2),
    Target("adapter config", "adapter/adapter_config.json", JSON, ADAPTER, 1, sealed=True),
    Target(
        "adapter weights",
        "adapter/adapter_model.safetensors",
        TENSORS,
        partial(readers.adapter, "adapter", "auto"),
        1,
        sealed=True,
    ),
    Target("adapter manifest", "adapter/manifest.json", JSON, ADAPTER, 1),
    Target("PEFT config", "peft/adapter_config.json", JSON, partial(readers.adapter, "peft", "auto"), 2),
    Target("PEFT weights", "peft/adapter_model.safetensors", TENSORS, partial(readers.adapter, "peft", "auto"), 2),
    Target("authors' config", "authors/adapter_config.json", JSON, partial(readers.adapter, "authors", "mean"), 1),
    Target("GGUF", "model.gguf", GGUF, readers.gguf, 3),
    Target("GGUF facts", "model.gguf", GGUF, readers.gguf_facts, 1),
    Target("GGUF split base", "split.gguf", GGUF, readers.gguf_split, 1),
    Target("GGUF split adapter", "split.lora.gguf", GGUF, readers.gguf_split, 1),
    Target("ONNX graph", "onnx/onnx/model.onnx", GRAPH, readers.onnx, 3),
    Target("ONNX graph facts", "onnx/onnx/model.onnx", GRAPH, readers.onnx_facts, 2),
    Target("ONNX data", "onnx/onnx/model.onnx_data", BYTES, readers.onnx, 0.5),
    Target("GenAI config", "onnx/genai_config.json", JSON, readers.onnx_facts, 2),
    Target("tokenizer: Transformers", "model/tokenizer.json", JSON, readers.tokenizer, 0.5),
    Target("tokenizer config: Transformers", "model/tokenizer_config.json", JSON, readers.tokenizer, 1),
    Target("tokenizer: GGUF", "model/tokenizer.json", JSON, readers.tokenizer_fields, 2),
    Target("tokenizer config: GGUF", "model/tokenizer_config.json", JSON, readers.tokenizer_fields, 2),
    Target("generation config: GGUF", "model/generation_config.json", JSON, readers.tokenizer_fields, 1),
    Target("tokenizer facts", "model/tokenizer.json", JSON, readers.text_facts, 0.3),
    Target("chat template", "model/chat_template.jinja", JINJA, readers.template, 0.5),
    Target("chat data", "data.jsonl", LINES, partial(readers.records, "data.jsonl"), 2),
    Target("chat data, rendered", "data.jsonl", LINES, readers.template, 0.3),
    Target("instructions", "instructions.jsonl", LINES, partial(readers.records, "instructions.jsonl"), 2),
    Target("text data", "text.jsonl", LINES, partial(readers.records, "text.jsonl"), 2),
    Target("plain text", "text.txt", BYTES, partial(readers.records, "text.txt"), 1),
    Target("prompts", "data.jsonl", LINES, partial(readers.prompts, "data.jsonl"), 2),
    Target("prompts, text", "text.txt", BYTES, partial(readers.prompts, "text.txt"), 1),
    Target("calibration", "text.jsonl", LINES, partial(readers.calibration, "text.jsonl"), 2),
    Target("calibration, text", "text.txt", BYTES, partial(readers.calibration, "text.txt"), 1),
    Target("job", "job.npz", NPZ, readers.job, 2),
    Target("answers", "answers.npz", NPZ, readers.answers, 2),
    Target("pack", "pack/pack.json", JSON, readers.pack, 2),
    Target("device's answers", "answers.zip", STORED, readers.device_answers, 2),
    Target("patch", "gguf.patch", STORED, readers.patch, 2),
    Target("run.json", "out/run.json", JSON, readers.run_state, 2),
    Target("report.json", "out/report/report.json", JSON, readers.run_summary, 1),
    Target("score", "out/score.merged.json", JSON, readers.run_summary, 1),
    Target("training record", "adapter.training/run.json", JSON, readers.training_record, 1),
    Target(
        "commit mark", "adapter.training/checkpoint-2/complete.json", JSON, readers.training_record, 1, fragile=True
    ),
    Target("inspect a GGUF", "model.gguf", GGUF, commands.stage(*INSPECT, "{}/model.gguf"), 0.3),
    Target("inspect ONNX", "onnx/onnx/model.onnx", GRAPH, commands.stage(*INSPECT, "{}/onnx"), 0.3),
    Target("inspect a checkpoint", "base.qalora/config.json", JSON, commands.stage(*INSPECT, "{}/base.qalora"), 0.3),
    Target(
        "inspect weights", "base.qalora/model.safetensors", TENSORS, commands.stage(*INSPECT, "{}/base.qalora"), 0.3
    ),
    Target("inspect a manifest", "base.qalora/manifest.json", JSON, commands.stage(*INSPECT, "{}/base.qalora"), 0.3),
    Target("inspect an adapter", "adapter/adapter_config.json", JSON, commands.stage(*INSPECT, "{}/adapter"), 0.5),
    Target("inspect a model", "model/config.json", JSON, commands.stage("inspect", "{}/model", "--facts"), 0.3),
    Target("compare", "model.gguf", GGUF, commands.stage("inspect", "{}/model.gguf", "{}/base.qalora"), 0.2),
    Target("quantize", "model/config.json", JSON, QUANTIZE, 0.02),
    Target("quantize weights", "model/model.safetensors", TENSORS, QUANTIZE, 0.02),
    Target("GPTQ config", "gptq/config.json", JSON, commands.stage("quantize", "{}/gptq", *FORCE), 0.05),
    Target("GPTQ weights", "gptq/model.safetensors", TENSORS, commands.stage("quantize", "{}/gptq", *FORCE), 0.05),
    Target(
        "export gguf", "base.qalora/config.json", JSON, commands.stage("export", "gguf", "{}/base.qalora", *FORCE), 0.05
    ),
    Target(
        "export onnx", "base.qalora/config.json", JSON, commands.stage("export", "onnx", "{}/base.qalora", *FORCE), 0.02
    ),
    Target("merge", "base.qalora/config.json", JSON, MERGE, 0.05),
    Target("train", "base.qalora/config.json", JSON, TRAIN, 0.05),
    Target("evaluate", "model/generation_config.json", JSON, EVALUATE, 0.05),
    Target("evaluate a config", "model/config.json", JSON, EVALUATE, 0.05),
)
