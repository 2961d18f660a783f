"""What --exact means in llama.cpp, and what a user gets without it, in one place for every way of driving it."""

from __future__ import annotations

from dataclasses import dataclass

from qalora_runtimes.protocol import Job
from qalora_runtimes.side_by_side import groups_of

KV_CELLS = 256  # llama.cpp rounds a context up to this many cells


@dataclass(frozen=True)
class LlamaSettings:
    """exact: KV cache in f32, flash attention off, no repacked weight buffers, CPU only; else llama.cpp's defaults.

    context: cells of the KV cache. sequences: how many share it, each seeing its own tokens alone.
    """

    exact: bool
    threads: int
    context: int
    sequences: int = 1

    @classmethod
    def of(cls, *, exact: bool, threads: int, job: Job) -> LlamaSettings:
        """Of the exact path sequences decode side by side; what ships runs alone, by the kernels of one token."""
        cells = -(-max(job.longest + 1, KV_CELLS) // KV_CELLS) * KV_CELLS  # one to spare: a server also samples a token
        return cls(exact, threads, cells, max(map(len, groups_of(job, job.longest)), default=1) if exact else 1)

    @property
    def kv_dtype(self) -> str:
        return "f32" if self.exact else "f16"

    def described(self) -> dict[str, object]:
        return {
            "kv_dtype": self.kv_dtype,
            "flash_attention": "off" if self.exact else "auto",
            "extra_buffers": not self.exact,
            "context": self.context,
            **({"sequences": self.sequences} if self.sequences > 1 else {}),
        }
