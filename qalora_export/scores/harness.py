"""An lm-eval model on an exported artifact, so that MMLU or the commonsense suite are scored on what ships.

    import lm_eval
    from qalora_export.scores.harness import lm_eval_model

    with lm_eval_model("model.gguf") as model:
        print(lm_eval.simple_evaluate(model=model, tasks=["hellaswag"], limit=50)["results"])

Every batch of requests is one process of the runtime. Model folders need none of this: lm-eval's own model "hf" loads
them, canonical ones once qalora_export is imported. lm-eval is imported when a model is asked for, never before.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.safety import StrPath, local_path
from qalora_export.scores.running import Running

TOKENS = 256  # of an answer, where a task does not say
WINDOW = 512  # tokens of running text


@contextlib.contextmanager
def lm_eval_model(
    artifact: StrPath, *, runtime: str | None = None, threads: int = 2, window: int = WINDOW
) -> Iterator[Any]:
    """An lm_eval.api.model.LM on a GGUF file or an ONNX folder.

    window: tokens of running text that are scored at once. Raises InputError for anything that is no artifact,
    RuntimeUnavailableError without lm-eval.
    """
    kind = _model_class()
    with tempfile.TemporaryDirectory(prefix="qalora-lm-eval-") as folder:
        yield kind(Running(local_path(artifact), Path(folder), runtime, threads), window)


@cache
def _model_class() -> Any:
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise RuntimeUnavailableError(
            "lm-eval is not installed", why=str(error), fix="pip install 'qalora-export[lm-eval]'"
        ) from error

    class ArtifactModel(LM):  # type: ignore[misc]
        """Requests are lm-eval's Instances; their `args` are what each method names."""

        def __init__(self, running: Running, window: int) -> None:
            super().__init__()
            self._scorer = Scorer(running, window)

        def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
            """args: (context, continuation)."""
            return self._scorer.continuations([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Iterable[Any]) -> list[float]:
            """args: (text,)."""
            return self._scorer.texts([request.args[0] for request in requests])

        def generate_until(self, requests: Iterable[Any]) -> list[str]:
            """args: (context, {"until": texts, "max_gen_toks": tokens})."""
            return self._scorer.answers([request.args for request in requests])

    return ArtifactModel


class Scorer:
    """What lm-eval asks of a model, of an artifact in its runtime."""

    def __init__(self, running: Running, window: int) -> None:
        self._running, self._window = running, window

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is what greedy decoding gives) of each (context, continuation).

        Context and continuation are tokenized together, as the model would meet them; spaces at the end of a context
        belong to the continuation.
        """
        if not pairs:
            return []
        wholes = [context + rest for context, rest in pairs]
        before, ids = self._running.ids_of([*wholes, *(context.rstrip() for context, _ in pairs)])
        sequences, starts = [], []
        for whole, context in zip(ids[: len(pairs)], ids[len(pairs) :], strict=True):
            start = len(before) + min(len(context), len(whole) - 1)
            cut = max(0, len(before) + len(whole) - self._longest)  # the beginning goes, as in lm-eval's own models
            sequence = [*before, *whole[cut:]]
            sequences.append(sequence)
            starts.append(max(start - cut, 1))  # the very first token has nothing before it
        rows = self._running.logprobs(sequences)
        return [_scored(each, start, row) for each, start, row in zip(sequences, starts, rows, strict=True)]

    def texts(self, texts: Sequence[str]) -> list[float]:
        """log p of each text, window after window; a token with nothing before it, not even BOS, counts nothing."""
        if not texts:
            return []
        before, ids = self._running.ids_of(texts)
        body, sequences, owners = max(1, self._longest - len(before)), list[list[int]](), list[int]()
        for owner, whole in enumerate(ids):
            for at in range(0, len(whole), body):
                sequences.append([*before, *whole[at : at + body]])
                owners.append(owner)
        found = [0.0] * len(texts)
        for owner, each, row in zip(owners, sequences, self._running.logprobs(sequences), strict=True):
            found[owner] += _scored(each, max(len(before), 1), row)[0] if len(each) > 1 else 0.0
        return found

    def answers(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Greedy answers, each cut at the first of its "until" texts. Raises InputError for sampled ones."""
        if not asked:
            return []
        for _, options in asked:
            if options.get("do_sample") or options.get("temperature") not in (None, 0, 0.0):
                raise InputError("answers are greedy", why=f"the task asks for {options}", fix="set do_sample to false")
        before, ids = self._running.ids_of([context for context, _ in asked])
        tokens = [int(options.get("max_gen_toks", TOKENS)) for _, options in asked]
        found = [""] * len(asked)
        for count in dict.fromkeys(tokens):
            some = [index for index, wanted in enumerate(tokens) if wanted == count]
            room = (self._running.context or 10**9) - count - len(before)
            if room < 1:
                raise InputError(
                    f"answers of {count} tokens leave no room in the model's context", where=self._running.path
                )
            prompts = [[*before, *ids[index][-room:]] for index in some]
            for index, answer in zip(some, self._running.answers(prompts, count), strict=True):
                found[index] = _until(answer, asked[index][1].get("until") or ())
        return found

    @property
    def _longest(self) -> int:
        return min(self._window, self._running.context or self._window)


def _scored(ids: Sequence[int], start: int, rows: NDArray[np.float32]) -> tuple[float, bool]:
    """Of ids[start:]; rows: log softmax after each id."""
    wanted, said = np.asarray(ids[start:]), rows[start - 1 : len(ids) - 1]
    total = said[np.arange(len(wanted)), wanted].sum(dtype=np.float64)
    return float(total), bool((said.argmax(1) == wanted).all())


def _until(answer: str, stops: str | Sequence[str]) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        answer = answer.split(stop)[0] if stop else answer
    return answer
