"""The task score in PyTorch: greedy answers compared with the expected ones, as text or as regular expressions."""

from __future__ import annotations

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.canonical import is_canonical
from qalora_export.checkpoint.manifest import MANIFEST, is_ours, parent_of, require_intact
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.output import claim_output
from qalora_export.data.records import Record, iter_records
from qalora_export.data.rendering import render, require_template
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.progress import track
from qalora_export.recipe import EvaluateSettings
from qalora_export.safety import StrPath, atomic_file, inside, local_path, read_json, sha256_file

FORMAT = "qalora-score/1"
PYTORCH = "PyTorch"
SHOWN = 5  # wrong answers
Prompt = tuple[list[int], Record]  # token ids of everything before the answer


@dataclass(frozen=True, slots=True)
class Miss:
    """A wrong answer."""

    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True, slots=True)
class EvaluateReport:
    """Exact matches out of total; `misses` shows the first few wrong answers, `wrong` has the numbers of all.

    model_sha256: which model, as manifests name it. match: how answers were compared. runtime: what gave them.
    """

    model: str
    model_sha256: str
    data_sha256: str
    total: int
    exact: int
    misses: tuple[Miss, ...]
    max_new_tokens: int = 0
    wrong: tuple[int, ...] = ()
    match: str = "exact"
    runtime: str = PYTORCH

    @property
    def accuracy(self) -> float:
        return self.exact / self.total


def evaluate(
    model: StrPath, settings: EvaluateSettings, out: StrPath | None = None, *, force: bool = False
) -> EvaluateReport:
    """Score a model folder (plain or canonical) in float32; writes `out` as JSON when given.

    Every record must end in the expected answer. Prompts of equal length share a batch, so no padding enters the
    numbers. Raises InputError for unusable data.
    """
    model, out = local_path(model), None if out is None else local_path(out)
    with contextlib.ExitStack() as stack:
        if out is not None:
            stack.enter_context(claim_output(out, force=force, inputs=(model, settings.data)))
        if is_canonical(model) or is_ours(model / MANIFEST):  # a plain model's manifest.json is its own affair
            require_intact(model, "the model")
        return _evaluate(model, settings, out, force=force)


def _evaluate(model: Path, settings: EvaluateSettings, out: Path | None, *, force: bool) -> EvaluateReport:
    from qalora_export.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    prompts = questions(tokenizer, settings, context=ModelFolder(model).context)
    answers = answers_of(model, tokenizer, [ids for ids, _ in prompts], settings)
    score = scored(model, settings, [record for _, record in prompts], answers)
    if out is not None:
        write_score(out, score, force=force)
    return score


def scored(
    model: Path,
    settings: EvaluateSettings,
    records: Sequence[Record],
    answers: Sequence[str],
    *,
    runtime: str = PYTORCH,
) -> EvaluateReport:
    """answers: one per record."""
    wrong, misses = list[int](), list[Miss]()
    for index, (record, answer) in enumerate(zip(records, answers, strict=True)):
        expected = record.expected()
        if not matches(answer, expected, settings.match):
            wrong.append(index)
            if len(misses) < SHOWN:
                misses.append(Miss(record.messages[-2]["content"], expected, answer))
    which, data = parent_of(model, "checkpoint").sha256, sha256_file(Path(settings.data))
    return EvaluateReport(
        model.name,
        which,
        data,
        len(records),
        len(records) - len(wrong),
        tuple(misses),
        settings.max_new_tokens,
        tuple(wrong),
        settings.match,
        runtime,
    )


def write_score(out: Path, score: EvaluateReport, *, force: bool) -> None:
    with atomic_file(out, force=force) as temporary:
        content = {"format": FORMAT} | asdict(score) | {"accuracy": score.accuracy}
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def answers_of(model: Path, tokenizer: Any, prompts: list[list[int]], settings: EvaluateSettings) -> list[str]:
    """What a model folder answers to each prompt, in their order: greedy, in float32, without end token."""
    from qalora_export.models.loading import load_model

    ends = end_ids(model, tokenizer)
    return network_answers(load_model(model), tokenizer, prompts, settings, ends, f"evaluate {model.name}")


def network_answers(
    network: Any, tokenizer: Any, prompts: list[list[int]], settings: EvaluateSettings, ends: list[int], shown: str
) -> list[str]:
    """The same of a model in memory, in eval mode. ends: `end_ids` of its folder; shown: the name of the progress."""
    answers = [""] * len(prompts)
    for batch in track(_batches(prompts, settings.batch_size), shown):
        made = _answers(network, tokenizer, [prompts[index] for index in batch], settings.max_new_tokens, ends)
        for index, answer in zip(batch, made, strict=True):
            answers[index] = answer
    return answers


