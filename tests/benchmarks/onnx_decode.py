"""Decode time per token in ONNX Runtime: our split form between its speed limit and the usual exact alternative.

    python -m tests.benchmarks.onnx_decode --work /tmp/onnx-bench

* split: what `export onnx` writes, int8 activations (accuracy_level 4).
* limit: the same graph without the offset branch. A wrong model; nothing that adds an offset can be faster.
* float zero_points: MatMulNBits with zero_points = -m/s in float32, the form of other exporters.

Random weights, hidden size 2048, KV cache of `--past` positions. The graphs take turns; ratios are medians of ratios
within a turn. A decode step reads every weight once, so where memory is the bottleneck the ratio is that of the bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from qalora_export.formats.onnx.read import read_back
from tests.benchmarks.machine import RESULTS, TINY, llama_config, machine, write_random_checkpoint

SHAPE = {"hidden": 2048, "intermediate": 5632, "layers": 6, "heads": 32, "kv_heads": 4, "vocab": 512}
AIM = 0.95  # of the limit
SLOW_EVERY = 20  # turns between steps of the graph that takes a hundred times as long
VARIANTS = {"split": "ours, exact", "limit": "no offset: a wrong model", "float zero_points": "-m/s in float32"}


def main() -> None:
    options = _arguments()
    found = machine()
    shape = TINY if options.smoke else SHAPE | ({"layers": options.layers} if options.layers else {})
    config = llama_config(**shape)
    turns = 2 if options.smoke else options.turns
    work = options.work / "onnx-decode"
    rows = {}
    try:
        for group in options.groups:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            folder = _export(work, config, group)
            rows |= {
                f"g{group}, {name}": row | {"group": group, "variant": name, "bytes_bound": bytes_bound(group, name)}
                for name, row in _measure(folder, config, options.threads, options.past, turns).items()
            }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    content = {
        "benchmark": "onnx_decode",
        "machine": found,
        "shape": config,
        "threads": options.threads,
        "past": options.past,
        "turns": turns,
        "spinning": False,
        "aim_of_limit": AIM,
        "rows": rows,
    }
    _report(content, options.json)


def _export(work: Path, config: dict[str, Any], group: int) -> Path:
    from qalora_export.formats.onnx.export import export_onnx
    from qalora_export.recipe import OnnxSettings

    checkpoint = write_random_checkpoint(work / "checkpoint", config, group=group)
    export_onnx(checkpoint, work / "onnx", OnnxSettings())
    return work / "onnx"


def _measure(
    folder: Path, config: dict[str, Any], threads: int, past: int, turns_wanted: int
) -> dict[str, dict[str, Any]]:
    graphs = {
        "split": (folder / "onnx/model.onnx").read_bytes(),
        "limit": without_offset(folder),
        "float zero_points": with_float_zero_points(folder),
    }
    sessions = {name: _session(graph, folder, threads) for name, graph in graphs.items()}
    heads, size = config["num_key_value_heads"], config["head_dim"]
    feed = {"input_ids": np.full((1, 1), 5), "attention_mask": np.ones((1, past + 1), np.int64)}
    inputs = next(iter(sessions.values())).get_inputs()
    feed |= {i.name: np.zeros((1, heads, past, size), np.float32) for i in inputs if i.name not in feed}
    for session in sessions.values():
        session.run(["logits"], feed)
    slow = "float zero_points"
    turns = []
    for turn in range(turns_wanted):  # one step of each in turn: a busy moment of the machine hits all alike
        taken = [name for name in sessions if name != slow or turn % SLOW_EVERY == 0]
        turns.append({name: _step(sessions[name], feed) for name in taken})
    rows = {}
    for name in sessions:
        taken = [turn for turn in turns if name in turn]
        rows[name] = {
            "what": VARIANTS[name],
            "milliseconds_per_token": 1e3 * statistics.median(turn[name] for turn in taken),
            "speed_of_limit": statistics.median(turn["limit"] / turn[name] for turn in taken),
            "best_milliseconds": 1e3 * min(turn[name] for turn in taken),
            "best_of_best_limit": min(turn["limit"] for turn in turns) / min(turn[name] for turn in taken),
            "steps": len(taken),
        }
    return rows


def bytes_bound(group: int, variant: str) -> float | None:
    """Speed / limit where only the bytes of weights count: codes 0.5, z 0.5 / g, float32 scale and R 4 / g each."""
    bytes_per_weight = {"limit": 0.5 + 4.5 / group, "split": 0.5 + 8.5 / group}
    return bytes_per_weight["limit"] / bytes_per_weight[variant] if variant in bytes_per_weight else None


def _step(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> float:
    """Seconds of one decode step."""
    began = time.perf_counter()
    session.run(["logits"], feed)
    return time.perf_counter() - began


def _session(graph: bytes, folder: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Spinning threads fight with whatever else runs; sleeping ones make runs comparable on a shared machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder / "onnx"))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def without_offset(folder: Path) -> bytes:
    """The graph with each `product + GroupSum · R` reduced to the product, and dead nodes removed."""
    model = onnx.load(folder / "onnx/model.onnx", load_external_data=False)
    _drop_offsets(model)
    return model.SerializeToString()


def with_float_zero_points(folder: Path) -> bytes:
    """The same with zero_points = -m/s in float32, as the form of other exporters has them."""
    model = onnx.load(folder / "onnx/model.onnx", load_external_data=False)
    contents = read_back(folder)
    _drop_offsets(model)
    for node in model.graph.node:
        module = node.input[1].removesuffix(".codes") if node.op_type == "MatMulNBits" else ""
        if module in contents.modules:
            matrix = contents.packed(module)
            zero = -matrix.offset.astype(np.float32) / matrix.scale.astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(zero, f"{module}/zero"))
            node.input[3:] = [f"{module}/zero"]
    return model.SerializeToString()


def _drop_offsets(model: onnx.ModelProto) -> None:
    """Replace y = product + offset branch by y = product for every MatMulNBits, then remove what nothing uses."""
    products = {node.output[0]: node for node in model.graph.node if node.op_type == "MatMulNBits"}
    dropped = 0
    for node in model.graph.node:
        if node.op_type == "Add" and node.input[0] in products and node.name.endswith("/Add"):
            products[node.input[0]].output[0] = node.output[0]
            node.output[0] = f"{node.name}/unused"
            node.input[0] = node.input[1]
            dropped += 1
    if dropped != len(products):
        raise RuntimeError(f"{dropped} of {len(products)} linear layers have an offset to drop")
    wanted, kept = {output.name for output in model.graph.output}, []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))


def _report(content: dict[str, Any], path: Path) -> None:
    from tests.benchmarks.common import print_table, write_json

    write_json(path, content)
    header = ["graph", "what", "ms / token", "speed / limit", "best / best", "by bytes read"]
    rows = [
        [
            name,
            row["what"],
            f"{row['milliseconds_per_token']:.2f}",
            f"{row['speed_of_limit']:.3f}",
            f"{row['best_of_best_limit']:.3f}",
            f"{row['bytes_bound']:.3f}" if row["bytes_bound"] else "",
        ]
        for name, row in content["rows"].items()
    ]
    shape = content["shape"]
    print_table(
        f"ONNX Runtime decode, {shape['num_hidden_layers']} layers, hidden {shape['hidden_size']}, "
        f"{content['threads']} threads; {content['machine']['cpu']}; {path}",
        header,
        rows,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--layers", type=int, help="fewer or more decoder layers than 6")
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 64, 128], help="group sizes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--past", type=int, default=64, help="positions in the KV cache")
    parser.add_argument("--turns", type=int, default=300, help="decode steps of each graph")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, once: does the benchmark itself work?")
    parser.add_argument("--json", type=Path, default=RESULTS / "onnx_decode.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
