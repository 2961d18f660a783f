"""Time and peak memory of GPTQ on a model of a real size, one decoder layer on the GPU at a time.

    python tests/benchmarks/quantize_cuda.py --shape llama-2-7b --out build/bench/quantize_cuda.json

The model is random (bf16, written shard by shard to --work, 13.5 GB for 7B, deleted afterwards); the stage is the one
that `qalora-export quantize` runs. `--shape tiny --device cpu` tries the code anywhere. Exit code 3 without CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from qalora_export.errors import ExitCode, QaloraError
from tests.benchmarks.common import SHAPES, config_of, hardware, print_table, write_json


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group", type=int, default=32, choices=(32, 64, 128))
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences (default 128)")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--work", type=Path, help="folder for the model and the result; default a temporary one")
    parser.add_argument("--out", type=Path, default=Path("build/bench/quantize_cuda.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the stage takes a GPU where it sees one
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "quantize_cuda.py measures a CUDA GPU and PyTorch sees none here; nothing was measured.\n"
            "Try the code with: --device cpu --shape tiny --samples 4 --sequence 64",
            file=sys.stderr,
        )
        return ExitCode.RUNTIME_UNAVAILABLE
    device = torch.device(options.device)
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        try:
            result = run(options, Path(work), device)
        except QaloraError as error:
            print(error, file=sys.stderr)
            return error.code
    write_json(
        options.out,
        {
            "benchmark": "quantize_cuda",
            "device": options.device,
            "hardware": hardware(device),
            "settings": {
                k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("out", "work")
            },
            "result": result,
        },
    )
    show(options, result)
    print(f"written: {options.out}")
    return ExitCode.OK


def run(options: argparse.Namespace, work: Path, device: Any) -> dict[str, Any]:
    from qalora_export.quantization.stage import quantize
    from qalora_export.recipe import QuantizeSettings
    from tests.models import TEXT

    config = config_of(options.shape, layers=options.layers, sequence=options.sequence)
    write_model(work / "model", config, device)
    text = work / "calibration.txt"
    repeats = 1 + options.samples * options.sequence * 8 // len(TEXT)
    text.write_text("".join(f"{index} {TEXT}" for index in range(repeats)), encoding="utf-8")
    settings = QuantizeSettings(
        bits=options.bits,
        group_size=options.group,
        calibration=str(text),
        calibration_samples=options.samples,
        sequence_length=options.sequence,
    )
    report = quantize(work / "model", work / "quantized", settings)
    layers = config.num_hidden_layers
    return {
        "layers": layers,
        "weights": report.weights,
        "seconds": report.seconds,
        "seconds_per_layer": report.seconds / layers,
        "peak_cuda_bytes": report.peak_cuda_bytes,
        "peak_rss_bytes": report.peak_rss_bytes,
        "calibration_tokens": report.calibration_tokens,
        "bits_per_weight": report.bits_per_weight,
    }


def write_model(path: Path, config: Any, device: Any) -> None:
    """A random model in Transformers format, one shard per decoder layer, so that memory holds one at a time."""
    from safetensors.torch import save_file

    from samples.base.tokenizer import train_tokenizer
    from tests.models import TEXT

    path.mkdir()
    train_tokenizer([TEXT], vocab_size=512).save_pretrained(path)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(path)
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(shards(config, device)):
        shard = f"model-{index:05d}.safetensors"
        save_file(tensors, path / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shards(config: Any, device: Any) -> Iterator[dict[str, Any]]:
    """Random bf16 tensors by name: everything outside the decoder layers first, then layer after layer."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator(device=device).manual_seed(0)
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else "", []).append((name, parameter.shape))
    for group in sorted(groups, key=lambda key: int(key or -1)):
        made = {}
        for name, shape in groups[group]:
            tensor = (
                torch.ones(shape, device=device)
                if "norm" in name
                else torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)
            )
            made[name] = tensor.to(torch.bfloat16).cpu()
        yield made


def show(options: argparse.Namespace, result: dict[str, Any]) -> None:
    peak = result["peak_cuda_bytes"]
    print_table(
        f"GPTQ, {options.bits} bits, g {options.group}, {result['calibration_tokens']:,} calibration tokens",
        ["shape", "layers", "seconds", "s/layer", "peak GPU GiB", "peak RSS GiB"],
        [
            [
                options.shape,
                str(result["layers"]),
                f"{result['seconds']:.1f}",
                f"{result['seconds_per_layer']:.2f}",
                f"{peak / 2**30:.2f}" if peak else "not measured",
                f"{result['peak_rss_bytes'] / 2**30:.2f}",
            ]
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
