"""Bytes that training holds on a device, counted without one: ours, PEFT LoRA, QLoRA, side by side.

    python tests/benchmarks/train_memory.py --shape llama-2-7b --shape llama-3.2-3b --sequence 512 --sequence 2048 \
        --out build/bench/train_memory.json

Counted on the CPU from the models that train_cuda.py times, with one and two decoder layers, over 32 and 64 tokens:

    resident     weights in whatever form they are held, adapters, their gradients, AdamW's two states
    saved        what autograd keeps for backward that is not resident, grows with tokens

Both are linear in the number of layers, and saved in tokens, so the whole model follows from four counts. Left out,
since it is the same for all: logits, one layer's temporaries, and the matrix that every quantized variant rebuilds for
its product. A GPU's allocator rounds up; train_cuda.py measures that.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from tests.benchmarks.common import SHAPES, config_of, hardware, print_table, write_json
from tests.benchmarks.variants import VARIANTS, Setup

COUNTED = ("ours", "lora", "qlora")
TOKENS = (32, 64)
OPTIMIZER_STATES = 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="may be repeated; default both Llamas")
    parser.add_argument("--sequence", action="append", type=int, help="may be repeated; default 512 and 2048")
    parser.add_argument("--group", action="append", type=int, help="of ours; may be repeated; default 32 and 64")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("build/bench/train_memory.json"))
    options = parser.parse_args(arguments)
    options.shape = options.shape or ["llama-2-7b", "llama-3.2-3b"]
    options.sequence = options.sequence or [512, 2048]
    options.group = options.group or [32, 64]
    return options


def tensors_of(model: Any) -> list[Tensor]:
    """Every tensor the model holds, the statistics of bitsandbytes' quantized weights among them."""
    found = [*model.parameters(), *model.buffers()]
    for state in [t.quant_state for t in found if getattr(t, "quant_state", None) is not None]:
        found += [value for value in state.as_dict(packed=False).values() if isinstance(value, Tensor)]
    return found


def resident(model: Any) -> int:
    """Bytes of distinct storages, and for each trainable parameter its gradient and optimizer states."""
    held = tensors_of(model)  # kept while counting: an address must not be used twice
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return sum(storages.values()) + (1 + OPTIMIZER_STATES) * trainable


def saved(model: Any, ids: Tensor, *, autocast: bool) -> int:
    """Bytes of distinct storages that autograd keeps over the decoder for backward, beside resident ones."""
    alive = tensors_of(model)  # kept while counting: an address must not be used twice
    own = {t.untyped_storage().data_ptr() for t in alive}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    context: Any = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    decoder = next(module for module in model.modules() if type(module).__name__ == "LlamaModel")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), context:
        decoder(input_ids=ids, use_cache=False)
    return sum(found.values())


def count(shape: str, name: str, *, group: int, rank: int) -> dict[str, int]:
    """Bytes of one variant: resident per layer and beside layers; saved per token, per layer and beside layers."""
    held, kept = {}, {}
    for layers in (1, 2):
        config = config_of(shape, layers=layers, sequence=max(TOKENS))
        model = VARIANTS[name].build(Setup(config, torch.device("cpu"), rank=rank, alpha=2.0 * rank, group=group))
        model.train()
        held[layers] = resident(model)
        for tokens in TOKENS:
            ids = torch.zeros(1, tokens, dtype=torch.long)
            kept[layers, tokens] = saved(model, ids, autocast=VARIANTS[name].autocast)
        del model
        gc.collect()
    few, many = TOKENS
    layer = (kept[2, many] - kept[2, few] - kept[1, many] + kept[1, few]) // (many - few)
    rest = (kept[1, many] - kept[1, few]) // (many - few) - layer
    constant = kept[2, few] - kept[1, few] - few * layer  # casts of adapters by autocast
    return {
        "resident_layer": held[2] - held[1],
        "resident_rest": 2 * held[1] - held[2],
        "saved_token_layer": layer,
        "saved_token_rest": rest,
        "saved_layer": constant,
        "saved_rest": kept[1, few] - constant - few * (layer + rest),
    }


def totals(counted: dict[str, int], *, layers: int, tokens: int, hidden: int) -> dict[str, int]:
    """Bytes of the whole model, and with gradient checkpointing (bf16 input of every layer, one layer in full)."""
    weights = layers * counted["resident_layer"] + counted["resident_rest"]
    layer = tokens * counted["saved_token_layer"] + counted["saved_layer"]
    rest = tokens * counted["saved_token_rest"] + counted["saved_rest"]
    return {
        "resident": weights,
        "saved": layers * layer + rest,
        "total": weights + layers * layer + rest,
        "checkpointed_total": weights + layers * tokens * hidden * 2 + layer + rest,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    results: list[dict[str, Any]] = []
    for shape in options.shape:
        for name in COUNTED:
            for group in options.group if name == "ours" else options.group[:1]:
                counted = count(shape, name, group=group, rank=options.rank)
                title = VARIANTS[name].title + (f", g = {group}" if name == "ours" else "")
                for sequence in options.sequence:
                    size = {"layers": SHAPES[shape]["num_hidden_layers"], "hidden": SHAPES[shape]["hidden_size"]}
                    results.append(
                        {
                            "shape": shape,
                            "variant": name,
                            "title": title,
                            "sequence": sequence,
                            "batch": options.batch,
                            "counted": counted,
                            "bytes": totals(counted, tokens=options.batch * sequence, **size),
                        }
                    )
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    write_json(
        options.out,
        {
            "benchmark": "train_memory",
            "hardware": hardware(torch.device("cpu")),
            "settings": settings,
            "results": results,
        },
    )
    show(results)
    print(f"written: {options.out}")
    return 0


def show(results: list[dict[str, Any]]) -> None:
    columns = ("resident", "saved", "total", "checkpointed_total")
    rows = [
        [row["shape"], f"{row['batch']} × {row['sequence']}", row["title"]]
        + [f"{row['bytes'][column] / 2**30:.2f}" for column in columns]
        for row in results
    ]
    header = ["shape", "tokens", "variant", "resident GiB", "saved GiB", "together", "with checkpointing"]
    print_table("bytes held in training, counted", header, sorted(rows, key=lambda row: row[:2]))


if __name__ == "__main__":
    sys.exit(main())
