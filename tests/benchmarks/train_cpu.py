"""Steps/s of ours against PEFT LoRA on the CPU, where the sample and CI train.

Same model, data, rank, targets and optimizer:

    python tests/benchmarks/train_cpu.py --out build/bench/train_cpu.json

The models live in one process and take their steps in turn, so a busy machine slows all alike; the ratio is the figure.
With `--threads 1` the ratio of CPU seconds is steady even on a machine that others use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from qalora_export.data.samples import load_samples
from qalora_export.data.sequence_packing import collate, one_per_row
from qalora_export.errors import ExitCode
from qalora_export.grid import pack_codes
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.qalora.attach import attach
from qalora_export.qalora.hf_quantizer import replace_linear
from qalora_export.recipe import TrainSettings
from tests.benchmarks.common import hardware, interleaved, print_table, write_json
from tests.benchmarks.variants import TARGETS, linear_names
from tests.models import round_to_nearest

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Batch = dict[str, torch.Tensor]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "samples/base/model")
    parser.add_argument("--data", type=Path, default=ROOT / "samples/devices/train.jsonl")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group", type=int, default=32, choices=(32, 64, 128))
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/bench/train_cpu.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    batches = load_batches(options)
    models = {"ours": ours(options), "PEFT LoRA": peft_lora(options), "frozen base": frozen(options)}
    works = {name: stepper(model, batches) for name, model in models.items()}
    times = interleaved(works, torch.device("cpu"), options.steps)
    limit = times["PEFT LoRA"]
    rows = [
        {
            "variant": name,
            "step_seconds": t.wall,
            "steps_per_second": 1 / t.wall,
            "step_cpu_seconds": t.cpu,
            "speedup_over_peft_lora": limit.wall / t.wall,
            "speedup_over_peft_lora_cpu_time": limit.cpu / t.cpu,
        }
        for name, t in times.items()
    ]
    write_json(
        options.out,
        {
            "benchmark": "train_cpu",
            "hardware": hardware(torch.device("cpu")),
            "results": rows,
            "settings": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        },
    )
    print_table(
        f"training on the CPU, {options.threads} threads, batch {options.batch}, {options.precision}",
        ["variant", "steps/s", "PEFT LoRA ÷ this", "in CPU time"],
        [
            [
                str(row["variant"]),
                *(
                    f"{row[key]:.2f}"
                    for key in ("steps_per_second", "speedup_over_peft_lora", "speedup_over_peft_lora_cpu_time")
                ),
            ]
            for row in rows
        ],
    )
    print("frozen base: forward and backward to the embeddings with plain linears and no adapter, the limit for both")
    print(f"written: {options.out}")
    return ExitCode.OK


def load_batches(options: argparse.Namespace) -> list[Batch]:
    """Eight batches of the data, as the train stage makes them."""
    samples = load_samples(options.data, load_tokenizer(options.model), sequence_length=512).samples
    rows = one_per_row(samples[: 8 * options.batch])
    return [collate(rows[begin : begin + options.batch]) for begin in range(0, len(rows), options.batch)]


def base_model(options: argparse.Namespace) -> Any:
    model = load_model(options.model, dtype=DTYPES[options.precision])
    model.config.use_cache = False
    return model.requires_grad_(False).train()


def ours(options: argparse.Namespace) -> Any:
    model = base_model(options)
    for name in linear_names(model):
        matrix = round_to_nearest(model.get_submodule(name).weight.float().numpy(), options.bits, options.group)
        layer = replace_linear(model, name, bits=options.bits, group_size=options.group)
        layer.codes.copy_(torch.from_numpy(pack_codes(matrix.codes, matrix.bits)))
        layer.scale.copy_(torch.from_numpy(matrix.scale))
        layer.offset.copy_(torch.from_numpy(matrix.offset))
    attach(model, TrainSettings(rank=options.rank, alpha=2.0 * options.rank))
    return model


def peft_lora(options: argparse.Namespace) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        base_model(options),
        LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules=list(TARGETS),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
    )


def frozen(options: argparse.Namespace) -> Any:
    """Only the final norm learns, and the embeddings' output asks for a gradient: every product, no adapter."""
    model = base_model(options)
    model.model.norm.weight.requires_grad_(True)
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model


def stepper(model: Any, batches: list[Batch]) -> Callable[[], object]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    turn = 0

    def step() -> None:
        nonlocal turn
        batch, turn = batches[turn % len(batches)], turn + 1
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    sys.exit(main())
