"""ONNX Runtime GenAI's own generation loop: append_tokens runs the model, the KV cache is GenAI's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes import heartbeat
from qalora_runtimes.behaviour import Request
from qalora_runtimes.genai.behave import Behaviour
from qalora_runtimes.protocol import Ids, Job, LongSequence, TextRequest, conversation
from qalora_runtimes.runner import check_vocabulary
from qalora_runtimes.scoring import MissingRuntimeError, Rows, RunnerError, every_position

PACKAGE = "onnxruntime-genai"


class GenaiRuntime:
    """runner.Runtime on a folder with genai_config.json, the graph and the tokenizer."""

    def __init__(self, folder: Path, threads: int, job: Job, *, exact: bool = False) -> None:
        """exact: a task's questions may share a step.

        Raises MissingRuntimeError, or RunnerError for a folder that does not load or a job it cannot hold."""
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise MissingRuntimeError(PACKAGE, error) from error
        self._genai, self._threads, self._exact = onnxruntime_genai, threads, exact
        self._config = _read_config(folder)
        check_vocabulary(job, int(self._config["model"]["vocab_size"]))
        self._length = job.longest
        if self._length > int(self._config["model"]["context_length"]):
            raise RunnerError(f"a sequence of {job.longest} tokens exceeds the model's context_length")
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        try:
            config = onnxruntime_genai.Config(str(folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model = onnxruntime_genai.Model(config)
        except RuntimeError as error:
            raise RunnerError(f"ONNX Runtime GenAI cannot load {folder}: {error}") from error

    def prefill(self, ids: Ids) -> Rows:
        """One append_tokens; the graph's `logits` output holds every position (get_logits only the last)."""
        return every_position(self._prompt, ids)

    def _prompt(self, ids: Ids) -> Rows:
        generator = self._generator()
        _append(generator, ids)
        return _rows(generator.get_output("logits"))

    def decode(self, ids: Ids) -> Rows:
        """One append_tokens per token on the generator's KV cache; get_logits is what GenAI samples from."""
        generator, rows = self._generator(), []
        for at in range(len(ids)):
            _append(generator, ids[at : at + 1])
            rows.append(_rows(generator.get_logits()))
            heartbeat.advance()
            if generator.token_count() != at + 1 or len(rows[-1]) != 1:
                raise RunnerError(f"GenAI holds {generator.token_count()} tokens after {at + 1} were appended")
        return np.concatenate(rows)

    def _generator(self) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._length, do_sample=False)
        return self._genai.Generator(self._model, parameters)

    def text_answers(self, request: TextRequest) -> dict[str, Any]:
        """protocol.TEXT_ANSWER_KEYS. GenAI always recognises special tokens, so texts_literal is not offered."""
        try:
            tokenizer = self._genai.Tokenizer(self._model)
        except RuntimeError as error:
            raise RunnerError(f"ONNX Runtime GenAI cannot load the tokenizer: {error}") from error
        rendered, errors = [], []
        for index, chat in enumerate(request.chats):
            try:
                parts = {key: json.dumps(value, ensure_ascii=False) for key, value in conversation(chat).items()}
                text = tokenizer.apply_chat_template(**parts, add_generation_prompt=True)
            except RuntimeError as error:
                text = None
                errors.append(f"chat {index}: {error}")
            rendered.append(text)
        return {
            "texts": [tokenizer.encode(text).tolist() for text in request.texts],
            "texts_literal": None,
            "rendered": rendered,
            "rendered_ids": [None if text is None else tokenizer.encode(text).tolist() for text in rendered],
            "adds_bos": len(tokenizer.encode("")) > 0,
            "bos_id": int(tokenizer.bos_token_id),
            "errors": errors,
        }

    def behave(self, request: Request) -> dict[str, Any]:
        return Behaviour(self._genai, self._model, request, together=self._exact).answers()

    def long(self, sequence: LongSequence) -> Rows:
        generator, found = self._generator(), []
        for _, ids, at in sequence.chunks():
            _append(generator, ids)
            found.append(_rows(generator.get_output("logits"))[at])
            heartbeat.advance(len(ids))
        return np.concatenate(found)

    def describe(self) -> dict[str, Any]:
        search = self._config.get("search", {})
        return {
            "runtime": "onnxruntime-genai",
            "package": PACKAGE,
            "version": self._genai.__version__,
            "logits_through": "Generator, every position of a prompt",
            "settings": {
                "device": self._model.device_type,
                "intra_op_threads": self._threads,
                "past_present_share_buffer": search.get("past_present_share_buffer"),
            },
        }


def _append(generator: Any, ids: Ids) -> None:
    """Run the model on more tokens. Raises RunnerError for shapes and settings that an operator does not take."""
    try:
        generator.append_tokens(ids)
    except RuntimeError as error:
        raise RunnerError(f"ONNX Runtime GenAI cannot run the graph: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        config["model"]["vocab_size"], config["model"]["context_length"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunnerError(f"{folder} has no usable genai_config.json: {error!r}") from error
    return dict(config)


def _rows(logits: Any) -> Rows:
    array = np.asarray(logits, dtype=np.float32)
    return array.reshape(-1, array.shape[-1]).copy()
