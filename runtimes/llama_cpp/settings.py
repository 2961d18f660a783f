"""What --exact means in llama.cpp, and what a user gets without it, in one place for every way of driving it."""

from __future__ import annotations

from dataclasses import dataclass

KV_CELLS = 256  # llama.cpp rounds a context up to this many cells


@dataclass(frozen=True)
class LlamaSettings:
    """exact: KV cache in f32, flash attention off, no repacked weight buffers, CPU only; else llama.cpp's defaults."""

    exact: bool
    threads: int
    context: int

    @classmethod
    def of(cls, *, exact: bool, threads: int, longest: int) -> LlamaSettings:
        cells = -(-max(longest + 1, KV_CELLS) // KV_CELLS) * KV_CELLS  # one to spare: a server also samples a token
        return cls(exact, threads, cells)

    @property
    def kv_dtype(self) -> str:
        return "f32" if self.exact else "f16"

    def described(self) -> dict[str, object]:
        return {
            "kv_dtype": self.kv_dtype,
            "flash_attention": "off" if self.exact else "auto",
            "extra_buffers": not self.exact,
            "context": self.context,
        }
