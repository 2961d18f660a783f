"""Ask llama.cpp, in a process of its own, about a GGUF file; and PyTorch about the same model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes.launch import run_runner
from qalora_runtimes.protocol import TextRequest, make_job


@dataclass
class Answer:
    """logprobs: float64 (positions, vocab) per sequence; tokens: ids per text; rendered: text per chat."""

    logprobs: list[np.ndarray]
    tokens: list[list[int]]
    rendered: list[str]


def ask(model: Path, workdir: Path, *, ids: Any, lora: Path | None = None, texts: Any = (), chats: Any = ()) -> Answer:
    """Every position of every sequence, rounding-free kernels; AssertionError with the runtime's own words."""
    request = TextRequest(tuple(texts), tuple(map(tuple, chats))) if texts or chats else None
    job = make_job(ids, text=request)
    result = run_runner("llama.cpp", model=model, job=job, workdir=workdir / "run", exact=True, lora=lora)
    assert result.status == "ok", result.message + result.log
    assert result.logprobs is not None
    rows = np.split(result.logprobs.astype(np.float64), np.cumsum([len(row) for row in ids])[:-1])
    answers = result.text_answers or {"texts": [], "rendered": []}
    return Answer(rows, answers["texts"], answers["rendered"])


def torch_logprobs(folder: Path, ids: Any) -> list[np.ndarray]:
    """float64 log-softmax of the PyTorch fp32 reference at every position, one array per sequence."""
    import torch

    from qalora_export.models.loading import load_model

    model = load_model(folder, attention="eager")
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0].double() for row in ids]
    return [torch.log_softmax(rows, -1).numpy() for rows in logits]


def nmse(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Normalized squared error per position: |found − reference|² / |reference|²."""
    return ((found - reference) ** 2).sum(-1) / (reference**2).sum(-1)
