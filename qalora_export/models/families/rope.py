"""Rotary position embedding as config.json states it, in Transformers 4 and 5 spelling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError

# Parameters each scaling needs beside its type.
NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": (),  # lists, read by _longrope
}
MOST_FREQUENCIES = 2**15
ALIASES = {"su": "longrope"}  # the name in Phi-3's first configs


@dataclass(frozen=True, slots=True)
class Rope:
    """theta: the base; kind: "default", "linear" (positions divided by factor), "llama3" (per-frequency factors) or
    "longrope": divisors of the frequencies, `short` for texts of at most `original_context` positions and `long` for
    others, and a factor `magnitude` on cos and sin. partial: the share of a head's features that is rotated, its first.
    """

    theta: float
    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0
    partial: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    magnitude: float = 1.0

    def rotated(self, head_dim: int) -> int:
        """How many features of a head are rotated."""
        return int(head_dim * self.partial)

    def frequency_factors(self, head_dim: int) -> NDArray[np.float32] | None:
        """float32 (head_dim/2,): the divisor of each rotary frequency for "llama3", else None.

        Source: Llama 3.1's `apply_scaling`, Transformers `_compute_llama3_parameters`; llama.cpp reads the divisors
        from the tensor `rope_freqs.weight`.
        """
        if self.kind != "llama3":
            return None
        inverse = 1.0 / np.power(self.theta, np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        wavelength = 2 * math.pi / inverse
        smooth = (self.original_context / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = 1.0 / ((1 - smooth) / self.factor + smooth)
        long = wavelength > self.original_context / self.low_freq_factor
        short = wavelength < self.original_context / self.high_freq_factor
        return np.where(long, self.factor, np.where(short, 1.0, blended)).astype(np.float32)


def rope_tables(
    theta: float, factor: float | tuple[float, ...], size: int, context: int, magnitude: float = 1.0
) -> tuple[NDArray[np.float32], ...]:
    """(cos, sin), float32 (context, size/2), of position · theta^(−2i/size) / factor, times magnitude; steps in
    float32. factor: one, or one for each frequency.
    """
    inverse = np.float32(1) / np.power(np.float32(theta), np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    angles = np.outer(np.arange(context, dtype=np.float32), inverse / np.asarray(factor, np.float32))
    return np.cos(angles) * np.float32(magnitude), np.sin(angles) * np.float32(magnitude)


def rope_of(config: Mapping[str, Any], allowed: tuple[str, ...] = tuple(NEEDS)) -> Rope:
    """Read `rope_parameters` (Transformers 5) or `rope_theta` and `rope_scaling` (4).

    Raises InputError for a scaling type outside `allowed` or with missing or absurd parameters.
    """
    raw = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(raw, Mapping) and "full_attention" in raw:  # one table for each kind of layer (Gemma 3)
        raw = raw["full_attention"]
    if not isinstance(raw, Mapping):
        raise InputError("rotary parameters are not a table", where="config.json: rope_parameters")
    kind = raw.get("rope_type", raw.get("type", "default"))
    kind = ALIASES.get(kind, kind) if isinstance(kind, str) else None
    if kind not in allowed or kind not in NEEDS:
        raise InputError(
            f"rotary scaling {kind!r} is not supported",
            where="config.json: rope_parameters",
            why=f"exact in both formats: {', '.join(allowed)}",
        )
    partial = raw.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    values = {name: _positive(name, raw.get(name)) for name in NEEDS[kind]}
    theta = raw.get("rope_theta")
    rope = Rope(
        theta=_positive("rope_theta", config.get("rope_theta", 10000.0) if theta is None else theta),
        kind=kind,
        partial=1.0 if partial is None else _positive("partial_rotary_factor", partial),
        factor=values.get("factor", 1.0),
        low_freq_factor=values.get("low_freq_factor", 1.0),
        high_freq_factor=values.get("high_freq_factor", 1.0),
        original_context=int(values.get("original_max_position_embeddings", 0)),
    )
    if rope.partial > 1.0:
        raise InputError(f"partial_rotary_factor is {partial!r}, above 1", where="config.json: rope_parameters")
    if kind == "longrope":
        return _longrope(rope, config, raw)
    if kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise InputError("high_freq_factor is not above low_freq_factor", where="config.json: rope_parameters")
    return rope


def _longrope(rope: Rope, config: Mapping[str, Any], raw: Mapping[str, Any]) -> Rope:
    """The rest of "longrope" (arXiv 2402.13753, Transformers `_compute_longrope_parameters`)."""
    context = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings", raw.get("original_max_position_embeddings", context))
    for name, value in (("max_position_embeddings", context), ("original_max_position_embeddings", original)):
        if type(value) is not int or value < 2:
            raise InputError(f"{name} is {value!r}, not a number of positions", where="config.json")
    lists = {}
    for name in ("short_factor", "long_factor"):
        factors = raw.get(name)
        if not isinstance(factors, list) or not 0 < len(factors) <= MOST_FREQUENCIES:
            raise InputError(f"{name} is no list of factors", where="config.json: rope_parameters")
        lists[name] = tuple(_positive(name, factor) for factor in factors)
    if len(lists["short_factor"]) != len(lists["long_factor"]):
        raise InputError("short_factor and long_factor differ in length", where="config.json: rope_parameters")
    factor = context / original if raw.get("factor") is None else _positive("factor", raw["factor"])
    magnitude = raw.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return replace(
        rope,
        original_context=original,
        short=lists["short_factor"],
        long=lists["long_factor"],
        magnitude=_positive("attention_factor", magnitude),
    )


def local_theta(config: Mapping[str, Any]) -> float:
    """The RoPE base of layers with a sliding window (Gemma 3), in the spelling of Transformers 5 or 4.

    Raises InputError when these layers scale RoPE as well: llama.cpp scales that of the other layers only.
    """
    tables = config.get("rope_parameters")
    local = tables.get("sliding_attention") if isinstance(tables, Mapping) else None
    if not isinstance(local, Mapping):
        return _positive("rope_local_base_freq", config.get("rope_local_base_freq", 10000.0))
    return rope_of({"rope_parameters": {"rope_theta": 10000.0, **local}}, ("default",)).theta


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{name} is {value!r}, not a positive number", where="config.json: rope_parameters")
    return float(value)
