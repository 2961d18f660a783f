"""An exported artifact in its own runtime: ids of texts and conversations, greedy answers, log-probabilities.

llama.cpp reads and renders by the tokenizer and template that the GGUF file carries, ONNX runtimes run ids of the
tokenizer files in their folder. Every call is a process of its own (qalora_runtimes.launch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.behaviour import QUESTIONS, Question, Request
from qalora_runtimes.heartbeat import TOKENS
from qalora_runtimes.launch import run_runner
from qalora_runtimes.protocol import Job, TextRequest

from qalora_export.data.records import Record
from qalora_export.data.rendering import around, plain_ids
from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.evaluation import answer_text, end_ids, prompt_ids
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.onnx.layout import is_onnx_folder
from qalora_export.models.families.family import Format
from qalora_export.models.loading import load_tokenizer
from qalora_export.progress import task
from qalora_export.safety import inside, read_json
from qalora_export.verify.runtimes.record import all_runtimes, requested
from qalora_export.verify.runtimes.runs import run_error, watch_of

ANSWER_BYTES = 1 << 29  # of log-probabilities in one run
USUAL = {"gguf": "llama.cpp", "onnx": "onnxruntime"}
MAGIC = b"GGUF"


def format_of(path: Path) -> Format | None:
    """Of an exported artifact; None for anything else."""
    if path.is_file():
        with path.open("rb") as file:
            return "gguf" if file.read(len(MAGIC)) == MAGIC else None
    return "onnx" if path.is_dir() and is_onnx_folder(path) else None


@dataclass
class Running:
    """path: a GGUF file or an ONNX folder; workdir: a scratch folder; runtime: by name, None for the usual one.

    Raises InputError for a runtime that does not run this format. Every method raises RuntimeUnavailableError when the
    runtime is missing or crashes.
    """

    path: Path
    workdir: Path
    runtime: str | None = None
    threads: int = 2

    def __post_init__(self) -> None:
        fmt = format_of(self.path)
        if fmt is None:
            raise InputError("neither a GGUF file nor an ONNX folder", where=self.path)
        self.format: Format = fmt
        [self.name] = requested([self.runtime or USUAL[fmt]], {fmt: self.path})
        self._artifact = all_runtimes()[self.name].shipped(self.path)

    @cached_property
    def tokenizer(self) -> Any:
        """Of an ONNX folder."""
        return load_tokenizer(self.path)

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that are no part of an answer; llama.cpp leaves them out of its texts itself."""
        return frozenset() if self.format == "gguf" else frozenset(end_ids(self.path, self.tokenizer))

    @cached_property
    def _sizes(self) -> tuple[int, int | None]:
        """(vocabulary, context)"""
        if self.format == "gguf":
            said = GgufFile(self.path).metadata
            context = said.get(f"{said.get('general.architecture')}.context_length")
            return len(said["tokenizer.ggml.tokens"]), context if type(context) is int else None
        config = read_json(inside(self.path, "config.json"))
        context = config.get("max_position_embeddings")
        return int(config["vocab_size"]), context if type(context) is int else None

    @property
    def context(self) -> int | None:
        return self._sizes[1]

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """Ids of all before the last answer of each conversation, ready for an answer. Raises InputError."""
        if self.format == "onnx":
            return [prompt_ids(self.tokenizer, record) for record in records]
        for record in records:
            if record.options or record.documents:
                raise InputError(
                    "llama.cpp cannot be given chat_template_kwargs or documents",
                    where=record.where,
                    fix="remove them, or evaluate the checkpoint or the ONNX folder",
                )
        chats = tuple({"messages": [*r.messages[:-1]]} | ({"tools": [*r.tools]} if r.tools else {}) for r in records)
        said = self._text(TextRequest((), chats))
        for record, ids in zip(records, said["rendered_ids"], strict=True):
            if ids is None:
                raise InputError(
                    "llama.cpp's template engine refuses the conversation",
                    where=record.where,
                    why="; ".join(said["errors"])[:500],
                    fix="check the order of roles the model's template expects",
                )
        return [list(ids) for ids in said["rendered_ids"]]

    def ids_of(self, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """(ids that stand before a text, ids of each text without them); special tokens spelled in it are recognised,
        as Hugging Face's tokenizers do.
        """
        if self.format == "onnx":
            return around(self.tokenizer)[0], [plain_ids(self.tokenizer, text) for text in texts]
        said = self._text(TextRequest(tuple(texts)))
        before = [int(said["bos_id"])] if said["adds_bos"] else []
        return before, [list(ids[len(before) :]) for ids in said["texts"]]

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
        """Greedy answers of at most `tokens` tokens, as the runtime itself generates and shows them."""
        asked = Request(scored=tuple(Question(tuple(ids), tokens) for ids in prompts))
        found = self._run(Job((_row(prompts[0][:1]),), "prefill", behaviour=asked), "answers").behaviour
        made = found.get("scored") if isinstance(found, dict) else None
        if not isinstance(made, list) or len(made) != len(prompts):
            raise RuntimeUnavailableError(f"{self.name} gave no answers", where=self.path)
        tokenizer = self.tokenizer if self.format == "onnx" else None
        return [answer_text(answer, tokenizer, self.ends) for answer in made]

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        """Of each sequence (n, vocabulary): row i is the log softmax after its first i + 1 ids."""
        rows, begin = max(1, ANSWER_BYTES // (4 * self._sizes[0])), 0
        while begin < len(sequences):
            end, total = begin + 1, len(sequences[begin])
            while end < len(sequences) and total + len(sequences[end]) <= rows:
                total, end = total + len(sequences[end]), end + 1
            some = tuple(_row(ids) for ids in sequences[begin:end])
            found = self._run(Job(some, "prefill"), f"sequences {begin + 1} to {end} of {len(sequences)}").logprobs
            yield from np.split(found, np.cumsum([len(ids) for ids in some])[:-1])
            begin = end

    def _text(self, asked: TextRequest) -> dict[str, Any]:
        found = self._run(Job((_row([0]),), "prefill", asked), "texts").text_answers
        if not isinstance(found, dict):
            raise RuntimeUnavailableError(f"{self.name} gave no answers about text", where=self.path)
        return found

    def _run(self, job: Job, what: str) -> Any:
        questions = len(job.behaviour.scored) if job.behaviour else 0
        with task(f"{self.name}: {what}", questions or job.total) as shown:
            found = run_runner(
                self.name,
                model=self._artifact.path,
                job=job,
                workdir=self.workdir,
                threads=self.threads,
                lora=self._artifact.lora,
                vocabulary=self._sizes[0],
                watch=watch_of(self.name, self._artifact.path, job, shown, QUESTIONS if questions else TOKENS),
            )
        if found.status != "ok":
            raise run_error(self.name, self.path, found)
        return found


def _row(ids: Sequence[int]) -> NDArray[np.int32]:
    return np.asarray(ids, np.int32)
