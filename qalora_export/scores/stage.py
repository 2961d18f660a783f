"""Task score and perplexity of any model: an exported artifact through its own runtime, a folder in PyTorch."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qalora_export import evaluation
from qalora_export.checkpoint.manifest import parent_of
from qalora_export.checkpoint.output import claim_output
from qalora_export.data.records import Record, iter_records
from qalora_export.errors import InputError
from qalora_export.evaluation import EvaluateReport, asked_records, require_room, scored, write_score
from qalora_export.progress import track
from qalora_export.recipe import EvaluateSettings
from qalora_export.safety import StrPath, atomic_file, local_path, sha256_file
from qalora_export.scores.running import Running, format_of

FORMAT = "qalora-perplexity/1"
WINDOW = 512  # tokens


def evaluate(
    model: StrPath,
    settings: EvaluateSettings,
    out: StrPath | None = None,
    *,
    runtime: str | None = None,
    force: bool = False,
) -> EvaluateReport:
    """Greedy answers to a JSONL task, compared with the expected ones as settings.match says; `out`: a JSON file.

    A GGUF file answers in llama.cpp and an ONNX folder in ONNX Runtime, or in `runtime`, by its own tokenizer and end
    tokens; a model folder, plain or canonical, in PyTorch, float32. Every record must end in the expected answer.
    Raises InputError for unusable data, RuntimeUnavailableError for a runtime that is missing or crashes.
    """
    model, out = local_path(model), None if out is None else local_path(out)
    if format_of(model) is None:
        _require_no_runtime(runtime, model)
        return evaluation.evaluate(model, settings, out, force=force)
    with contextlib.ExitStack() as stack:
        if out is not None:
            stack.enter_context(claim_output(out, force=force, inputs=(model, settings.data)))
        running = Running(model, _scratch(stack), runtime)
        records = asked_records(settings)
        prompts = running.prompts(records)
        for ids, record in zip(prompts, records, strict=True):
            require_room(ids, record, settings, context=running.context)
        answers = [answer.strip() for answer in running.answers(prompts, settings.max_new_tokens)]
        score = scored(model, settings, records, answers, runtime=running.name)
        if out is not None:
            write_score(out, score, force=force)
    return score


@dataclass(frozen=True, slots=True)
class PerplexityReport:
    """nats_per_token: mean over `tokens` tokens, those in `windows` windows that have one before them."""

    model: str
    model_sha256: str
    data_sha256: str
    runtime: str
    windows: int
    tokens: int
    nats_per_token: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


def perplexity(
    model: StrPath,
    text: StrPath,
    out: StrPath | None = None,
    *,
    limit: int | None = None,
    window: int = WINDOW,
    runtime: str | None = None,
    force: bool = False,
) -> PerplexityReport:
    """Perplexity of running text (.txt, or JSONL lines with "text") through what runs the model, as in `evaluate`.

    The text is cut into windows of `window` tokens, each by itself behind what the tokenizer puts before a text; what
    is left at the end is a shorter one. limit: only the first windows. Raises as `evaluate` does.
    """
    model, text, out = local_path(model), local_path(text), None if out is None else local_path(out)
    with contextlib.ExitStack() as stack:
        if out is not None:
            stack.enter_context(claim_output(out, force=force, inputs=(model, text)))
        pieces = [_running_text(record) for record in iter_records(text)]
        if format_of(model) is None:
            _require_no_runtime(runtime, model)
            name, windows, rows = _in_pytorch(model, pieces, window, limit)
        else:
            running = Running(model, _scratch(stack), runtime)
            before, ids = running.ids_of(pieces)
            windows = _windows(before, ids, window, running.context, limit)
            name, rows = running.name, running.logprobs(windows)
        losses = [_losses(*pair) for pair in zip(windows, rows, strict=True)]
        every = np.concatenate(losses)
        which = parent_of(model, "checkpoint").sha256
        report = PerplexityReport(
            model.name, which, sha256_file(text), name, len(windows), every.size, float(every.mean())
        )
        if out is not None:
            with atomic_file(out, force=force) as temporary:
                content = {"format": FORMAT} | asdict(report) | {"perplexity": report.perplexity}
                temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return report


def _scratch(stack: contextlib.ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qalora-scores-")))


def _require_no_runtime(runtime: str | None, model: Path) -> None:
    if runtime is not None:
        raise InputError(
            f"{runtime} does not run a model folder",
            where=model,
            fix="export it and give the GGUF file or the ONNX folder, or leave the runtime out",
        )


def _running_text(record: Record) -> str:
    if record.text is None:
        raise InputError(
            "perplexity is of running text, this is a conversation",
            where=record.where,
            fix='give a .txt file or lines like {"text": "..."}, or score the answers with --data',
        )
    return record.text


def _windows(
    before: Sequence[int], pieces: Sequence[Sequence[int]], window: int, context: int | None, limit: int | None
) -> list[list[int]]:
    """Windows of at least two tokens, the one behind the other in the text."""
    ids = [index for piece in pieces for index in piece]
    body = min(window, context or window) - len(before)
    if body < 1 or len(before) + len(ids) < 2:
        raise InputError(
            f"windows of {window} tokens and a text of {len(ids)} leave nothing to predict", fix="give more of either"
        )
    found = [[*before, *ids[at : at + body]] for at in range(0, len(ids), body)]
    return [each for each in found if len(each) > 1][:limit]


def _losses(ids: Sequence[int], rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """−log p of every id but the first, (n − 1,)."""
    following = np.asarray(ids[1:])
    losses: NDArray[np.float64] = np.negative(rows[np.arange(len(following)), following], dtype=np.float64)
    return losses


def _in_pytorch(
    model: Path, pieces: Sequence[str], window: int, limit: int | None
) -> tuple[str, list[list[int]], Iterator[NDArray[np.float32]]]:
    import torch

    from qalora_export.checkpoint.model_folder import ModelFolder
    from qalora_export.data.rendering import around, plain_ids
    from qalora_export.models.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(model)
    ids = [plain_ids(tokenizer, piece) for piece in pieces]
    windows = _windows(around(tokenizer)[0], ids, window, ModelFolder(model).context, limit)
    network = load_model(model)

    def rows() -> Iterator[NDArray[np.float32]]:
        for each in track(windows, f"perplexity of {model.name}, windows"):
            with torch.no_grad():
                yield torch.log_softmax(network(torch.tensor([each])).logits[0].float(), -1).numpy()

    return evaluation.PYTORCH, windows, rows()
