"""Bytes of one more fine-tune on a device as a patch, and the time to switch to it, against `cp` of the artifact.

    python -m tests.benchmarks.patch_size --work /tmp/patches
    python -m tests.benchmarks.patch_size --work /tmp/patches --model model.gguf

Without a model the sample's base is taught twice for 60 steps, with two seeds, for each group size. A model of yours is
quantized, and its offsets are moved at random, by a normal distribution of 0.005. Switching is apply and apply
--reverse in turns, fsync and both hashes included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qalora_runtimes.patching import apply_patch

import qalora_export as q
from tests.benchmarks.machine import RESULTS, machine
from tests.conftest import ROOT
from tests.formats.patch.artifacts import moved

RECIPE = ROOT / "samples/devices/recipe.toml"
ARTIFACTS = ("model.gguf", "onnx", "split.gguf")  # the last: layout split, its adapter included
SPREAD = 0.005


def main() -> None:
    options = _arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    for group in options.groups:
        work = options.work / f"g{group}"
        work.mkdir()
        base = work / "base.qalora"
        q.quantize(options.model or _recipe().model, base, q.QuantizeSettings(method="rtn", group_size=group))
        for seed in (0, 1):
            tuned = moved(base, work / f"{seed}.qalora", seed, size=SPREAD) if options.model else _taught(base, seed)
            (work / str(seed)).mkdir()
            q.export_gguf(tuned, work / str(seed) / "model.gguf")
            q.export_gguf(tuned, work / str(seed) / "split.gguf", q.GgufSettings(layout="split"))
            q.export_onnx(tuned, work / str(seed) / "onnx", q.OnnxSettings(allow_text_differences=True))
        for artifact in ARTIFACTS:
            rows[f"g{group}, {artifact}"] = _measured(work, artifact, options.repeats)
        shutil.rmtree(work)
    shutil.rmtree(options.work / "tiny", ignore_errors=True)
    found = {"benchmark": "patch_size", "machine": machine(), "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))


def table(found: dict[str, Any]) -> str:
    lines = ["| | artifact | patch | share | switching, CPU s | wall, × cp |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in found["rows"].items():
        sizes = f"{row['artifact_bytes']:,} | {row['patch_bytes']:,} | {100 * row['share']:.1f} %"
        lines.append(f"| {name} | {sizes} | {row['switch_cpu_seconds']:.2f} | {row['switch_over_copy']:.1f} |")
    return "\n".join(lines)


def _recipe() -> q.Recipe:
    return q.load_recipe(RECIPE)


def _taught(base: Path, seed: int) -> Path:
    settings = _recipe().train.model_copy(
        update={"max_steps": 60, "validation": None, "evaluate_every": None, "seed": seed}
    )
    adapter, merged = base.with_name(f"adapter-{seed}"), base.with_name(f"{seed}.qalora")
    q.train(base, adapter, settings)
    q.merge(base, adapter, merged)
    return merged


def _measured(work: Path, artifact: str, repeats: int) -> dict[str, float]:
    old, new, patch = work / "0" / artifact, work / "1" / artifact, work / f"{artifact}.patch"
    report = q.export_patch(old, new, patch)
    copy: Callable[[Path, Path], object] = shutil.copytree if old.is_dir() else shutil.copyfile
    cpu, ratios = [], []
    for turn in range(2 * repeats):
        began, used = time.perf_counter(), time.process_time()
        apply_patch(patch, old, reverse=turn % 2 == 1)
        took = time.perf_counter() - began
        cpu.append(time.process_time() - used)
        began = time.perf_counter()
        copy(old, work / "copy")
        ratios.append(took / (time.perf_counter() - began))
        (shutil.rmtree if old.is_dir() else Path.unlink)(work / "copy")
    return {
        "artifact_bytes": report.of,
        "patch_bytes": report.nbytes,
        "share": report.nbytes / report.of,
        "moved": report.moved,
        "offsets": report.offsets,
        "switch_cpu_seconds": statistics.median(cpu),
        "switch_over_copy": statistics.median(ratios),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/patch-bench"))
    parser.add_argument("--model", type=Path, help="a GGUF file or Transformers folder (default: the sample, taught)")
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, once: does it still run?")
    parser.add_argument("--json", type=Path, default=RESULTS / "patch_size.json")
    options = parser.parse_args()
    if options.smoke:
        from tests.models import make_tiny_model

        options.groups, options.repeats = [32], 1
        options.model = make_tiny_model(options.work / "tiny")
    return options


if __name__ == "__main__":
    main()
