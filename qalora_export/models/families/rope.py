"""Rotary position embedding as config.json states it, in Transformers 4 and 5 spelling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError

# Parameters each scaling needs beside its type.
NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """theta: the base; kind: "default", "linear" (positions divided by factor) or "llama3" (per-frequency factors)."""

    theta: float
    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0

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


def rope_tables(theta: float, factor: float, size: int, context: int) -> tuple[NDArray[np.float32], ...]:
    """(cos, sin), float32 (context, size/2), of position · theta^(−2i/size) / factor; steps in float32."""
    inverse = np.float32(1) / np.power(np.float32(theta), np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    angles = np.outer(np.arange(context, dtype=np.float32), inverse / np.float32(factor))
    return np.cos(angles), np.sin(angles)


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
    if kind not in allowed or kind not in NEEDS:
        raise InputError(
            f"rotary scaling {kind!r} is not supported",
            where="config.json: rope_parameters",
            why=f"exact in both formats: {', '.join(allowed)}",
        )
    partial = raw.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise InputError(f"partial rotary factor {partial!r} is not supported", where="config.json: rope_parameters")
    values = {name: _positive(name, raw.get(name)) for name in NEEDS[kind]}
    theta = raw.get("rope_theta")
    rope = Rope(
        theta=_positive("rope_theta", config.get("rope_theta", 10000.0) if theta is None else theta),
        kind=kind,
        factor=values.get("factor", 1.0),
        low_freq_factor=values.get("low_freq_factor", 1.0),
        high_freq_factor=values.get("high_freq_factor", 1.0),
        original_context=int(values.get("original_max_position_embeddings", 0)),
    )
    if kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise InputError("high_freq_factor is not above low_freq_factor", where="config.json: rope_parameters")
    return rope


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
