"""Tokens/s and peak memory of training an adapter on one GPU: ours, PEFT LoRA, QLoRA and use_qalora, side by side.

    python tests/benchmarks/train_cuda.py --shape llama-2-7b --shape llama-3.2-3b --sequence 512 --sequence 2048 \
        --out build/bench/train_cuda.json

Random weights at the named shapes, made on the device; the same rank, targets and optimizer for all. Correctness first:
kernels bit for bit, loss against the float32 path. Then `--rounds` rounds; in each round every variant is built alone
on the device, warmed up and timed, so that drift hits all alike and peak memory is its own. A variant that does not fit
or lacks its package is a row that says so. `--device cpu --shape tiny --layers 2` runs the same code anywhere.
Exit code 3 without CUDA, 1 when the check fails.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from qalora_export.errors import ExitCode, QaloraError
from qalora_export.qalora.attach import compile_layers
from tests.benchmarks.common import SHAPES, config_of, hardware, print_table, seconds, write_json
from tests.benchmarks.kernel_checks import bandwidth, check_loss, check_matrices, crossover
from tests.benchmarks.variants import VARIANTS, Setup, step_of

# ours ÷ variant in tokens/s, and the dequantize kernel's share of copy bandwidth (issue: QA-LoRA at hardware speed)
AIMS = {"lora": 1.0, "qlora": 1.3, "use_qalora": 1.5}
BANDWIDTH_AIM = 0.8


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="may be repeated; default both Llamas")
    parser.add_argument("--sequence", action="append", type=int, help="may be repeated; default 512 and 2048")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="may be repeated; default all")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step (default 2)")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 4, 8))
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder layers of every variant")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps per variant and round")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/bench/train_cuda.json"))
    options = parser.parse_args(arguments)
    options.shape = options.shape or ["llama-2-7b", "llama-3.2-3b"]
    options.sequence = options.sequence or [512, 2048]
    options.variant = options.variant or list(VARIANTS)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "train_cuda.py measures a CUDA GPU and PyTorch sees none here; nothing was measured.\n"
            "Try the code with: --device cpu --shape tiny --layers 2 --sequence 64",
            file=sys.stderr,
        )
        return ExitCode.RUNTIME_UNAVAILABLE
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False  # the float32 check is in float32; bf16 is not touched by it
    checks: dict[str, Any] = {}
    speed: dict[str, Any] = {}
    results: list[dict[str, Any]] = []
    content = {
        "benchmark": "train_cuda",
        "device": options.device,
        "hardware": hardware(device),
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "aims": {"tokens_per_second_ratio": AIMS, "fraction_of_copy": BANDWIDTH_AIM, "peak_memory": "<= qlora"},
        "checks": checks,
        "kernels": speed,
        "results": results,
    }
    try:
        for shape in options.shape:
            setup = _setup(options, shape, max(options.sequence), device)
            checks[shape] = {"differing_values": check_matrices(setup), "loss": check_loss(setup, options.sequence[0])}
            speed[shape] = {"bandwidth": bandwidth(setup, 20), "crossover": crossover(setup, 20)}
    except QaloraError as error:
        print(error, file=sys.stderr)
        return error.code
    for shape in options.shape:
        for sequence in options.sequence:
            results += measure(options, shape, sequence, device)
            write_json(options.out, content)  # after each, so that a crash loses one measurement
    show(results, speed)
    print(f"written: {options.out}")
    return ExitCode.OK


def _setup(options: argparse.Namespace, shape: str, sequence: int, device: torch.device) -> Setup:
    config = config_of(shape, layers=options.layers, sequence=sequence)
    return Setup(config, device, rank=options.rank, alpha=2.0 * options.rank, bits=options.bits, group=options.group)


def measure(options: argparse.Namespace, shape: str, sequence: int, device: torch.device) -> list[dict[str, Any]]:
    """One row per variant for one shape and sequence length, with ratios to ours."""
    setup = _setup(options, shape, sequence, device)
    rows = {
        name: {
            "shape": shape,
            "sequence": sequence,
            "batch": options.batch,
            "variant": name,
            "title": VARIANTS[name].title,
            "status": "ok",
        }
        for name in options.variant
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(options.rounds):
        for name, row in rows.items():
            if row["status"] == "ok":
                row |= _round(options, name, setup, sequence, times[name])
    for name, row in rows.items():
        if row["status"] == "ok":
            median = statistics.median(times[name])
            row |= {
                "step_seconds": median,
                "tokens_per_second": options.batch * sequence / median,
                "fastest_step_seconds": min(times[name]),
                "slowest_step_seconds": max(times[name]),
                "steps": len(times[name]),
            }
    ours = rows.get("ours", {})
    for row in rows.values():
        if "tokens_per_second" in row and "tokens_per_second" in ours:
            row["ours_speedup"] = ours["tokens_per_second"] / row["tokens_per_second"]
    return list(rows.values())


def _round(options: argparse.Namespace, name: str, setup: Setup, sequence: int, times: list[float]) -> dict[str, Any]:
    """Build one variant, warm it up, time it, free it. Returns status, resident and peak memory."""
    device, variant = setup.device, VARIANTS[name]
    model = step = None
    try:
        model = variant.build(setup)
        if options.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if options.compile:
            torch.compiler.reset()  # variants share the code that is compiled, and its limit of versions
            compile_layers(model)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, setup.config.vocab_size, (options.batch, sequence), generator=generator).to(device)
        step = step_of(variant, model, setup, ids)
        _empty(device)
        resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        losses = [float(step()) for _ in range(options.warmup)]
        times += [seconds(step, device) for _ in range(options.steps)]
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return {"status": "ok", "first_loss": losses[0], "resident_bytes": resident, "peak_memory_bytes": peak}
    except QaloraError as error:
        return {"status": error.what}
    except torch.cuda.OutOfMemoryError:
        return {"status": "out of memory"}
    finally:
        del model, step
        _empty(device)


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def show(results: list[dict[str, Any]], speed: dict[str, Any]) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        where = [row["shape"], str(row["sequence"]), row["title"]]
        if row["status"] != "ok":
            return [*where, row["status"], "", "", ""]
        peak = f"{row['peak_memory_bytes'] / 2**30:.2f}" if row["peak_memory_bytes"] else "not measured"
        ratio, aim = row.get("ours_speedup"), AIMS.get(row["variant"])
        return [
            *where,
            f"{row['tokens_per_second']:,.0f}",
            peak,
            f"{ratio:.2f}" if ratio else "",
            f"≥ {aim}" if aim else "",
        ]

    header = ["shape", "sequence", "variant", "tokens/s", "peak GiB", "ours is × faster", "aim"]
    print_table("QA-LoRA training", header, [cells(row) for row in results])
    header = ["shape", "dequantize GB/s", "copy GB/s", "fraction", "aim", "with adapter", "kernels"]
    rows = [
        [
            shape,
            f"{b['dequantize_gb_per_s']:.1f}",
            f"{b['copy_gb_per_s']:.1f}",
            f"{b['fraction_of_copy']:.2f}",
            f"≥ {BANDWIDTH_AIM}",
            f"{b['adapted_fraction_of_copy']:.2f}",
            "Triton" if b["kernels"] else "torch",
        ]
        for shape, b in ((shape, item["bandwidth"]) for shape, item in speed.items())
    ]
    print_table("dequantize to bf16 against a device copy of the same bytes", header, rows)
    rows = [
        [shape, str(r["rows"]), f"{r['fused_us']:.0f}", f"{r['separate_us']:.0f}"]
        for shape, item in speed.items()
        for r in item["crossover"]
    ]
    if rows:
        print_table(
            "few rows: fused product against dequantize + matmul, µs", ["shape", "rows", "fused", "separate"], rows
        )


if __name__ == "__main__":
    sys.exit(main())
