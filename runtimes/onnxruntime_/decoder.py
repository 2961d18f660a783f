"""A decoder graph with a KV cache in ONNX Runtime. Names, shapes and types are read from the graph, not assumed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes import heartbeat
from qalora_runtimes.behaviour import Request
from qalora_runtimes.onnxruntime_.behave import Behaviour
from qalora_runtimes.protocol import Ids, Job, LongSequence, TextRequest
from qalora_runtimes.runner import check_vocabulary
from qalora_runtimes.scoring import MissingRuntimeError, Rows, RunnerError, every_position
from qalora_runtimes.side_by_side import SIDE_BY_SIDE, groups_of, steps_of

PACKAGE = "onnxruntime"
PROVIDER = "CPUExecutionProvider"
MAX_WIDTH = 1 << 16
ERRORS_ONLY = 3  # log severity
DATA_FOLDER = "session.model_external_initializers_file_folder_path"
CACHE_NAME = re.compile(r"^(past|present)\w*\.(\d+)\.(key|value)$")
GRAPHS = ("onnx/model.onnx", "model.onnx")  # in a folder; the second as earlier versions wrote it
DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def import_package() -> Any:
    """The onnxruntime package. Raises MissingRuntimeError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingRuntimeError(PACKAGE, error) from error
    return onnxruntime


def _graph(path: Path) -> Path:
    """The graph of a folder, or the file itself. Raises RunnerError for two graphs, or none."""
    if not path.is_dir():
        return path
    found = [path / name for name in GRAPHS if (path / name).exists()]
    if len(found) != 1:
        raise RunnerError(f"ONNX Runtime cannot load {path}: {len(found)} of {' and '.join(GRAPHS)} are there")
    return found[0]


@dataclass(frozen=True)
class CacheSlot:
    """One KV tensor: `past` goes in with an empty sequence axis and shape `empty`, `present` comes out."""

    past: str
    present: str
    empty: tuple[int, ...]
    dtype: Any


