"""Our preset q4_k_m beside llama.cpp's own Q4_K_M of the same base: bytes, KL to the fp16 model, speed.

    python -m tests.benchmarks.q4_k_m --work /tmp/q4-k-m

The base is samples/base; KL(fp16 ‖ quantized) is the mean over positions of its held-out text, of the weights that the
files hold (float32 arithmetic in PyTorch), so that int8 activations of a runtime do not blur it. llama.cpp's files are
made by its own quantizer (comparison/k_quants.py), without an importance matrix and with one from the text that
calibrates GPTQ. Speed: every file is loaded at once and they take turns; ratios are medians of ratios within a turn.
The base is small and its width, 384, no multiple of 256, so both sides fall back for what reads it; for the speed of
K-quants at the width of a large model see llama_layouts.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.comparison.k_quants import Imatrix, quantize_plans, source_plans
from qalora_export.data.calibration import calibration_windows
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.names import NameMap
from qalora_export.formats.gguf.read import GgufContents
from qalora_export.models.families import family_of
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.quantization.presets import more_bits
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import QuantizeRule, QuantizeSettings
from samples.base.quality import MODEL, divergence, logprobs, losses, windows_of
from tests.benchmarks.llama_layouts import REFERENCE, measure, speeds
from tests.benchmarks.machine import RESULTS, machine

OURS = {
    "ours, q4_k_m": "the preset, GPTQ, exact after fine-tuning",
    "ours, Q6_K": "the preset with q6_k for q5_k: llama.cpp's types, not trained there",
}
LLAMA = {
    REFERENCE: "llama.cpp, no importance matrix",
    "Q4_K_M, imatrix": "llama.cpp, importance matrix of the same text",
}


def main() -> None:
    options = _arguments()
    os.environ["OMP_WAIT_POLICY"] = "passive"
    found = machine()
    windows, samples = (2, 4) if options.smoke else (options.windows, options.samples)
    prompt, tokens, turns = (8, 2, 1) if options.smoke else (options.prompt, options.tokens, options.turns)
    work = options.work / "q4-k-m"
    try:
        files = _files(work, samples, method="rtn" if options.smoke else "gptq")
        content = json.loads(options.json.read_text()) if options.json.exists() and options.part else {"rows": {}}
        rows: dict[str, Any] = {name: content["rows"].get(name, {}) for name in files}
        content |= {"benchmark": "q4_k_m", "machine": found, "base": "samples/base", "calibration_samples": samples}
        if options.part != "speed":
            text = windows_of(windows)
            reference = logprobs(MODEL, text)
            content |= {"windows": windows, "fp16_perplexity": float(np.exp(losses(reference, text).mean()))}
            for name, path in files.items():
                rows[name] |= _row(name, path, text, reference)
        if options.part != "quality":
            vocabulary = ModelFolder(MODEL).config["vocab_size"]
            pairs = {name: (path, None) for name, path in files.items()}
            times = measure(pairs, options.threads, vocabulary, prompt, tokens, turns)
            clock = "CPU seconds" if options.threads == 1 else "seconds"
            content |= {"threads": options.threads, "clock": clock, "turns": turns}
            content |= {"prompt_tokens": prompt, "decoded_tokens": tokens}
            for name in files:
                rows[name] |= speeds(name, times, prompt, tokens)
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)
    _report(content | {"rows": rows}, options.json)


def _files(work: Path, samples: int, *, method: Literal["gptq", "rtn"]) -> dict[str, Path]:
    """Label -> GGUF file; those that an earlier run kept are taken."""
    places = [work / f"{name}.gguf" for name in ("ours", "ours-q6", "llama", "llama-imatrix")]
    files = dict(zip((*OURS, *LLAMA), places, strict=True))
    if all(path.exists() for path in places):
        return files
    work.mkdir(parents=True, exist_ok=True)
    settings = QuantizeSettings(
        preset="q4_k_m",
        method=method,
        calibration=str(MODEL / "calibration.txt"),
        calibration_samples=samples,
        sequence_length=256,
    )
    layers = ModelFolder(MODEL).config["num_hidden_layers"]
    more = tuple(
        QuantizeRule(match=f"model.layers.{layer}.{leaf}", grid="q6_k")
        for layer in range(layers)
        if more_bits(layer, layers)
        for leaf in ("self_attn.v_proj", "mlp.down_proj")
    )
    for name, rules in (("ours", ()), ("ours-q6", more)):
        quantize(MODEL, work / name, settings.model_copy(update={"rules": rules}))
        export_gguf(work / name, work / f"{name}.gguf")
    plans, config = source_plans(MODEL), ModelFolder(MODEL).config
    importance = imatrix(MODEL, settings)
    for path, weights in zip(places[2:], (None, importance), strict=True):
        quantize_plans(plans, config, work / "ours.gguf", path, REFERENCE, weights)
    return files


def imatrix(model: Path, settings: QuantizeSettings) -> Imatrix:
    """What mean_squares finds on the calibration windows, by GGUF name."""
    folder = ModelFolder(model)
    names = NameMap(family_of(folder.config).gguf_arch, folder.config["num_hidden_layers"])
    windows = calibration_windows(
        Path(str(settings.calibration)),
        load_tokenizer(model),
        seed=settings.seed,
        samples=settings.calibration_samples,
        length=settings.sequence_length,
    )
    found = mean_squares(model, windows)
    return {names.to_gguf(f"{name}.weight"): values for name, values in found.items()}


@torch.no_grad()
def mean_squares(model: Path, windows: Collection[NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Mean square of every in-feature of every linear layer but lm_head, as llama-imatrix collects it, by module."""
    network, sums = load_model(model), dict[str, torch.Tensor]()

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + inputs[0].double().square().flatten(0, -2).mean(0)

        return hook

    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(watch(name))
    for row in windows:
        network(torch.from_numpy(row)[None])
    return {name: (total / len(windows)).float().numpy() for name, total in sums.items()}


