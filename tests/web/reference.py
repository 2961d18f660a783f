"""What PyTorch says, and the bounds that every host is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qalora_export.models.loading import load_tokenizer
from qalora_export.verify.metrics import position_metrics
from qalora_export.verify.reference.logits import float32_model

G2_NMSE = 1e-9
# Int8 noise is chaotic: another order of float32 sums moves a position's by a factor of two and more, either way, and
# the largest of a dozen with it. What two right kernels have in common is how much there is of it.
SAME_NOISE, WORST_NOISE = 1.25, 5.0
ANSWER = [{"role": "user", "content": "turn on the lamp in the kitchen"}]
NEW_TOKENS = 40


def expected(checkpoint: Path, chat: list[dict[str, str]], new_tokens: int) -> tuple[NDArray[Any], list[int]]:
    """PyTorch's float32 logits of the chat's prompt, (1, positions, vocabulary), and the greedy answer's ids."""
    tokenizer, model = load_tokenizer(checkpoint), float32_model(checkpoint)
    ids = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]])
    with torch.inference_mode():
        logits = model(ids).logits.numpy()
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return logits, answer[0, ids.shape[1] :].tolist()


def nmse(reference: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """Per row of log-probabilities, both renormalised: gate G2's figure."""
    return position_metrics(reference, found, np.full(len(reference), -1, np.int32)).nmse


def assert_as_noisy(found: NDArray[np.float64], here: NDArray[np.float64]) -> None:
    """A host's NMSE per position is what int8 activations cost in the same runtime in Python, whose NMSE is `here`."""
    typical = float(np.exp(np.log(found / here).mean()))
    assert typical <= SAME_NOISE, (typical, found, here)
    assert found.max() <= WORST_NOISE * here.max(), (found, here)
