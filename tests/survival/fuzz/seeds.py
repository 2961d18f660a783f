"""One small valid file of every kind, made from a random Llama of 2 layers: what the mutators start from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from qalora_runtimes.packs import PACK, RUN, AnswersWriter, Pack, PackedRequest, request_key
from qalora_runtimes.protocol import TextRequest, make_job, write_answers, write_job

from qalora_export.checkpoint.model_folder import INDEX
from qalora_export.checkpoint.safetensors_file import read_header
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.patch.export import export_patch
from qalora_export.qalora.merge import merge
from qalora_export.qalora.training import folder as training_folder
from qalora_export.recipe import GgufSettings
from qalora_export.safety import sha256_file
from tests.formats.patch.artifacts import moved
from tests.models import make_tiny_canonical, make_tiny_model
from tests.qalora.adapters import foreign_adapter, own_adapter
from tests.quantization.gptq_packer import make_gptq_folder
from tests.survival.fuzz.readers import ABOUT
from tests.verify.exports import export_both

RECIPE = """
model = "model"
out = "out"
[quantize]
method = "rtn"
bits = 4
rules = [{match = "*.up_proj", bits = 3}]
[train]
data = "data.jsonl"
rank = 8
targets = ["*"]
learning_rate = 1e-3
max_steps = 2
seed = 1
[evaluate]
data = "data.jsonl"
[export.gguf]
layout = "q4_1"
[verify]
runtimes = ["llama.cpp"]
threads = 1
"""
LINES = (
    '{"messages": [{"role": "user", "content": "on"}, {"role": "assistant", "content": "done"}]}\n'
    '{"messages": [{"role": "user", "content": "off"}, {"role": "assistant", "content": "é 東"}]}\n'
)
REPORT = {
    "format": "qalora-parity/1",
    "verdict": "pass",
    "exit_code": 0,
    "gates": [
        {
            "gate": gate,
            "title": "t",
            "row": "r",
            "headline": 0.0,
            "figure": "f",
            "runtime": "llama.cpp",
            "status": "pass",
            "measured": 0.0,
            "bound": 1.0,
            "unit": "u",
        }
        for gate in ("G0", "G1", "G2", "G3", "G4", "G5", "G6")
    ],
    "provenance": [
        {"child": "a", "role": "base", "parent": "b", "sha256": "0" * 64, "state": "verified", "note": ""},
    ],
}
SCORE = {"model": "m", "data_sha256": "0" * 64, "total": 4, "exact": 3, "accuracy": 0.75, "misses": []}


def make_seeds(folder: Path) -> Path:
    """Fill an empty folder; about ten seconds."""
    make_tiny_model(folder / "model")
    base = make_tiny_canonical(folder / "base.qalora", folder / "model")
    own_adapter(base, folder / "adapter")
    foreign_adapter(folder / "peft", use_qalora=True, qalora_group_size=32)
    foreign_adapter(folder / "authors")
    merge(base, folder / "adapter", folder / "merged.qalora", compare_logits=False)
    make_gptq_folder(folder / "gptq", folder / "model")
    export_both(base, folder)
    export_gguf(base, folder / "split.gguf", GgufSettings(layout="split"))
    shutil.copytree(folder / "model", folder / "sharded")
    names = list(read_header(folder / "sharded/model.safetensors"))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "sharded" / INDEX).write_text(json.dumps(index))
    _small_files(folder)
    _run_folder(folder)
    _training_folder(folder)
    _device_files(folder)
    export_gguf(moved(base, folder / "moved.qalora", 1), folder / "moved.gguf")
    export_patch(folder / "model.gguf", folder / "moved.gguf", folder / "gguf.patch")
    return folder


def _small_files(folder: Path) -> None:
    request = TextRequest(("a",), (({"role": "user", "content": "b"},),))
    write_job(folder / "job.npz", make_job([[1, 2], [3, 4, 5]], text=request))
    write_answers(folder / "answers.npz", [np.zeros((5, 7), np.float32)] * 2, {"texts": []})
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "data.jsonl").write_text(LINES, encoding="utf-8")
    (folder / "instructions.jsonl").write_text('{"instruction": "a", "input": "b", "output": "c"}\n')
    (folder / "text.jsonl").write_text('{"text": "on and off"}\n{"text": "é"}\n' * 9, encoding="utf-8")
    (folder / "text.txt").write_text("Turn the lights in the kitchen on.\n\nAnd off.\n" * 9, encoding="utf-8")


def _run_folder(folder: Path) -> None:
    """What `run` leaves, as far as something reads it."""
    out = folder / "out"
    (out / "report").mkdir(parents=True)
    (out / "run.json").write_text('{"format": "qalora-run/1", "stages": {"train": {"key": "a", "output": null}}}')
    (out / "report" / "report.json").write_text(json.dumps(REPORT))
    for name in ("base", "merged"):
        (out / f"score.{name}.json").write_text(json.dumps(SCORE))


def _training_folder(folder: Path) -> None:
    """A killed training run with one complete checkpoint."""
    checkpoint = folder / "adapter.training" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    training_folder.write_json(folder / "adapter.training" / "run.json", {"settings": {"rank": 4}, "base": "0"})
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    training_folder.mark_complete(checkpoint)


def _device_files(folder: Path) -> None:
    """A pack of one question, and a device's answers to it."""
    pack = folder / "pack"
    pack.mkdir()
    for name in ("model.gguf", "job.npz"):
        shutil.copyfile(folder / name, pack / name)
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in pack.iterdir()}
    key = request_key({"runtime": "llama.cpp"}, [(name, file["sha256"]) for name, file in files.items()])
    request = PackedRequest(key, RUN, "llama.cpp", "model.gguf", "job.npz", exact=True, threads=1)
    raw = json.dumps(Pack("0", ABOUT, files, (request,)).as_json()).encode()
    (pack / PACK).write_bytes(raw)
    (folder / "fingerprint.json").write_text('{"runtime": "llama.cpp"}')
    answered = {"logits.npz": folder / "answers.npz", "fingerprint.json": folder / "fingerprint.json"}
    with AnswersWriter(folder / "answers.zip", raw) as writer:
        members = {name: writer.add(f"{key}/{name}", source) for name, source in answered.items()}
        outcome = {"status": "ok", "message": "", "members": members}
        writer.close({"machine": {"flags": ["avx2"]}, "packages": {"numpy": "2"}, "requests": {key: outcome}})
