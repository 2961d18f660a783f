"""The best quantizer at each size: ours beside GPTQModel, AutoRound, HQQ and llama.cpp's types, one base, one text.

    python3 -m venv build/peers && build/peers/bin/pip install gptqmodel auto-round hqq
    python -m tests.benchmarks.quantizers --peer-python build/peers/bin/python      # half an hour; --only ours: minutes

The base is samples/base; quantized are the 28 matrices of its decoder layers, nothing else. All calibrate on the same
windows. KL(fp16 ‖ quantized) is the mean over positions of the held-out text, of the values that the codes stand for,
in float32. Bits per weight count scales and zero points or offsets as stored. Everybody runs on one thread; CPU seconds
are those of quantizing, without imports.

llama.cpp's K and IQ types need in-features that 256 divides, which the base's 384 are not: there llama.cpp falls back
to types of 4 bits and more. To be compared with at all, their blocks here run on over the ends of rows, each weight
with the importance of its own in-feature. No file is like that, so it flatters them if anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray
from safetensors.torch import load_file

from qalora_export.checkpoint.canonical import CanonicalCheckpoint, parts_of
from qalora_export.comparison import k_quants
from qalora_export.data.calibration import calibration_windows
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import QuantizeRule, QuantizeSettings
from samples.base.quality import MODEL, divergence, logprobs, windows_of
from tests.benchmarks import peers
from tests.benchmarks.machine import RESULTS, machine
from tests.benchmarks.q4_k_m import mean_squares

Weights = dict[str, torch.Tensor]
Row = tuple[Weights, float, float]  # weights, bits per weight, CPU seconds
SEQUENCE = 256
SIZES = tuple((bits, group) for bits in (2, 3, 4) for group in (128, 64, 32))
MORE = ("v_proj", "o_proj", "down_proj")  # one bit more in a mix, as llama.cpp's Q2_K gives it
TYPES = (T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.Q2_K, T.IQ3_XXS, T.IQ3_S, T.Q3_K, T.IQ4_XS, T.IQ4_NL, T.Q4_K, T.Q4_1, T.Q5_K)
K_MIXES = {"Q2_K mix": (T.Q2_K, T.Q3_K), "Q3_K mix": (T.Q3_K, T.Q4_K)}
OURS: Literal["ours"] = "ours"


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    windows, samples = (2, 4) if options.smoke else (options.windows, options.samples)
    work = options.work / "quantizers"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        bench = _Bench(work, samples, windows, options.peer_python)
        content = json.loads(options.json.read_text()) if options.json.exists() and options.only else {"rows": {}}
        content |= {"benchmark": "quantizers", "machine": machine(), "base": "samples/base", "windows": windows}
        content |= {"calibration": f"{samples} windows of {SEQUENCE} tokens"}
        for name, make in bench.rows(options.only, smoke=options.smoke):
            content["rows"][name] = bench.measured(make())
            print(name, content["rows"][name], flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    content["rows"] = dict(sorted(content["rows"].items(), key=lambda row: row[1]["bits_per_weight"]))
    _report(content, options.json)


class _Bench:
    def __init__(self, work: Path, samples: int, windows: int, peer_python: Path | None) -> None:
        self.work, self.samples, self.peer_python = work, samples, peer_python
        self.network = load_model(MODEL)
        self.modules = {
            name: module.weight.data.float().clone() for name, module in peers.linears(self.network).items()
        }
        self.text = windows_of(windows)
        self.reference = logprobs(MODEL, self.text)
        rows = calibration_windows(
            MODEL / "calibration.txt", load_tokenizer(MODEL), seed=0, samples=samples, length=SEQUENCE
        )
        self.calibration = np.stack([np.asarray(row) for row in rows])
        np.save(work / "windows.npy", self.calibration)

    def rows(self, only: str | None, *, smoke: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
        """(name, how to make it) of everything, or of one maker: "ours", "llama.cpp" or a peer."""
        sizes = SIZES[-1:] if smoke else SIZES
        if only in (None, OURS):
            for bits, group in sizes:
                yield f"ours, {bits} bits, g {group}", lambda b=bits, g=group: self._ours(b, g)
                name = f"ours, {bits} bits, one more for v, o, down, g {group}"
                yield name, lambda b=bits, g=group: self._ours(b, g, more=True)
                for method in ("mse", "rtn"):
                    name = f"ours {method.upper()}, {bits} bits, g {group}"
                    yield name, lambda b=bits, g=group, m=method: self._ours(b, g, method=m)
        if only in (None, "llama.cpp"):
            for kind in TYPES[-1:] if smoke else TYPES:
                yield f"llama.cpp {kind.name}, imatrix", lambda k=kind: self._llama(k, k)
            for name, (kind, more) in {} if smoke else K_MIXES.items():
                yield f"llama.cpp {name}, imatrix", lambda k=kind, m=more: self._llama(k, m)
        for peer in peers.PEERS if self.peer_python is not None else ():
            for bits, group in sizes if only in (None, peer) else ():
                yield f"{peer}, {bits} bits, g {group}", lambda p=peer, b=bits, g=group: self._peer(p, b, g)

    def measured(self, row: Row) -> dict[str, Any]:
        weights, bits, seconds = row
        assert weights.keys() == self.modules.keys(), "another set of matrices than ours"
        with torch.no_grad():
            for name, weight in weights.items():
                self.network.get_submodule(name).weight.copy_(weight)
            found = [torch.log_softmax(self.network(line[None]).logits[0, :-1], -1) for line in self.text]
        return {"bits_per_weight": bits, "kl": divergence(self.reference, found), "cpu_seconds": seconds}

    def _ours(
        self, bits: int, group: int, *, method: Literal["gptq", "mse", "rtn"] = "gptq", more: bool = False
    ) -> Row:
        rules = tuple(QuantizeRule(match=f"*.{leaf}", bits=bits + 1) for leaf in MORE if more)  # type: ignore[arg-type]
        settings = QuantizeSettings(
            method=method,
            bits=bits,  # type: ignore[arg-type]  # of SIZES
            group_size=group,
            calibration=str(MODEL / "calibration.txt"),
            calibration_samples=self.samples,
            sequence_length=SEQUENCE,
            rules=rules,
        )
        out, began = self.work / "ours.qalora", time.process_time()
        quantize(MODEL, out, settings, force=True)
        seconds, checkpoint = time.process_time() - began, CanonicalCheckpoint(out)
        parts = [f"{name}.{part}" for name in self.modules for part in parts_of(checkpoint.grids[name])]
        size = sum(checkpoint.tensor(part).nbytes for part in parts)
        weights = {name: torch.from_numpy(checkpoint.group_affine(name).dequantize()) for name in self.modules}
        return weights, 8 * size / sum(weight.numel() for weight in weights.values()), seconds

    def _llama(self, kind: T, more: T) -> Row:
        """kind: of all matrices but those of MORE."""
        importance, began, size, weights = self.importance, time.process_time(), 0, {}
        for name, weight in self.modules.items():
            mine = more if name.rpartition(".")[2] in MORE else kind
            blocks = _blocks(mine, weight.numpy(), importance[name])
            size += blocks.nbytes
            weights[name] = torch.from_numpy(gguf.dequantize(blocks, mine).reshape(weight.shape).copy())
        seconds = time.process_time() - began
        return weights, 8 * size / sum(weight.numel() for weight in weights.values()), seconds

    @cached_property
    def importance(self) -> dict[str, NDArray[np.float32]]:
        return mean_squares(MODEL, self.calibration)

    def _peer(self, peer: str, bits: int, group: int) -> Row:
        out = self.work / "peer"
        shutil.rmtree(out, ignore_errors=True)
        script = Path(peers.__file__)
        options = ["--bits", str(bits), "--group-size", str(group)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
        words = [
            str(self.peer_python),
            str(script),
            peer,
            str(MODEL),
            str(self.work / "windows.npy"),
            str(out),
            *options,
        ]
        subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        told = json.loads((out / "peer.json").read_text())
        return load_file(out / "weights.safetensors"), told["bits_per_weight"], told["cpu_seconds"]


def _blocks(kind: T, weight: NDArray[np.float32], importance: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(rows, bytes), row by row where the type's block divides a row, else over the ends of rows as a single one."""
    if weight.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
        weight, importance = weight.reshape(1, -1), np.tile(importance, weight.shape[0])
    return k_quants._quantized(k_quants._library(), kind, weight, importance)


