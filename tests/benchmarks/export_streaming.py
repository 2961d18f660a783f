"""Memory and time of the exporters on a synthetic 7B-shaped checkpoint, against `cp` + sync of the same bytes.

    python -m tests.benchmarks.export_streaming --work /tmp/export-bench

Each export is a process of its own. Its memory is VmHWM minus VmRSS after its imports, so mapped pages of the files
count. `cp` copies what the export wrote, to the same disk, and syncs it; export and cp take turns, and so do the
formats of one checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import (
    LLAMA_2_7B,
    RESULTS,
    TINY,
    llama_config,
    machine,
    reset_peak,
    resident_bytes,
    write_random_checkpoint,
)

# Checkpoint (arguments of write_random_checkpoint) -> what it is exported to.
CHECKPOINTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "4 bits": ({}, ("gguf q4_1", "gguf split", "onnx")),
    "q4_k": ({"grid": "q4_k"}, ("gguf q4_k", "onnx q4_k")),
    "q2_k": ({"grid": "q2_k", "group": 16, "bits": 2}, ("gguf q2_k",)),
    "8 bits": ({"bits": 8, "sym": True}, ("gguf q8_0", "onnx 8 bits")),
    "3 bits": ({"bits": 3}, ("onnx 3 bits",)),
}
FORMATS = tuple(name for _, names in CHECKPOINTS.values() for name in names)
SMOKE = TINY | {"hidden": 256, "intermediate": 512}  # whole super-blocks
AIM_BYTES, AIM_RATIO = 2**28, 1.5


def main() -> None:
    options = _arguments()
    if options.child:
        _child(options.child, options.checkpoint, options.out)
        return
    shape = SMOKE if options.smoke else LLAMA_2_7B
    config = llama_config(**shape | ({"layers": options.layers} if options.layers else {}))
    work = options.work / "export-streaming"
    found, repeats = machine(), 1 if options.smoke else options.repeats
    rows: dict[str, dict[str, Any]] = {}
    try:
        for arguments, formats in CHECKPOINTS.values():
            wanted = [name for name in formats if name in options.formats]
            if not wanted:
                continue
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            checkpoint = write_random_checkpoint(work / "checkpoint", config, **arguments)
            rows |= _measure(wanted, checkpoint, work, repeats)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    aims = {"peak_above_imports_bytes": AIM_BYTES, "seconds_per_cp_seconds": AIM_RATIO}
    content = {"benchmark": "export_streaming", "machine": found, "shape": config, "aims": aims, "rows": rows}
    _report(content, options.json)


def _measure(names: list[str], checkpoint: Path, work: Path, repeats: int) -> dict[str, dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    copies: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    sizes, out = dict[str, int](), work / "out"
    for _ in range(repeats):
        for name in names:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            os.sync()
            runs[name].append(_export(name, checkpoint, out))
            copies[name].append(_copy(out, work / "copy"))
            sizes[name] = _bytes(out)
    return {name: _row(sizes[name], _bytes(checkpoint), runs[name], copies[name]) for name in names}


def _row(size: int, source: int, runs: list[dict[str, Any]], copies: list[tuple[float, float]]) -> dict[str, Any]:
    copy, copy_cpu = (statistics.median(values) for values in zip(*copies, strict=True))
    return {
        "bytes": size,
        "checkpoint_bytes": source,
        "seconds": statistics.median(run["seconds"] for run in runs),
        "cp_sync_seconds": copy,
        "cp_sync_cpu_seconds": copy_cpu,
        "ratio": statistics.median(run["seconds"] / copied for run, (copied, _) in zip(runs, copies, strict=True)),
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
        "peak_above_imports_bytes": max(run["peak_above_imports_bytes"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "runs": runs,
        "cp_runs": copies,
    }


def _export(name: str, checkpoint: Path, out: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.export_streaming",
        "--child",
        name,
        "--checkpoint",
        str(checkpoint),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout)


def _child(name: str, checkpoint: Path, out: Path) -> None:
    """One export, in this process; its figures as JSON on stdout."""
    import gguf  # noqa: F401
    import onnx  # noqa: F401

    from qalora_export.formats.gguf.export import export_gguf
    from qalora_export.formats.onnx.export import export_onnx
    from qalora_export.formats.onnx.graph import build_graph
    from qalora_export.recipe import GgufSettings, OnnxSettings

    if name.startswith("onnx"):
        build_graph(llama_config(**TINY))  # mobius-onnx imports torch and Transformers when it first builds a graph
    layout = "split" if name == "gguf split" else "q4_1"
    reset_peak()
    before, began, cpu = resident_bytes("VmRSS"), time.perf_counter(), time.process_time()
    if name.startswith("onnx"):
        export_onnx(checkpoint, out / "onnx", OnnxSettings())
    else:
        export_gguf(checkpoint, out / "model.gguf", GgufSettings(layout=layout))
    seconds, peak = time.perf_counter() - began, resident_bytes("VmHWM")
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": time.process_time() - cpu,
                "peak_bytes": peak,
                "peak_above_imports_bytes": peak - before,
            }
        )
    )


def _copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds, and CPU seconds, of cp and sync of every file under `source`."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    began, cpu = time.perf_counter(), _children_cpu()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *(str(path) for path in target.rglob("*") if path.is_file())], check=True)
    seconds, cpu = time.perf_counter() - began, _children_cpu() - cpu
    shutil.rmtree(target)
    return seconds, cpu


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _report(content: dict[str, Any], path: Path) -> None:
    from tests.benchmarks.common import print_table, write_json

    write_json(path, content)
    header = [
        "export",
        "GB written",
        "seconds",
        "cp + sync, s",
        "ratio",
        "CPU s",
        "CPU s of cp",
        "peak RSS above imports, MiB",
    ]
    rows = [
        [
            name,
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['seconds']:.1f}",
            f"{row['cp_sync_seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['cp_sync_cpu_seconds']:.1f}",
            f"{row['peak_above_imports_bytes'] / 2**20:.0f}",
        ]
        for name, row in content["rows"].items()
    ]
    print_table(
        f"Export of {content['shape']['num_hidden_layers']} layers; {content['machine']['cpu']}, "
        f"{content['machine']['cores']} cores; {path}",
        header,
        rows,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"), help="needs 4 × the checkpoint's size")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than Llama-2-7B's 32")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, once: does the benchmark itself work?")
    parser.add_argument("--json", type=Path, default=RESULTS / "export_streaming.json")
    parser.add_argument("--child", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
