"""One tiny model as GGUF and ONNX, its probe, and what PyTorch says about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from qalora_runtimes.protocol import Job, make_job

from tests.conftest import MadeOnce
from tests.runtimes.artifacts import write_gguf, write_onnx

LENGTHS = (1, 2, 17, 40)


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: Path, made_once: MadeOnce) -> Path:
    return made_once("float-gguf", lambda folder: write_gguf(tiny_model, folder / "model.gguf")) / "model.gguf"


@pytest.fixture(scope="session")
def tiny_onnx(tiny_model: Path, made_once: MadeOnce) -> Path:
    return made_once("float-onnx", lambda folder: write_onnx(tiny_model, folder / "model")) / "model"


@pytest.fixture(scope="session")
def vocabulary(tiny_model: Path) -> int:
    return json.loads((tiny_model / "config.json").read_text())["vocab_size"]


@pytest.fixture(scope="session")
def job(vocabulary: int) -> Job:
    random = np.random.default_rng(5)
    return make_job([random.integers(0, vocabulary, length) for length in LENGTHS])


@pytest.fixture(scope="session")
def expected(tiny_model: Path, job: Job) -> np.ndarray:
    """float64 (total, vocab): log softmax of Transformers' float32 logits."""
    return torch_logprobs(tiny_model, job)


def torch_logprobs(model: Path, job: Job) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        rows = [network(torch.tensor(ids[None].astype(np.int64))).logits[0].double() for ids in job.sequences]
    return torch.cat([torch.log_softmax(row, -1) for row in rows]).numpy()


def worst_nmse(actual: np.ndarray, reference: np.ndarray) -> float:
    """The largest of the per-position normalized mean squared errors."""
    error = np.square(actual.astype(np.float64) - reference).sum(-1)
    return float((error / np.square(reference).sum(-1)).max())
