"""How a model generates by its own folder: end tokens and sampling, as Transformers' `generate` takes them.

Exporters write it into every format, and gate G6 holds each runtime to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_export.errors import InputError
from qalora_export.safety import inside, read_json

GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Settings of `generate` that change what comes out, and the values that leave it alone (transformers
# generation/configuration_utils.py). Those of SAMPLING have a place in other runtimes.
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "stop_strings": ([],),
    "exponential_decay_length_penalty": (),
}


@dataclass(frozen=True, slots=True)
class Generation:
    """ends: ids that end generation, in the folder's order. do_sample: draw at random; else the likeliest token.

    temperature … repetition_penalty: those in force; the first four only when do_sample. other: further settings, by
    name, that would change what Transformers generates and that no other runtime is given.
    """

    ends: tuple[int, ...]
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    other: tuple[str, ...]


def generation_config(checkpoint: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json of a checkpoint; the token ids that it lacks are those of config.json, where chat models
    of old keep them.

    Raises InputError when it is no table.
    """
    found = read_json(inside(checkpoint, GENERATION)) if (checkpoint / GENERATION).exists() else {}
    if not isinstance(found, dict):
        raise InputError("not a table", where=checkpoint / GENERATION, fix="fetch the model again")
    named = (key for key in TOKEN_IDS if found.get(key) is None and config.get(key) is not None)
    return found | {key: config[key] for key in named}


def generation_of(checkpoint: Path, config: Mapping[str, Any]) -> Generation:
    """Raises InputError for values of another type than Transformers takes. config: the folder's config.json."""
    found, where = generation_config(checkpoint, config), checkpoint / GENERATION
    ends = found.get("eos_token_id")
    listed = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(index) is int and index >= 0 for index in listed):
        raise InputError(
            f"eos_token_id is {str(ends)[:80]}", where=where, why="it must be a token id or a list of them"
        )
    given = {name: value for name, value in found.items() if name in SAMPLING and value is not None}
    numbers: dict[str, Any] = SAMPLING | given
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise InputError(
                f"{name} is {str(value)[:80]}", where=where, why="it must be a number that is not negative"
            )
    do_sample = found.get("do_sample") or False
    if not isinstance(do_sample, bool):
        raise InputError(f"do_sample is {str(do_sample)[:80]}", where=where, why="it must be true or false")
    other = (name for name, neutral in NEUTRAL.items() if found.get(name) is not None and found[name] not in neutral)
    return Generation(
        ends=tuple(dict.fromkeys(listed)),
        do_sample=do_sample,
        temperature=float(numbers["temperature"]),
        top_k=int(numbers["top_k"]),
        top_p=float(numbers["top_p"]),
        min_p=float(numbers["min_p"]),
        repetition_penalty=float(numbers["repetition_penalty"]),
        other=tuple(other),
    )
