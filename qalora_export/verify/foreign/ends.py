"""End tokens and sampling: where a generation stops, and how it draws when the user says nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes.launch import failure
from qalora_runtimes.process import Watch, patience_for, run_module
from qalora_runtimes.runner import EXIT_OK

from qalora_export.errors import RuntimeUnavailableError
from qalora_export.formats.gguf.model_config import sampling_from_gguf
from qalora_export.verify.foreign.diagnosis import Part

MODULE = "qalora_runtimes.llama_cpp.stops"
MAX_ANSWER = 64 << 20  # bytes
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# What generate() of Transformers does where generation_config.json does not say.
TRANSFORMERS: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
SHORTEST = 256  # tokens that a conversation may be expected to have
DEFAULTS: Mapping[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}


def llama_cpp_ends(path: Path, workdir: Path) -> list[int]:
    """The ids at which llama.cpp stops with this file. Raises RuntimeUnavailableError."""
    workdir.mkdir(parents=True, exist_ok=True)
    out = workdir / "stops.json"
    watch = Watch(patience_for(path, 0), limits={out: MAX_ANSWER})
    ended = run_module(MODULE, ["--model", path, "--out", out], workdir, watch)
    if ended.code != EXIT_OK:
        raise RuntimeUnavailableError(failure("llama.cpp", ended).message, where=path)
    ends = json.loads(out.read_text(encoding="utf-8")).get("ends")
    if not isinstance(ends, list) or not all(type(token) is int for token in ends):
        raise RuntimeUnavailableError("llama.cpp gave no list of end tokens", where=path)
    return ends


def ends_part(
    runtime: str, wanted: Sequence[int], found: Sequence[int], tokenizer: Any, sampling: Sequence[str]
) -> Part:
    """wanted: where Transformers' generate stops. found: where the runtime does. sampling: what differs there."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    never = [token for token in wanted if token not in found]
    wrongly = [token for token in found if token not in wanted and token not in special]
    findings = [f"it does not stop at {_name(tokenizer, token)}" for token in never]
    findings += [f"it stops at {_name(tokenizer, token)}, an ordinary token" for token in wrongly]
    findings += sampling
    figures = {"wanted": list(wanted), "found": list(found)}
    if not findings:
        seen = f"it stops at {', '.join(_name(tokenizer, token) for token in wanted) or 'no token, as the model says'}"
        return Part("ends", runtime, "ok", seen, figures=figures)
    return Part("ends", runtime, "broken", findings[0], tuple(findings), figures=figures)


def gguf_sampling_differences(metadata: Mapping[str, Any], generation: Mapping[str, Any]) -> list[str]:
    """general.sampling.* of a GGUF against generation_config.json; a file that says nothing leaves it to the user."""
    found = sampling_from_gguf(metadata)
    differences = []
    for key in (key for key in SAMPLING if key in found):
        wanted = generation.get(key, DEFAULTS.get(key))
        if key == "do_sample" or (not found.get("do_sample", True) and not generation.get("do_sample")):
            continue  # temperature tells
        if wanted is None or np.float32(wanted) != np.float32(found[key]):
            differences.append(f"sampling {key} is {found[key]}, the model's {'unset' if wanted is None else wanted}")
    return differences


def genai_sampling_differences(config: Any, generation: Mapping[str, Any]) -> list[str]:
    """`search` of genai_config.json against generation_config.json; greedy by default is a choice, not a fault."""
    search = config.get("search") if isinstance(config, dict) else None
    found: Mapping[str, Any] = search if isinstance(search, dict) else {}
    model = config.get("model") if isinstance(config, dict) else None
    context = model.get("context_length") if isinstance(model, dict) else None
    differences = []
    longest = found.get("max_length")
    if isinstance(longest, int) and longest < min(SHORTEST, context if isinstance(context, int) else SHORTEST):
        differences.append(f"search.max_length is {longest}: prompt and answer together end there")
    if not found.get("do_sample") or found.get("top_k") == 1:
        return differences
    if not generation.get("do_sample"):
        differences.append("search.do_sample is true, the model's is not")
    for key in (key for key in SAMPLING[1:] if found.get(key) is not None):
        wanted = generation.get(key, TRANSFORMERS.get(key))
        if wanted is not None and np.float32(wanted) != np.float32(found[key]):
            differences.append(f"search.{key} is {found[key]}, the model's {wanted}")
    return differences


def _name(tokenizer: Any, token: int) -> str:
    text = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    return f"{text!r} (id {token})" if text is not None else f"id {token}"
