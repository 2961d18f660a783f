"""Stand-ins for qalora_runtimes' run_runner and run_taps: a runtime that is right everywhere, or wrong in a stated way.

On the exact path it is PyTorch; on the shipped path PyTorch with every linear layer computed by the documented
arithmetic of the runtime that it stands for, from the weights of the artifact.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from qalora_runtimes.behaviour import ASKED, END, Request, behind
from qalora_runtimes.launch import RunnerResult
from qalora_runtimes.protocol import Job, read_job
from qalora_runtimes.taps import TapsResult

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.generation import generation_of
from qalora_export.models.loading import load_tokenizer
from qalora_export.verify.gates.g5_text import expected_answers
from qalora_export.verify.kernels.arithmetic import Weight, product_of
from qalora_export.verify.kernels.products import TappedGraph
from qalora_export.verify.probes.behaviour import decoded
from qalora_export.verify.probes.probe_set import ProbeSet, rendered
from qalora_export.verify.reference.layerwise import LayerwiseModel
from qalora_export.verify.reference.local_proof import DECODED, chosen
from qalora_export.verify.reference.logits import float32_model, long_logprobs, reference_logprobs
from qalora_export.verify.reference.text import folder_answers
from qalora_export.verify.runtimes.record import all_runtimes

Change = Callable[[np.ndarray], np.ndarray]


@cache
def right_logprobs(checkpoint: Path, ids: bytes, lengths: bytes) -> np.ndarray:
    probes = ProbeSet(np.frombuffer(ids, np.int32), np.frombuffer(lengths, np.int32), ())
    return reference_logprobs(checkpoint, probes, threads=1).logprobs


class RightKernels:
    """layerwise.Played: every product of a graph by the first of its ways, and what it saw and gave by name."""

    def __init__(self, graph: TappedGraph) -> None:
        self._linears = {linear.module: linear for linear in graph.linears}
        self._weights: dict[str, Weight] = {}
        self.seen: dict[str, list[np.ndarray]] = defaultdict(list)
        self._reader: dict[str, str] = {}  # value -> the first product that reads it: several may

    def __call__(self, module: str, x: torch.Tensor) -> torch.Tensor:
        linear, gave = self._linears[module], dict[str, np.ndarray]()
        for one in linear.products:
            if one.weight not in self._weights:
                self._weights[one.weight] = one.rows(slice(0, one.shape[0]))
            saw = gave[one.reads] if one.reads in gave else x[0].numpy()
            seen = one.ways[0].seen(saw)
            gave[one.y] = product_of(seen.values, self._weights[one.weight], seen.sums).astype(np.float32)
            if self._reader.setdefault(one.x, one.weight) == one.weight:
                self.seen[one.x].append(saw.copy())
            self.seen[one.y].append(gave[one.y])
        total = sum(gave[one.y] for one in linear.products if one.summed)
        ordered = total if linear.order is None else total[:, linear.order]
        return torch.from_numpy(np.ascontiguousarray(ordered))[None]

    def taps(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self.seen.items()}


@cache
def shipped(checkpoint: Path, runtime: str, model: Path, ids: bytes, lengths: bytes) -> tuple[np.ndarray, dict]:
    """(log-probabilities, taps) of whole prompts."""
    record = all_runtimes()[runtime]
    with TemporaryDirectory() as folder:
        graph = record.tapped_graph(record.shipped(model), CanonicalCheckpoint(checkpoint), Path(folder))
    kernels = RightKernels(graph)
    probes = ProbeSet(np.frombuffer(ids, np.int32), np.frombuffer(lengths, np.int32), ())
    with torch.inference_mode():
        (logprobs,) = LayerwiseModel(checkpoint, played=kernels).run(probes.sequences(), decode=False)
    return logprobs, {graph.logits: logprobs} | kernels.taps()


@cache
def _greedy(checkpoint: Path, prompt: tuple[int, ...], tokens: int, ends: tuple[int, ...]) -> list[int]:
    model, cache, ids, made = _model(checkpoint), None, [*prompt], list[int]()
    while len(made) < tokens and not (made and made[-1] in ends):
        with torch.inference_mode():
            out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, [int(out.logits[0, -1].argmax())]
        made += ids
    return made


@cache
def _model(checkpoint: Path) -> Any:
    return float32_model(checkpoint)


@cache
def _tokenizer(checkpoint: Path) -> Any:
    return load_tokenizer(checkpoint)


@cache
def _right_text(checkpoint: Path, asked: str) -> dict[str, Any]:
    """asked: texts and chats as JSON."""
    texts, chats = json.loads(asked)
    chats = tuple(tuple(chat) if isinstance(chat, list) else chat for chat in chats)
    probes = ProbeSet(np.zeros(1, np.int32), np.ones(1, np.int32), ("",), tuple(texts), chats)
    return folder_answers(checkpoint, probes)


def right_behaviour(checkpoint: Path, runtime: str, asked: Request) -> dict[str, Any]:
    """What PyTorch and Hugging Face's tokenizer answer, in the form of a runner's answers."""
    record, tokenizer = all_runtimes()[runtime], _tokenizer(checkpoint)
    config = CanonicalCheckpoint(checkpoint).config
    answers, before = list[dict[str, Any]](), list[int]()
    for question in asked.questions:
        prompt = behind(before, answers[-1]["tokens"], question.prompt) if question.continues else [*question.prompt]
        made = _greedy(checkpoint, tuple(prompt), question.tokens, asked.ends)
        stop = END if made[-1] in asked.ends else ASKED
        text = decoded(tokenizer, [[asked.anchor, *made]], hide=True)[0].removeprefix(tokenizer.decode([asked.anchor]))
        answers.append({"tokens": [*made], "stop": stop, "text": text, "cached": len(before), "chat": None})
        before = prompt
    rows = [[asked.anchor, index, asked.anchor] for index in range(asked.vocabulary)]
    bos = tokenizer.bos_token if record.habits.cuts_bos else ""
    unprompted = [rendered(tokenizer, chat, generation_prompt=False).removeprefix(bos) for chat in asked.unprompted]
    tokens = asked.questions[0].tokens if asked.questions else 0
    answered = [[*_greedy(checkpoint, one.prompt, one.tokens, asked.ends)] for one in asked.scored]

    def shown(made: list[int]) -> str:
        return str(tokenizer.decode([token for token in made if token not in asked.ends], skip_special_tokens=True))

    return {
        "answers": answers,
        "batch": [[*_greedy(checkpoint, prompt, tokens, asked.ends)] for prompt in asked.batch],
        "ends": {"all": [*asked.ends], "forced": dict.fromkeys(map(str, asked.ends), END)},
        "pieces": {"hidden": decoded(tokenizer, rows, hide=True), "shown": decoded(tokenizer, rows, hide=False)},
        "decoded": decoded(tokenizer, [[*row] for row in asked.sequences], hide=True),
        "unprompted": unprompted,
        "scored": [{"tokens": made, "text": shown(made)} for made in answered],
        "defaults": record.expected_defaults(generation_of(checkpoint, config), config),
        "errors": [],
    }


@dataclass
class FakeRuntimes:
    """changes: (runtime, "exact" | "shipped", mode) -> what is done to the right log-probabilities of the probe set.

    taps_changes: runtime -> what is done to the values inside it.

    broken: the same keys -> a RunnerResult to return instead. answers, behaviour: change a runtime's answers about text
    and what it generates.
    """

    checkpoint: Path
    changes: dict[tuple[str, str, str], Change] = field(default_factory=dict)
    broken: dict[tuple[str, str, str], RunnerResult] = field(default_factory=dict)
    answers: dict[str, Callable[[dict[str, Any]], None]] = field(default_factory=dict)
    behaviour: dict[str, Callable[[dict[str, Any]], None]] = field(default_factory=dict)
    taps_changes: dict[str, Callable[[dict[str, np.ndarray]], None]] = field(default_factory=dict)

    def taps(self, runtime: str, *, model: Path, job: Job, data: Path | None = None, **_: object) -> TapsResult:
        """Whole prompts for either mode: a right runtime gives the same."""
        artifact = model if data is None else data.parent
        ids = np.concatenate(job.sequences)
        lengths = np.array([len(s) for s in job.sequences], np.int32)
        found = dict(shipped(self.checkpoint, runtime, artifact, ids.tobytes(), lengths.tobytes())[1])
        self.taps_changes.get(runtime, lambda _: None)(found)
        return TapsResult("ok", "", found)

    def __call__(self, runtime: str, *, model: Path, job: Path, exact: bool, **_: object) -> RunnerResult:
        request = read_job(job)
        path = "exact" if exact else "shipped"
        alone = (request.text or request.behaviour) is not None and len(request.passes) == 1
        keys = [] if alone else [(runtime, path, each) for each in request.passes]
        extra = [name for name in ("text", "behaviour") if getattr(request, name) is not None]
        for key in [*keys, *((runtime, path, name) for name in extra)]:
            if key in self.broken:
                return self.broken[key]
        ids = np.concatenate(request.sequences)
        lengths = np.array([len(s) for s in request.sequences], np.int32)
        asked = ids.tobytes(), lengths.tobytes()
        right = (
            right_logprobs(self.checkpoint, *asked) if exact else shipped(self.checkpoint, runtime, model, *asked)[0]
        )
        passes = []
        for key in keys:
            rows = right.copy()
            if key[1:] == ("shipped", "decode"):
                self._first_tokens(runtime, model, request.sequences, rows)
            passes.append(self.changes.get(key, lambda right: right)(rows))
        passes = passes or [right]
        text = self._text(runtime, request)
        said = None
        if request.behaviour is not None:
            said = right_behaviour(self.checkpoint, runtime, request.behaviour)
            self.behaviour.get(runtime, lambda _: None)(said)
        decoded = dict(enumerate(passes)).get(1)
        long = None if request.long is None else long_logprobs(self.checkpoint, request.long, threads=1)
        return RunnerResult("ok", "", passes[0], text, {"version": "fake"}, decoded=decoded, behaviour=said, long=long)

    def _first_tokens(self, runtime: str, model: Path, sequences: tuple[np.ndarray, ...], rows: np.ndarray) -> None:
        """Those that decode is watched at, computed by themselves as `taps` does: sums of a product depend on
        its shape, and int8 rounding turns an ulp of them over.
        """
        lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        starts, which = np.cumsum(lengths) - lengths, chosen(lengths)
        cut = [sequences[i][:DECODED] for i in which]
        at = np.concatenate([np.arange(starts[i], starts[i] + len(c)) for i, c in zip(which, cut, strict=True)])
        asked = np.concatenate(cut).tobytes(), np.array([len(c) for c in cut], np.int32).tobytes()
        rows[at] = shipped(self.checkpoint, runtime, model, *asked)[0]

    def _text(self, runtime: str, request: Any) -> dict[str, Any] | None:
        if request.text is None:
            return None
        found = _right_text(self.checkpoint, json.dumps([request.text.texts, request.text.chats]))
        right = expected_answers(found, all_runtimes()[runtime].habits)
        answers = {key: [list(v) if isinstance(v, list) else v for v in values] for key, values in right.items()}
        self.answers.get(runtime, lambda _: None)(answers)
        return answers
