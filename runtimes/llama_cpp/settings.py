"""What --exact means in llama.cpp, and what a user gets without it, in one place for every way of driving it."""

from __future__ import annotations

from dataclasses import dataclass

from qalora_runtimes.protocol import Job

KV_CELLS = 256  # llama.cpp rounds a context up to this many cells
SIDE_BY_SIDE = 16  # sequences that are decoded at once on the exact path, at most


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
        return cls(exact, threads, cells, max(map(len, side_by_side(job)), default=1) if exact else 1)

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


def side_by_side(job: Job) -> list[list[int]]:
    """Groups of sequences, by number, that are decoded at once, the longest first; none unless `job` decodes.

    A step of decode reads every weight whatever it computes, so n sequences cost little more than one. A group needs no
    more cells than the job does anyway.
    """
    if "decode" not in job.passes:
        return []
    groups, cells = [list[int]()], 0
    for number in sorted(range(len(job.sequences)), key=lambda i: -len(job.sequences[i])):
        length = len(job.sequences[number])
        if groups[-1] and (len(groups[-1]) == SIDE_BY_SIDE or cells + length > job.longest):
            groups.append([])
            cells = 0
        groups[-1].append(number)
        cells += length
    return groups
