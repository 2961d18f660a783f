"""The task score: greedy answers compared with the expected ones as text (exact match)."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qalora_export.console import track
from qalora_export.errors import InputError
from qalora_export.recipe import EvaluateSettings
from qalora_export.safety import atomic_file, sha256_file


@dataclass(frozen=True, slots=True)
class Score:
    """Exact matches out of total; `misses` shows the first few wrong answers."""

    model: str
    data_sha256: str
    total: int
    exact: int
    misses: list[dict[str, str]]

    @property
    def accuracy(self) -> float:
        return self.exact / self.total


def evaluate(model: Path, settings: EvaluateSettings, out: Path | None = None, *, force: bool = False) -> Score:
    """Score a model folder (plain or canonical) on chat JSONL in float32; writes `out` as JSON when given.

    Prompts of equal length share a batch, so no padding enters the numbers. Raises InputError for unusable data.
    """
    from qalora_export.qalora.reference import load_model, load_tokenizer

    samples = read_samples(Path(settings.data))[: settings.limit]
    network, tokenizer = load_model(model), load_tokenizer(model)
    batches = _batches(tokenizer, samples, settings.batch_size)
    exact, misses = 0, list[dict[str, str]]()
    for batch in track(batches, f"evaluate {model.name}"):
        answers = _answers(network, tokenizer, [ids for ids, _ in batch], settings.max_new_tokens)
        for (_, sample), answer in zip(batch, answers, strict=True):
            if answer == sample[-1]["content"].strip():
                exact += 1
            elif len(misses) < 5:
                misses.append({"prompt": sample[-2]["content"], "expected": sample[-1]["content"], "answer": answer})
    score = Score(model.name, sha256_file(Path(settings.data)), len(samples), exact, misses)
    if out is not None:
        with atomic_file(out, force=force) as temporary:
            temporary.write_text(json.dumps(asdict(score) | {"accuracy": score.accuracy}, indent=2) + "\n", "utf-8")
    return score


def read_samples(path: Path) -> list[list[dict[str, str]]]:
    """Chat lines whose last turn is the assistant's. Raises InputError with the line number of the first bad one."""
    if not path.is_file():
        raise InputError("evaluation data not found", where=path, fix="check [evaluate] data in the recipe")
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            usable = (
                len(messages) >= 2 and messages[-1]["role"] == "assistant" and isinstance(messages[-1]["content"], str)
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError("line is not a chat sample", where=f"{path}:{number}", why=repr(error)) from error
        if not usable:
            raise InputError("the last turn must be the assistant's answer", where=f"{path}:{number}")
        samples.append(messages)
    if not samples:
        raise InputError("evaluation data is empty", where=path)
    return samples


def _batches(tokenizer: Any, samples: list[list[dict[str, str]]], size: int) -> list[list[tuple[list[int], Any]]]:
    by_length: dict[int, list[tuple[list[int], Any]]] = defaultdict(list)
    for sample in samples:
        text = tokenizer.apply_chat_template(sample[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        by_length[len(ids)].append((ids, sample))
    groups = [by_length[length] for length in sorted(by_length)]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def _answers(network: Any, tokenizer: Any, prompts: list[list[int]], limit: int) -> list[str]:
    import torch

    ids = torch.tensor(prompts)
    with torch.no_grad():
        grown = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in grown[:, ids.shape[1] :]]
