"""What reads the damaged files: each function gets the folder of seeds with one file damaged.

It may answer or raise one of our errors, nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What an answer must be to; the same in the seeds' pack.
ABOUT: dict[str, Any] = {
    "checkpoint": {"name": "base.qalora", "sha256": "0" * 64},
    "artifacts": {},
    "settings": {"seed": 0},
    "probe_sha256": "1" * 64,
    "task_sha256": None,
}


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
    from qalora_export.recipe_file import dump_toml, load_recipe

    dump_toml(load_recipe(folder / "recipe.toml"))


def job(folder: Path) -> None:
    from qalora_runtimes.protocol import read_job

    read_job(folder / "job.npz")


def answers(folder: Path) -> None:
    from qalora_runtimes.protocol import read_answers

    read_answers(folder / "answers.npz", positions=5)


def pack(folder: Path) -> None:
    from qalora_runtimes.answering import check_files
    from qalora_runtimes.packs import read_pack

    check_files(folder / "pack", read_pack(folder / "pack")[0])


def device_answers(folder: Path) -> None:
    from qalora_export.safety import HashedOnce
    from qalora_export.verify.device.answers import DeviceAnswers

    found = DeviceAnswers(folder / "answers.zip", HashedOnce())
    found.described()
    found.require(ABOUT)


def patch(folder: Path) -> None:
    from qalora_export.formats.patch.apply import apply

    (folder / "patched").mkdir(exist_ok=True)
    try:
        apply(folder / "gguf.patch", folder / "model.gguf", folder / "patched" / "model.gguf")
    finally:
        for path in (folder / "patched").iterdir():
            path.unlink()
        (folder / "patched").rmdir()


def run_state(folder: Path) -> None:
    from qalora_export.pipeline import _State

    _State(folder / "out" / "run.json")


def run_summary(folder: Path) -> None:
    from qalora_export.cli.run_summary import print_summary
    from qalora_export.model_card import write_card
    from qalora_export.recipe_file import load_recipe

    loaded = load_recipe(folder / "recipe.toml")
    print_summary(loaded)
    write_card(loaded)


def training_record(folder: Path) -> None:
    from qalora_export.qalora.training.folder import last_checkpoint, prepare

    record = folder / "adapter.training"
    prepare(record, {"settings": {"rank": 4}, "base": "0"}, resume=True, force=False)
    last_checkpoint(record)
