"""Speed of llama.cpp on one model in eight files: our exact layouts and the lossy types users know.

    python -m tests.benchmarks.llama_layouts --work /tmp/llama-bench

Random weights at the shape of a 1.1B Llama; speed does not depend on their values. Every file is loaded at once and
the files take turns, so a busy moment of the machine hits all alike. Ratios are medians of ratios within a turn.
`--only q4_k_m` measures that one beside Q4_K_M.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from qalora_runtimes.llama_cpp.c_api import Context, Library
from qalora_runtimes.llama_cpp.wheel import import_wheel

from tests.benchmarks.machine import (
    LLAMA_1_1B,
    RESULTS,
    TINY,
    linears,
    llama_config,
    machine,
    write_random_checkpoint,
)

RANK = 16
Clock = Callable[[], float]
AIM = 0.9  # of Q4_K_M
OURS = {
    "q4_1": "one file, exact",
    "q4_k": "one file on grid q4_k, exact",
    "q4_k_m": "one file of preset q4_k_m, exact",
    "split": "Q4_0 base + exact offset adapter",
    "split, rank 16": "symmetric Q4_0 base + trained adapter of rank 16",
    "split, F16 lm_head": "as split, lm_head left in float16 (the default of quantize)",
}
LOSSY = {"Q4_0": "lossy, lm_head Q6_K", "Q4_K_M": "lossy, lm_head Q6_K"}
REFERENCE = "Q4_K_M"


def main() -> None:
    options = _arguments()
    os.environ["OMP_WAIT_POLICY"] = options.omp_wait_policy
    found = machine()
    shape = TINY | {"hidden": 256, "intermediate": 512} if options.smoke else LLAMA_1_1B
    config = llama_config(**shape | ({"layers": options.layers} if options.layers else {}))
    prompt, tokens, repeats = (8, 2, 1) if options.smoke else (options.prompt, options.tokens, options.repeats)
    work = options.work / "llama-layouts"
    shutil.rmtree(work, ignore_errors=True)
    try:
        files = _files(work, config, options.group, {*(options.only or OURS | LOSSY), REFERENCE})
        turns = measure(files, options.threads, config["vocab_size"], prompt, tokens, repeats)
        sizes = {name: sum(path.stat().st_size for path in pair if path) for name, pair in files.items()}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    rows = {
        name: {"what": (OURS | LOSSY)[name]} | speeds(name, turns, prompt, tokens) | {"bytes": sizes[name]}
        for name in files
    }
    content = {
        "benchmark": "llama_layouts",
        "machine": found,
        "shape": config,
        "group_size": options.group,
        "threads": options.threads,
        "clock": "CPU seconds" if options.threads == 1 else "seconds",
        "prompt_tokens": prompt,
        "decoded_tokens": tokens,
        "turns": repeats,
        "omp_wait_policy": options.omp_wait_policy,
        "aim_of_q4_k_m": AIM,
        "rows": rows,
    }
    _report(content, options.json)


def _files(
    work: Path, config: dict[str, Any], group: int, wanted: Collection[str]
) -> dict[str, tuple[Path, Path | None]]:
    """Label -> (model, adapter). lm_head is 8-bit symmetric (Q8_0) but where the label says otherwise, and Q6_K in
    q4_k_m and in llama.cpp's.
    """
    from qalora_export.checkpoint.canonical import CanonicalCheckpoint
    from qalora_export.comparison.k_quants import quantize_plans
    from qalora_export.formats.gguf.export import export_gguf
    from qalora_export.formats.gguf.split import adapter_path
    from qalora_export.recipe import GgufSettings
    from tests.formats.gguf.f32_twin import f32_plans

    work.mkdir(parents=True)
    made: dict[str, Path] = {}

    def checkpoint(name: str, **settings: Any) -> Path:
        if name not in made:
            made[name] = write_random_checkpoint(work / name, config, group=group, **settings)
        return made[name]

    def exported(source: Path, name: str, layout: Literal["q4_1", "split"] = "q4_1") -> Path:
        out = work / f"{name}.gguf"
        if not out.exists():
            export_gguf(source, out, GgufSettings(layout=layout))
        return out

    def split(source: Path, name: str) -> tuple[Path, Path | None]:
        out = exported(source, name, "split")
        return out, adapter_path(out)

    def trained() -> tuple[Path, Path | None]:
        symmetric = checkpoint("symmetric", head_bits=8, sym=True)
        return exported(symmetric, "base", "split"), _trained_adapter(symmetric, work / "trained.gguf", config, group)

    def lossy(name: str) -> tuple[Path, Path | None]:
        mix = "q4_k_m" in wanted
        source = checkpoint("mixed", grid="q4_k_m") if mix else checkpoint("model", head_bits=8)
        exact = exported(source, "q4_k_m" if mix else "q4_1")
        model = CanonicalCheckpoint(source)
        return quantize_plans(f32_plans(model), model.config, exact, work / f"{name}.gguf", name), None

    makers: dict[str, Callable[[], tuple[Path, Path | None]]] = {
        "q4_1": lambda: (exported(checkpoint("model", head_bits=8), "q4_1"), None),
        "q4_k": lambda: (exported(checkpoint("levels", head_bits=8, grid="q4_k"), "q4_k"), None),
        "q4_k_m": lambda: (exported(checkpoint("mixed", grid="q4_k_m"), "q4_k_m"), None),
        "split": lambda: split(checkpoint("model", head_bits=8), "split"),
        "split, rank 16": trained,
        "split, F16 lm_head": lambda: split(checkpoint("plain"), "plain"),
        **{name: partial(lossy, name) for name in LOSSY},
    }
    return {name: make() for name, make in makers.items() if name in wanted}


def _trained_adapter(base: Path, out: Path, config: dict[str, Any], group: int) -> Path:
    """A rank-16 QA-LoRA adapter over every linear layer, with random A and B."""
    from qalora_export.checkpoint.manifest import Parent
    from qalora_export.formats.gguf.lora import LowRank, write_adapter

    rng = np.random.default_rng(1)
    modules = {
        module: LowRank(
            rng.standard_normal((RANK, columns // group), np.float32) * 0.01,
            rng.standard_normal((rows, RANK), np.float32) * 0.01,
            1.0,
        )
        for module, rows, columns in linears(config)
    }
    write_adapter(base, modules, out, parent=Parent("adapter", "random", "0" * 64))
    return out


def measure(
    files: dict[str, tuple[Path, Path | None]], threads: int, vocab: int, prompt: int, tokens: int, repeats: int
) -> list[dict[str, tuple[float, float]]]:
    """Per turn and label: seconds of the prefill and of the decode; of CPU where one thread runs, which other work
    on the machine disturbs least.
    """
    library = Library(Path(import_wheel().xllamacpp.__file__))
    cells = -(-(prompt + tokens) // 256) * 256
    settings = {
        "n_ctx": cells,
        "n_batch": max(prompt, 32),
        "n_ubatch": max(prompt, 32),
        "n_threads": threads,
        "n_threads_batch": threads,
    }
    contexts = {name: Timed(library, path, lora, model={}, context=settings) for name, (path, lora) in files.items()}
    ids = np.random.default_rng(2).integers(0, vocab, prompt + tokens).astype(np.int32)
    clock = time.process_time if threads == 1 else time.perf_counter
    for context in contexts.values():  # weights into memory, buffers allocated
        _turn(context, ids[:4], 2, clock)
    return [{name: _turn(context, ids, prompt, clock) for name, context in contexts.items()} for _ in range(repeats)]


class Timed(Context):
    """A context that computes logits of the last position alone, as text generation does."""

    def evaluate(self, ids: np.ndarray, start: int) -> None:
        batch, last = self._batch, len(ids) - 1
        for i, token in enumerate(ids.tolist()):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, i == last
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.n_tokens = len(ids)
        code = self._library.c.llama_decode(self._context, batch)
        logits = self._library.c.llama_get_logits_ith(self._context, last)  # waits until they are there
        if code or not logits:
            raise RuntimeError(f"llama_decode failed with code {code}: {self._library.last_words()}")


def _turn(context: Timed, ids: np.ndarray, prompt: int, clock: Clock) -> tuple[float, float]:
    context.clear()
    prefill = _seconds(lambda: context.evaluate(ids[:prompt], 0), clock)
    decode = _seconds(lambda: [context.evaluate(ids[at : at + 1], at) for at in range(prompt, len(ids))], clock)
    return prefill, decode


def _seconds(work: Callable[[], object], clock: Clock) -> float:
    began = clock()
    work()
    return clock() - began


def speeds(name: str, turns: list[dict[str, tuple[float, float]]], prompt: int, tokens: int) -> dict[str, Any]:
    """Tokens per second of one file, and both phases against REFERENCE."""
    row: dict[str, Any] = {}
    for index, (phase, count) in enumerate((("prefill", prompt), ("decode", tokens))):
        row[f"{phase}_tokens_per_second"] = count / statistics.median(turn[name][index] for turn in turns)
        row[f"{phase}_of_q4_k_m"] = statistics.median(turn[REFERENCE][index] / turn[name][index] for turn in turns)
        row[f"{phase}_seconds"] = [turn[name][index] for turn in turns]
    return row


def _report(content: dict[str, Any], path: Path) -> None:
    from tests.benchmarks.common import print_table, write_json

    write_json(path, content)
    header = ["layout", "what", "MB", "prefill tok/s", "decode tok/s", "prefill / Q4_K_M", "decode / Q4_K_M"]
    rows = [
        [
            name,
            row["what"],
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['prefill_tokens_per_second']:.1f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['prefill_of_q4_k_m']:.2f}",
            f"{row['decode_of_q4_k_m']:.2f}",
        ]
        for name, row in content["rows"].items()
    ]
    print_table(
        f"llama.cpp, g={content['group_size']}, {content['threads']} threads, "
        f"prompt {content['prompt_tokens']}; "
        f"{content['machine']['cpu']}; {path}",
        header,
        rows,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"), help="needs about 7 GB")
    parser.add_argument("--only", nargs="+", choices=[*OURS, *LOSSY], help="these rows, and Q4_K_M")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than 22")
    parser.add_argument("--group", type=int, choices=(32, 64, 128), default=32, help="group size of the checkpoint")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prefill")
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded one by one after it")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument(
        "--omp-wait-policy",
        choices=("passive", "active"),
        default="passive",
        help="passive: waiting threads sleep, as in our runner",
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model, once: does the benchmark itself work?")
    parser.add_argument("--json", type=Path, default=RESULTS / "llama_layouts.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
