"""A run looked at layer by layer: right runtimes are right everywhere, and what is planted is named where it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from qalora_runtimes.protocol import Job
from qalora_runtimes.taps import run_taps

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.verify.kernels import ggml, mlas
from qalora_export.verify.kernels.arithmetic import BACKWARD
from qalora_export.verify.kernels.products import TappedGraph
from qalora_export.verify.reference.local_proof import (
    BETWEEN,
    PASS_BYTES,
    LocalProof,
    Mode,
    Sequences,
    chosen,
    passes_of,
    prove,
)
from tests.verify.exports import Exported

Taps = Mapping[str, np.ndarray]
RUNTIMES = {"llama.cpp": True, "onnxruntime": False}  # and whether it keeps keys and values in float16


@pytest.fixture(scope="module")
def run(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LocalProof]:
    """Proof of the tiny model in a runtime, its values changed on the way; the runtime itself runs once."""
    checkpoint = CanonicalCheckpoint(exported.checkpoint)
    random = np.random.default_rng(0)
    ids = tuple(random.integers(0, 360, length).astype(np.int32) for length in (67, 5))
    sequences: dict[Mode, Sequences] = {"prefill": ids, "decode": tuple(part[:5] for part in ids)}
    known: dict[str, tuple[TappedGraph, dict[Mode, Taps]]] = {}

    def measured(runtime: str) -> tuple[TappedGraph, dict[Mode, Taps]]:
        folder = tmp_path_factory.mktemp(runtime)
        graph = (
            ggml.tapped_graph(exported.gguf, None, checkpoint)
            if runtime == "llama.cpp"
            else mlas.tapped_graph(exported.onnx, checkpoint, folder)
        )
        taps: dict[Mode, Taps] = {}
        for mode, asked in sequences.items():
            names = passes_of(graph, sum(map(len, asked)))
            result = run_taps(
                runtime,
                model=graph.model,
                job=Job(asked, mode),
                names=names,
                workdir=folder / mode,
                data=graph.data,
            )
            assert result.status == "ok", result.message
            taps[mode] = dict(result.taps)
        return graph, taps

    def proof(runtime: str, change: Callable[[Mode, dict[str, np.ndarray]], None] | None = None) -> LocalProof:
        if runtime not in known:
            known[runtime] = measured(runtime)
        graph, values = known[runtime]

        def taps(mode: Mode, _asked: Sequences) -> Taps:
            changed = dict(values[mode])
            if change is not None:
                change(mode, changed)
            return changed

        return prove(
            exported.checkpoint, graph, taps, sequences, half_cache=RUNTIMES[runtime], half_activation=False, threads=1
        )

    return proof


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_right_runtimes_are_right_in_every_layer_and_between(runtime: str, run: Callable[..., LocalProof]) -> None:
    proof = run(runtime)
    assert len(proof.layers) == 2 * 15
    assert not proof.untapped
    for layer in proof.layers:
        assert layer.worst.backward <= BACKWARD
        assert layer.excess <= 1, layer
        assert not layer.misread
        attention = layer.module.endswith("o_proj") and RUNTIMES[runtime]
        assert (layer.allowed > BETWEEN) == attention
    assert max(proof.logits.values()) <= BETWEEN


def x_of(layer: int, leaf: str) -> str:
    return f"blk.{layer}.{leaf}.weight input"


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_wrong_product_is_named_and_nothing_else(mode: Mode, run: Callable[..., LocalProof]) -> None:
    """×1.001 on what one product gives, and everything behind it goes on as it was: only that layer is red."""

    def change(now: Mode, values: dict[str, np.ndarray]) -> None:
        if now == mode:
            values["blk.1.ffn_gate.weight output"] = values["blk.1.ffn_gate.weight output"] * np.float32(1.001)

    layers = run("llama.cpp", change).layers
    wrong = [(layer.module, layer.mode) for layer in layers if layer.worst.backward > BACKWARD]
    assert wrong == [("model.layers.1.mlp.gate_proj", mode)]
    # what reads it is not what the reference makes of it
    assert [layer.module for layer in layers if layer.excess > 1] == ["model.layers.1.mlp.down_proj"]


def scaled_values(values: dict[str, np.ndarray]) -> None:
    values[x_of(1, "attn_output")] = values[x_of(1, "attn_output")] * np.float32(1.01)


def other_positions(values: dict[str, np.ndarray]) -> None:
    values[x_of(1, "ffn_up")] = np.roll(values[x_of(1, "ffn_up")], 1, axis=0)


def slightly_other_norm(values: dict[str, np.ndarray]) -> None:
    values[x_of(0, "attn_k")] = values[x_of(0, "attn_k")] * np.float32(1.0001)


@pytest.mark.parametrize(
    ("change", "module"),
    [
        (scaled_values, "model.layers.1.self_attn.o_proj"),
        (other_positions, "model.layers.1.mlp.up_proj"),
        (slightly_other_norm, "model.layers.0.self_attn.k_proj"),
    ],
)
def test_what_is_wrong_between_products_is_named(
    change: Callable[[dict[str, np.ndarray]], None], module: str, run: Callable[..., LocalProof]
) -> None:
    proof = run("llama.cpp", lambda mode, values: change(values) if mode == "prefill" else None)
    assert [layer.module for layer in proof.layers if layer.excess > 1] == [module]


def test_a_wrong_head_shows_in_the_logits(run: Callable[..., LocalProof]) -> None:
    def change(_mode: Mode, values: dict[str, np.ndarray]) -> None:
        values["result_output"] = values["result_output"] * np.float32(1.001)

    assert min(run("llama.cpp", change).logits.values()) > BETWEEN


def test_a_product_that_is_not_shown_is_told(run: Callable[..., LocalProof]) -> None:
    def change(_mode: Mode, values: dict[str, np.ndarray]) -> None:
        values.pop("blk.0.attn_v.weight output", None)

    assert "blk.0.attn_v.weight" in run("llama.cpp", change).untapped["prefill"]


def test_passes_hold_each_name_once_and_bound_memory(exported: Exported) -> None:
    graph = ggml.tapped_graph(exported.gguf, None, CanonicalCheckpoint(exported.checkpoint))
    names = {name for linear in graph.linears for p in linear.products for name in (p.x, p.y)} | {graph.logits}
    for positions in (1, 72, 100_000):
        passes = passes_of(graph, positions)
        asked = [name for some in passes for name in some]
        assert len(asked) == len(set(asked)) == len(names)
    assert len(passes_of(graph, 1)) == 1
    assert len(passes_of(graph, PASS_BYTES)) == len(graph.linears)


def test_a_prompt_and_a_short_sequence_are_looked_at() -> None:
    assert chosen(np.array([128, 3, 70, 65, 64, 22, 8, 7], np.int32)) == (3, 1, 7, 5)
    assert chosen(np.array([60, 3, 61], np.int32)) == (2, 1)  # none is a prompt of 65; 3 is nearest to 6 and to 25
    assert chosen(np.array([9], np.int32)) == (0,)