@torch.no_grad()
def _row(name: str, path: Path, text: torch.Tensor, reference: list[torch.Tensor]) -> dict[str, Any]:
    contents, network = GgufContents(path), load_model(MODEL)
    weights = dict(network.named_parameters())
    matrices = [tensor for tensor in GgufFile(path).tensors.values() if len(tensor.shape) == 2]
    for tensor in contents.types:
        weights[tensor].copy_(torch.from_numpy(np.array(contents.dequantized(tensor))))
    found = [torch.log_softmax(network(row[None]).logits[0, :-1], -1) for row in text]
    values = sum(math.prod(tensor.shape) for tensor in matrices)
    size = sum(tensor.rows.nbytes for tensor in matrices)
    return {
        "what": (OURS | LLAMA)[name],
        "bytes": path.stat().st_size,
        "bits_per_weight": 8 * size / values,
        "kl": divergence(reference, found),
        "perplexity": float(np.exp(losses(found, text).mean())),
        "types": {kind: list(contents.types.values()).count(kind) for kind in sorted(set(contents.types.values()))},
    }


def _report(content: dict[str, Any], path: Path) -> None:
    from tests.benchmarks.common import print_table, write_json

    write_json(path, content)
    header = ["file", "what", "bytes", "bits per weight", "KL to fp16", "prefill / Q4_K_M", "decode / Q4_K_M"]
    rows = [
        [
            name,
            (OURS | LLAMA)[name],
            *(
                format(row[key], form) if key in row else ""
                for key, form in (
                    ("bytes", ","),
                    ("bits_per_weight", ".2f"),
                    ("kl", ".2e"),
                    ("prefill_of_q4_k_m", ".2f"),
                    ("decode_of_q4_k_m", ".2f"),
                )
            ),
        ]
        for name, row in content["rows"].items()
    ]
    print_table(f"{content['base']}; {content['machine']['cpu']}; {path}", header, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--windows", type=int, default=100, help="of held-out text, 512 tokens each")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of 256 tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prefill")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded one by one after it")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--part", choices=("quality", "speed"), help="only this; the other stays as the JSON has it")
    parser.add_argument("--keep", action="store_true", help="leave the files, for another run to take")
    parser.add_argument("--smoke", action="store_true", help="as little as can be: does the benchmark itself work?")
    parser.add_argument("--json", type=Path, default=RESULTS / "q4_k_m.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
