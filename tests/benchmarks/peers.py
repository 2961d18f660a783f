"""One quantizer of another project over one model, in an environment of its own; quantizers.py starts it.

    PEER_PYTHON tests/benchmarks/peers.py gptqmodel MODEL WINDOWS.npy OUT --bits 4 --group-size 32

WINDOWS.npy: calibration tokens, int (windows, tokens). Writes OUT/weights.safetensors, the float32 values that the
quantized matrices of the decoder layers stand for, and OUT/peer.json. Imports nothing of ours: the peers pin other
versions of torch and Transformers than we do.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Found = tuple[dict[str, Tensor], float]  # name -> weight, and bits per weight beside the codes, times the group size


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    """The matrices that are quantized: those of the decoder layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
    }


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def hqq(folder: Path, _windows: np.ndarray, bits: int, group: int) -> Found:
    """Groups along the input as everywhere else; scale and zero point in float16."""
    from hqq.core.quantize import Quantizer

    weights = {}
    for name, module in linears(plain(folder)).items():
        codes, meta = Quantizer.quantize(
            module.weight.data, nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
        )
        meta |= {part: meta[part].half().float() for part in ("scale", "zero")}
        weights[name] = Quantizer.dequantize(codes, meta).reshape(module.weight.shape).float()
    return weights, 32.0


def auto_round(folder: Path, windows: np.ndarray, bits: int, group: int) -> Found:
    """Its defaults (200 iterations of SignSGD), asymmetric: scale in float16, integer zero point."""
    from auto_round import AutoRound

    model, tokenizer = plain(folder), AutoTokenizer.from_pretrained(folder)
    data = [
        {"input_ids": torch.tensor(row)[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        for row in windows
    ]
    found = AutoRound(
        model,
        tokenizer,
        bits=bits,
        group_size=group,
        sym=False,
        dataset=data,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map="cpu",
        amp=False,
    )
    quantized, _ = found.quantize()
    return {name: module.weight.data.float() for name, module in linears(quantized).items()}, 16.0 + bits


def gptqmodel(folder: Path, windows: np.ndarray, bits: int, group: int) -> Found:
    """Its defaults, asymmetric: scale in float16, integer zero point."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    seen, quantize = dict[str, Tensor](), GPTQ.quantize

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        found = quantize(self, *args, **options)
        seen[self._named_module.full_name] = found[0].detach().float().cpu().clone()
        return found

    GPTQ.quantize = watched
    config = QuantizeConfig(bits=bits, group_size=group, sym=False, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(str(folder), config, dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    model.quantize(rows, batch_size=4)
    return seen, 16.0 + bits


PEERS: dict[str, Callable[[Path, np.ndarray, int, int], Found]] = {
    "hqq": hqq,
    "auto-round": auto_round,
    "gptqmodel": gptqmodel,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    windows = np.load(options.windows)
    began, before = time.perf_counter(), _cpu()
    weights, beside = PEERS[options.peer](options.model, windows, options.bits, options.group_size)
    options.out.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, options.out / "weights.safetensors")
    content = {
        "peer": options.peer,
        "version": importlib.metadata.version(options.peer),
        "bits_per_weight": options.bits + beside / options.group_size,
        "cpu_seconds": _cpu() - before,
        "seconds": time.perf_counter() - began,
    }
    (options.out / "peer.json").write_text(json.dumps(content), encoding="utf-8")


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