def answer_text(answer: Mapping[str, Any], tokenizer: Any, ends: Collection[int]) -> str:
    """What a runtime's answer says: its own text, else its ids by the tokenizer, without an end token."""
    if answer.get("text") is not None:
        return str(answer["text"])
    ids = [int(token) for token in answer["tokens"]]
    return str(tokenizer.decode(ids[:-1] if ids and ids[-1] in ends else ids, skip_special_tokens=True))


def matches(answer: str, expected: str, how: str = "exact") -> bool:
    """Whether an answer is the expected one: "exact", as text, but for space around it; "regex": the expected text is a
    regular expression that is found in the answer.
    """
    return answer.strip() == expected.strip() if how == "exact" else re.search(expected, answer.strip()) is not None


def asked_records(settings: EvaluateSettings) -> list[Record]:
    """The first settings.limit records. Raises InputError, with the line, as data.records does, for a record that does
    not end in an answer, and for an expected answer that is no regular expression where it must be one.
    """
    found = list[Record]()
    for record in islice(iter_records(Path(settings.data)), settings.limit):
        expected = record.expected()
        if settings.match == "regex":
            try:
                re.compile(expected)
            except re.error as error:
                raise InputError(
                    f"the expected answer {expected[:80]!r} is no regular expression",
                    where=record.where,
                    why=str(error),
                ) from error
        found.append(record)
    return found


def prompt_ids(tokenizer: Any, record: Record) -> list[int]:
    """Ids of all before the answer, by the tokenizer's chat template. Raises InputError without one."""
    require_template(record, tokenizer, otherwise="")
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    return [] if record.oversize else list(render(record, tokenizer, until=-1, **options)["input_ids"])


def require_room(ids: list[int], record: Record, settings: EvaluateSettings, *, context: int | None) -> None:
    """Raises InputError for a prompt that is empty or leaves no room for an answer in the model's context."""
    longest = None if context is None else context - settings.max_new_tokens
    if record.oversize or (longest is not None and len(ids) > longest):
        raise InputError(
            f"the prompt and its answer do not fit in the model's context ({len(ids) or 'a million'} tokens)",
            where=record.where,
            why=f"room for {longest} is left for the prompt",
            fix="shorten the line, or lower max_new_tokens",
        )
    if not ids:
        raise InputError(
            "the chat template renders this question to nothing", where=record.where, fix="check the chat template"
        )


def questions(tokenizer: Any, settings: EvaluateSettings, *, context: int | None) -> list[Prompt]:
    """What the model is asked, tokenized, and the record each came from. Raises as the three functions above."""
    prompts = list[Prompt]()
    for record in asked_records(settings):
        ids = prompt_ids(tokenizer, record)
        require_room(ids, record, settings, context=context)
        prompts.append((ids, record))
    return prompts


def end_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Every id that ends an answer: what the tokenizer, generation_config.json and config.json name, in that order.

    Models disagree about where they say it (Llama 3 has several, some only in config.json); runtimes stop at all.
    """
    found = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        content = read_json(inside(folder, name)) if (folder / name).exists() else {}
        value = content.get("eos_token_id") if isinstance(content, dict) else None
        found += value if isinstance(value, list) else [value]
    return list(dict.fromkeys(i for i in found if type(i) is int))


def _batches(prompts: list[list[int]], size: int) -> list[list[int]]:
    """Numbers of prompts of equal length together, at most `size`."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    groups = [by_length[length] for length in sorted(by_length)]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def _answers(network: Any, tokenizer: Any, prompts: list[list[int]], limit: int, ends: list[int]) -> list[str]:
    import torch
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    # Greedy whatever the model's own generation config says: the network's would fill in what an argument leaves out.
    network.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends or None, pad_token_id=pad, do_sample=False, num_beams=1
    )
    ids = torch.tensor(prompts)
    with torch.no_grad():
        grown = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit)
    rows = (row.tolist() for row in grown[:, ids.shape[1] :])
    kept = (row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in kept]


def read_score(path: Path) -> dict[str, Any]:
    """A score written by `evaluate`, with exact, total and accuracy. Raises UnsafeInputError for anything else."""
    score = read_json(path)
    known = isinstance(score, dict) and all(type(score.get(key)) is int for key in ("exact", "total"))
    if not known or not isinstance(score.get("accuracy"), float):
        raise UnsafeInputError("not a score of `evaluate`", where=path, fix="run the stage again")
    return dict(score)