def beaten(rows: dict[str, Any]) -> dict[str, tuple[str, float]]:
    """Of every row that is not ours: the best of ours that is no larger, and its KL over that row's."""
    ours = {name: row for name, row in rows.items() if name.startswith(OURS)}
    found = {}
    for name, row in rows.items():
        smaller = {mine: each for mine, each in ours.items() if each["bits_per_weight"] <= row["bits_per_weight"]}
        if name not in ours and smaller:
            best = min(smaller, key=lambda mine: smaller[mine]["kl"])
            found[name] = (best, smaller[best]["kl"] / row["kl"])
    return found


def _report(content: dict[str, Any], path: Path) -> None:
    from tests.benchmarks.common import print_table, write_json

    write_json(path, content)
    against = beaten(content["rows"])
    table = [
        [
            name,
            f"{row['bits_per_weight']:.3f}",
            f"{row['kl']:.4f}",
            f"{row['cpu_seconds']:.0f}",
            *((against[name][0], f"{against[name][1]:.2f}") if name in against else ("", "")),
        ]
        for name, row in content["rows"].items()
    ]
    header = ["quantizer", "bits per weight", "KL to fp16", "CPU s", "best of ours, no larger", "its KL, × this"]
    print_table(f"{content['base']}; {content['machine']['cpu']}; {path}", header, table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--windows", type=int, default=42, help="of held-out text, 512 tokens each")
    parser.add_argument("--samples", type=int, default=128, help=f"calibration windows of {SEQUENCE} tokens")
    parser.add_argument("--peer-python", type=Path, help="interpreter that has gptqmodel, auto-round and hqq")
    parser.add_argument(
        "--only", choices=(OURS, "llama.cpp", *peers.PEERS), help="the others stay as the JSON has them"
    )
    parser.add_argument("--smoke", action="store_true", help="as little as can be: does the benchmark itself work?")
    parser.add_argument("--json", type=Path, default=RESULTS / "quantizers.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
