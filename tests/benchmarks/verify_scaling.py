"""verify-parity's own time and memory as the model grows, stage by stage.

    python -m tests.benchmarks.verify_scaling --work /tmp/verify-bench

Random Llamas of four sizes, exported to GGUF and ONNX and verified on all three runtimes with the default probe set
(at least 24 sequences, 1,000 positions). Each size is a process of its own. "own peak" is the memory of the verifier,
without and with pages mapped from files (which the system takes back when it needs them); "runner peak" the largest of
the runtimes' processes.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import (
    RESULTS,
    TINY,
    anonymous_peak,
    linears,
    llama_config,
    machine,
    reset_peak,
    resident_bytes,
    write_random_checkpoint,
)

SIZES = {
    "XS": {"hidden": 256, "intermediate": 704, "layers": 4, "heads": 4, "kv_heads": 4, "vocab": 4096},
    "S": {"hidden": 512, "intermediate": 1408, "layers": 6, "heads": 8, "kv_heads": 4, "vocab": 8192},
    "M": {"hidden": 768, "intermediate": 2048, "layers": 10, "heads": 12, "kv_heads": 4, "vocab": 16384},
    "L": {"hidden": 1024, "intermediate": 2816, "layers": 14, "heads": 16, "kv_heads": 8, "vocab": 32000},
}
# Stage -> functions of qalora_export.verify as their callers name them; no stage contains another.
STAGES = {
    "probes": ("stage.make_probes",),
    "PyTorch reference": ("stage.reference_logprobs",),
    "PyTorch int8 simulation": ("stage.simulated_int8_logprobs",),
    "G3 layers": ("reference.local_run.prove",),
    "G0 bytes": ("gates.g0_bytes.bytes_entry",),
    "G1 weights": ("gates.g1_weights.weights_entry",),
    "metrics": ("target.position_metrics",),
    "report": ("stage.write_report", "stage.write_html", "stage.write_junit"),
}


def main() -> None:
    options = _arguments()
    if options.child:
        _child(json.loads(options.child), options.work, smoke=options.smoke)
        return
    found = machine()
    sizes = {"tiny": TINY} if options.smoke else {name: SIZES[name] for name in options.sizes}
    rows = {}
    for name, shape in sizes.items():
        work = options.work / f"verify-{name}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            rows[name] = _one(llama_config(**shape, context=512), work, smoke=options.smoke)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    _report({"benchmark": "verify_scaling", "machine": found, "rows": rows}, options.json)


def _one(config: dict[str, Any], work: Path, *, smoke: bool) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.verify_scaling",
        "--child",
        json.dumps(config),
        "--work",
        str(work),
        *(["--smoke"] if smoke else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"verify-parity did not finish:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    linear = sum(rows * columns for _, rows, columns in linears(config))
    return {"parameters": linear + 2 * config["vocab_size"] * config["hidden_size"], "shape": config} | found


def _child(config: dict[str, Any], work: Path, *, smoke: bool) -> None:
    """Export, then verify with every stage timed; figures as JSON on the last line of stdout."""
    from qalora_export.formats.gguf.export import export_gguf
    from qalora_export.formats.onnx.export import export_onnx
    from qalora_export.recipe import GgufSettings, OnnxSettings, VerifySettings
    from qalora_export.verify.stage import verify_parity

    model = write_random_checkpoint(work / "model", config)
    export_gguf(model, work / "model.gguf", GgufSettings())
    export_onnx(model, work / "onnx", OnnxSettings())
    settings = VerifySettings(sequences=16).model_copy(update={"positions": 1}) if smoke else VerifySettings()
    seconds: dict[str, float] = defaultdict(float)
    peaks: dict[str, int] = {}
    for stage, functions in STAGES.items():
        for dotted in functions:
            _time(dotted, stage, seconds)
    _time_runs(seconds, peaks)
    reset_peak()
    before, own, began = resident_bytes("VmRSS"), resident_bytes("RssAnon"), time.perf_counter()
    with anonymous_peak() as anonymous:
        report = verify_parity(model, work / "report", settings, gguf=work / "model.gguf", onnx=work / "onnx")
    total = time.perf_counter() - began
    peak = resident_bytes("VmHWM")
    found = json.loads((work / "report" / "report.json").read_text())
    print(
        json.dumps(
            {
                "exit_code": int(report.exit_code),
                "seconds": total,
                "stages": dict(seconds) | {"other": total - sum(seconds.values())},
                "peak_bytes": peak,
                "peak_above_imports_bytes": peak - before,
                "peak_anonymous_above_imports_bytes": anonymous[0] - own,
                "runner_peak_bytes": peaks,
                "gates": {f"{e['runtime']} {e['gate']}": e["status"] for e in found["gates"]},
            }
        )
    )


def _time(dotted: str, stage: str, seconds: dict[str, float]) -> None:
    module_name, _, name = dotted.rpartition(".")
    module = importlib.import_module(f"qalora_export.verify.{module_name}")
    setattr(module, name, _timed(getattr(module, name), lambda *_: stage, seconds))


def _time_runs(seconds: dict[str, float], peaks: dict[str, int]) -> None:
    """Time every process of a runtime, and keep the largest memory each told of."""
    from qalora_runtimes import launch

    timed = _timed(launch.run_runner, lambda runtime, *_: f"runs of {runtime}", seconds)

    def run(name: str, **options: Any) -> Any:
        result = timed(name, **options)
        peaks[name] = max(peaks.get(name, 0), (result.fingerprint or {}).get("peak_rss_bytes") or 0)
        return result

    launch.run_runner = run


def _timed(function: Callable[..., Any], stage: Callable[..., str], seconds: dict[str, float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[stage(*arguments)] += time.perf_counter() - began

    return call


def _report(content: dict[str, Any], path: Path) -> None:
    from tests.benchmarks.common import print_table, write_json

    write_json(path, content)
    rows = content["rows"]
    stages = sorted({stage for row in rows.values() for stage in row["stages"]})
    lines = [
        ["parameters, M", *(f"{row['parameters'] / 1e6:.1f}" for row in rows.values())],
        ["total, s", *(f"{row['seconds']:.0f}" for row in rows.values())],
    ]
    lines += [[f"  {stage}, s", *(f"{row['stages'].get(stage, 0):.1f}" for row in rows.values())] for stage in stages]
    own = [f"{row['peak_above_imports_bytes'] / 2**20:.0f}" for row in rows.values()]
    runners = [f"{max(row['runner_peak_bytes'].values()) / 2**20:.0f}" for row in rows.values()]
    private = [f"{row['peak_anonymous_above_imports_bytes'] / 2**20:.0f}" for row in rows.values()]
    lines += [
        ["own peak above imports, MiB", *private],
        ["  and mapped, MiB", *own],
        ["runner peak, MiB", *runners],
        ["exit code", *(str(row["exit_code"]) for row in rows.values())],
    ]
    print_table(
        f"verify-parity, three runtimes; {content['machine']['cpu']}, {os.cpu_count()} cores; {path}",
        ["", *rows],
        lines,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--smoke", action="store_true", help="one tiny model: does the benchmark itself work?")
    parser.add_argument("--json", type=Path, default=RESULTS / "verify_scaling.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