class Decoder:
    """runner.Runtime on the graph of an ONNX folder, or on a graph file."""

    def __init__(self, folder: Path, threads: int, *, data: Path | None = None, exact: bool = False) -> None:
        """data: folder of the external data where it is not the graph's own. exact: sequences may share a step.

        Raises MissingRuntimeError, or RunnerError for a file that does not load or is no such decoder.
        """
        onnxruntime = import_package()
        self._version, self._threads, self._folder = onnxruntime.__version__, threads, folder
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = ERRORS_ONLY
        file = _graph(folder)
        try:
            if data is not None:
                options.add_session_config_entry(DATA_FOLDER, str(data))
            graph = str(file) if data is None else file.read_bytes()
            self._session = onnxruntime.InferenceSession(graph, options, providers=[PROVIDER])
        except Exception as error:  # its exception classes have no other base in common
            raise RunnerError(f"ONNX Runtime cannot load {file}: {error}") from error
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._inputs = {node.name: DTYPES.get(node.type) for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]
        shapes = {node.name: node.shape for node in self._session.get_inputs()}
        self._together = exact and not isinstance(shapes.get("input_ids", [1])[0], int)  # any number of rows
        self._slots = self._cache_slots()
        self._check_inputs(file)

    def _cache_slots(self) -> list[CacheSlot]:
        present = {
            m.groups()[1:]: name for name in self._outputs if (m := CACHE_NAME.match(name)) and m[1] == "present"
        }
        slots = []
        for node in self._session.get_inputs():
            match = CACHE_NAME.match(node.name)
            if not match:
                continue
            free = [axis for axis, size in enumerate(node.shape) if not isinstance(size, int)]
            shape = list(node.shape)
            if 3 in free and (width := self._width()):  # GenAI's builder leaves it open
                shape[3] = width
                free.remove(3)
            if match.groups()[1:] not in present or len(free) not in (1, 2) or len(node.shape) != 4:
                raise RunnerError(f"KV input {node.name} {node.shape} has no present output or no free sequence axis")
            batch_and_sequence = {axis: 1 if axis == 0 else 0 for axis in free}
            empty = tuple(batch_and_sequence.get(axis, size) for axis, size in enumerate(shape))
            slots.append(CacheSlot(node.name, present[match.groups()[1:]], empty, DTYPES[node.type]))
        return slots

    def _width(self) -> int:
        """Features of a head by the folder's genai_config.json; 0 where nothing says so."""
        path = self._folder / "genai_config.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["model"]["decoder"]["head_size"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return found if type(found) is int and 0 < found <= MAX_WIDTH else 0

    def _check_inputs(self, file: Path) -> None:
        known = {"input_ids", "attention_mask", "position_ids"} | {slot.past for slot in self._slots}
        if "logits" not in self._outputs or "input_ids" not in self._inputs or not self._slots:
            raise RunnerError(f"{file} is no decoder with input_ids, logits and a KV cache")
        if unknown := set(self._inputs) - known:
            raise RunnerError(f"{file} needs inputs this runner does not know: {', '.join(sorted(unknown))}")

    def prefill(self, ids: Ids) -> Rows:
        """The whole prompt in one run; an empty KV cache goes in."""
        return every_position(lambda prompt: self._run(prompt, 0, self._empty())[0], ids)

    def decode(self, ids: Ids) -> Rows:
        """One token per run, the KV cache of each run goes into the next."""
        cache, rows = self._empty(), []
        for at in range(len(ids)):
            row, cache = self._run(ids[at : at + 1], at, cache)
            rows.append(row)
            heartbeat.advance()
        return np.concatenate(rows)

    def decode_steps(self, job: Job) -> Iterator[tuple[list[int], Rows]] | None:
        """runner.SideBySide on the exact path. What ships is proven by the kernels of one token."""
        return self._side_by_side(job) if self._together else None

    def _side_by_side(self, job: Job) -> Iterator[tuple[list[int], Rows]]:
        """The longest sequence by itself, so that the kernels of one token are on the exact path as well."""
        (longest, *others), *more = groups_of(job, SIDE_BY_SIDE * job.longest)
        for group in [[longest], *([others] if others else []), *more]:
            cache = self._empty(len(group))
            for at, tokens, positions in steps_of(job, group):
                cache = {name: self._first(value, len(tokens)) for name, value in cache.items()}
                mask: Ids = np.ones((len(tokens), at + 1), np.int32)
                rows, cache = self._run_batch(np.array(tokens)[:, None], mask, cache)
                yield positions, rows[:, -1]

    def _first(self, cache: Any, rows: int) -> Any:
        """The cache of its first `rows` sequences; those behind them have ended."""
        return cache if cache.shape()[0] == rows else self._value(np.ascontiguousarray(cache.numpy()[:rows]))

    def _empty(self, batch: int = 1) -> dict[str, Any]:
        return {slot.past: self._value(np.zeros((batch, *slot.empty[1:]), slot.dtype)) for slot in self._slots}

    def _run(self, ids: Ids, start: int, cache: dict[str, Any]) -> tuple[Rows, dict[str, Any]]:
        """Rows (len(ids) or 1, vocab) and the next cache, after `start` tokens that are in `cache`."""
        names = ["logits", *(slot.present for slot in self._slots)]
        logits, *present = self._outputs_of(names, {**self._feeds(ids, start), **cache})
        rows = logits.numpy().astype(np.float32)
        return rows.reshape(-1, rows.shape[-1]), {
            slot.past: value for slot, value in zip(self._slots, present, strict=True)
        }

    def _outputs_of(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        """One run of the graph. Raises RunnerError for shapes and settings that an operator does not take."""
        try:
            return self._session.run_with_ort_values(names, feeds)
        except Exception as error:  # its exception classes have no other base in common
            raise RunnerError(f"ONNX Runtime cannot run the graph: {error}") from error

    def _feeds(self, ids: Ids, start: int) -> dict[str, Any]:
        end = start + len(ids)
        plain = {"input_ids": ids, "attention_mask": np.ones(end), "position_ids": np.arange(start, end)}
        return {n: self._value(np.asarray(v, self._inputs[n])[None]) for n, v in plain.items() if n in self._inputs}

    def _run_batch(self, ids: Any, mask: Any, cache: dict[str, Any]) -> tuple[Rows, dict[str, Any]]:
        """behave.Run. A token's position is the number of unmasked ones before it in its row."""
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        plain = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {n: self._value(np.asarray(v, self._inputs[n])) for n, v in plain.items() if n in self._inputs}
        names = ["logits", *(slot.present for slot in self._slots)]
        logits, *present = self._outputs_of(names, {**feeds, **cache})
        return logits.numpy().astype(np.float32), {
            slot.past: value for slot, value in zip(self._slots, present, strict=True)
        }

    def text_answers(self, _request: TextRequest) -> None:
        """ONNX Runtime has no tokenizer; GenAI, which runs the same folder, answers."""

    def behave(self, request: Request) -> dict[str, Any]:
        run, empty = self._run_batch, self._empty
        return Behaviour(self._folder, run, empty, request, together=self._together).answers()

    def long(self, sequence: LongSequence) -> Rows:
        cache, found = self._empty(), []
        for start, ids, at in sequence.chunks():
            rows, cache = self._run(ids, start, cache)
            found.append(rows[at])
            heartbeat.advance(len(ids))
        return np.concatenate(found)

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": "onnxruntime",
            "package": PACKAGE,
            "version": self._version,
            "logits_through": "InferenceSession, every position of a run",
            "settings": {
                "provider": PROVIDER,
                "intra_op_threads": self._threads,
                "kv_dtype": str(np.dtype(self._slots[0].dtype)),
                **({"sequences": SIDE_BY_SIDE} if self._together else {}),
            },
        }

    def check_job(self, job: Job) -> None:
        """Raises RunnerError for ids outside the vocabulary, where the graph tells it."""
        vocabulary = next(node.shape[-1] for node in self._session.get_outputs() if node.name == "logits")
        if isinstance(vocabulary, int):
            check_vocabulary(job, vocabulary)
