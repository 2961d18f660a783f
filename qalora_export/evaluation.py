"""The task score: greedy answers compared with the expected ones as text (exact match)."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qalora_export.data.records import Record, read_records
from qalora_export.data.samples import render
from qalora_export.errors import InputError
from qalora_export.progress import track
from qalora_export.recipe import EvaluateSettings
from qalora_export.safety import StrPath, atomic_file, refuse_existing, sha256_file

Prompt = tuple[list[int], Record]  # token ids of everything before the answer


@dataclass(frozen=True, slots=True)
class Miss:
    """A wrong answer."""

    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True, slots=True)
class EvaluateReport:
    """Exact matches out of total; `misses` shows the first few wrong answers."""

    model: str
    data_sha256: str
    total: int
    exact: int
    misses: tuple[Miss, ...]

    @property
    def accuracy(self) -> float:
        return self.exact / self.total


def evaluate(
    model: StrPath, settings: EvaluateSettings, out: StrPath | None = None, *, force: bool = False
) -> EvaluateReport:
    """Score a model folder (plain or canonical) on chat JSONL in float32; writes `out` as JSON when given.

    Prompts of equal length share a batch, so no padding enters the numbers. Raises InputError for unusable data.
    """
    from qalora_export.models.loading import load_model, load_tokenizer

    model, out = Path(model), None if out is None else Path(out)
    if out is not None:
        refuse_existing(out, force=force)
    samples = read_samples(Path(settings.data))[: settings.limit]
    network, tokenizer = load_model(model), load_tokenizer(model)
    context = network.config.max_position_embeddings
    batches = _batches(tokenizer, samples, settings.batch_size, context - settings.max_new_tokens, Path(settings.data))
    exact, misses = 0, list[Miss]()
    for batch in track(batches, f"evaluate {model.name}"):
        answers = _answers(network, tokenizer, [ids for ids, _ in batch], settings.max_new_tokens)
        for (_, sample), answer in zip(batch, answers, strict=True):
            expected = sample.messages[-1][1]
            if answer == expected.strip():
                exact += 1
            elif len(misses) < 5:
                misses.append(Miss(sample.messages[-2][1], expected, answer))
    score = EvaluateReport(model.name, sha256_file(Path(settings.data)), len(samples), exact, tuple(misses))
    if out is not None:
        with atomic_file(out, force=force) as temporary:
            temporary.write_text(json.dumps(asdict(score) | {"accuracy": score.accuracy}, indent=2) + "\n", "utf-8")
    return score


def read_samples(path: Path) -> list[Record]:
    """Chat lines whose last turn is the assistant's. Raises InputError with the line number of the first bad one."""
    records = read_records(path, "chat")
    for record in records:
        if len(record.messages) < 2 or record.messages[-1][0] != "assistant":
            raise InputError(
                "the last turn must be the assistant's answer",
                where=f"{path}, line {record.line}",
                why="it is the text that the model's answer is compared with",
            )
    return records


def _batches(tokenizer: Any, samples: list[Record], size: int, longest: int, where: Path) -> list[list[Prompt]]:
    """Prompts of equal length together, at most `size`. Raises InputError for one that the context cannot hold."""
    by_length: dict[int, list[Prompt]] = defaultdict(list)
    for sample in samples:
        place = f"{where}, line {sample.line}"
        ids = list(render(sample.messages[:-1], tokenizer, place, add_generation_prompt=True)["input_ids"])
        if len(ids) > longest:
            raise InputError(
                f"the prompt and its answer do not fit in the model's context ({len(ids)} tokens)",
                where=place,
                why=f"room for {longest} is left for the prompt",
                fix="shorten the line, or lower max_new_tokens",
            )
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
