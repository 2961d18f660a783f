"""The products of real runtimes are what they document; one that is wrong by 1 in 1,000 is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from qalora_runtimes.protocol import make_job
from qalora_runtimes.taps import run_taps

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.split import adapter_path
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.quantization.rules import parse_rule
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import GgufSettings, QuantizeSettings
from qalora_export.verify.kernels import ggml, mlas
from qalora_export.verify.kernels.arithmetic import BACKWARD
from qalora_export.verify.kernels.products import Product, TappedGraph, deviation
from tests.models import make_tiny_model
from tests.verify.exports import Exported

Taps = Mapping[str, np.ndarray]
KINDS = ("gguf", "split", "onnx", "onnx, head q8_0", "onnx, head q5_k")  # the heads: of an embedding in blocks


@dataclass(frozen=True)
class Tapped:
    graph: TappedGraph
    taps: dict[str, Taps]  # by mode

    def products(self) -> list[Product]:
        return [product for linear in self.graph.linears for product in linear.products]


@pytest.fixture(scope="module")
def tapped(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tapped]:
    """Every product of the tiny model in one artifact, prompts and decode; 67 tokens reach kernels for many rows."""
    known: dict[str, Tapped] = {}
    checkpoint = CanonicalCheckpoint(exported.checkpoint)
    random = np.random.default_rng(0)
    prompts = {"prefill": random.integers(0, 360, 67), "decode": random.integers(0, 360, 5)}

    def graph_of(kind: str, folder: Path) -> TappedGraph:
        if kind.startswith("onnx, head"):
            return tied_graph(kind.rpartition(" ")[2], folder)
        if kind == "onnx":
            return mlas.tapped_graph(exported.onnx, checkpoint, folder)
        if kind == "gguf":
            return ggml.tapped_graph(exported.gguf, None, checkpoint)
        export_gguf(exported.checkpoint, folder / "split.gguf", GgufSettings(layout="split"))
        return ggml.tapped_graph(folder / "split.gguf", adapter_path(folder / "split.gguf"), checkpoint)

    def of(kind: str) -> Tapped:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            graph = graph_of(kind, folder)
            names = list(
                dict.fromkeys(name for linear in graph.linears for p in linear.products for name in (p.x, p.y))
            )
            found = {}
            for mode, ids in prompts.items():
                result = run_taps(
                    "onnxruntime" if kind.startswith("onnx") else "llama.cpp",
                    model=graph.model,
                    job=make_job([ids.tolist()], mode),
                    names=[names[:5], names[5:]],
                    workdir=folder / mode,
                    data=graph.data,
                    lora=graph.lora,
                )
                assert (result.status, set(result.taps)) == ("ok", set(names)), result.message
                found[mode] = {name: value.reshape(len(value), -1) for name, value in result.taps.items()}
            known[kind] = Tapped(graph, found)
        return known[kind]

    return of


def tied_graph(grid: str, folder: Path) -> TappedGraph:
    make_tiny_model(folder / "model", hidden_size=256, tie_word_embeddings=True)
    rules = (parse_rule(f"model.embed_tokens=grid:{grid}"),)
    quantize(folder / "model", folder / "base", QuantizeSettings(method="rtn", rules=rules))
    export_onnx(folder / "base", folder / "onnx")
    graph = mlas.tapped_graph(folder / "onnx", CanonicalCheckpoint(folder / "base"), folder / "tapped")
    (head,) = graph.linears[-1].products
    assert (head.weight, len(head.ways) > 1) == (
        ("model.embed_tokens.codes", True) if grid == "q8_0" else ("model.embed_tokens.weight", False)
    )
    return graph


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_product_of_a_runtime_is_what_it_documents(kind: str, mode: str, tapped: Callable[[str], Tapped]) -> None:
    found, taps = tapped(kind), tapped(kind).taps[mode]
    assert len(found.graph.linears) == 15  # 2 layers of 7, and lm_head
    for product in found.products():
        measured = deviation(product, taps[product.x], taps[product.y])
        assert measured.backward <= BACKWARD, measured
        assert measured.relative <= BACKWARD, measured
        if product.reads:
            assert np.array_equal(taps[product.x], taps[product.reads])


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_that_is_wrong_by_1_in_1000_is_not(kind: str, tapped: Callable[[str], Tapped]) -> None:
    taps = tapped(kind).taps["prefill"]
    for product in tapped(kind).products():
        x, y = taps[product.x], taps[product.y]
        whole = deviation(product, x, y * np.float32(1.001))
        assert whole.backward > 5 * BACKWARD, whole
        row = y.copy()
        row[:, 3] *= np.float32(1.001)
        one = deviation(product, x, row)
        assert (one.row, one.backward > BACKWARD) == (3, True), one


def test_nan_and_other_shapes_are_never_right(tapped: Callable[[str], Tapped]) -> None:
    found = tapped("gguf")
    product, taps = found.products()[0], found.taps["decode"]
    x, y = taps[product.x], taps[product.y].copy()
    y[2, 5] = np.nan
    assert deviation(product, x, y).backward == np.inf
    assert (deviation(product, x, y).position, deviation(product, x, y).row) == (2, 5)
    assert deviation(product, x, y[:, :-1]).backward == np.inf
    assert deviation(product, x[:0], y[:0]).backward == np.inf


def test_float32_where_int8_is_documented_is_named_by_its_way(tapped: Callable[[str], Tapped]) -> None:
    """MLAS falls back to float32 where a processor has no int8 kernel; llama.cpp never does."""
    for kind, right in (("onnx", True), ("gguf", False)):
        found = tapped(kind)
        product, taps = found.products()[0], found.taps["prefill"]
        x = taps[product.x]
        exact = np.concatenate([_plain(x, product, rows) for rows, _ in product.parts()], axis=1)
        measured = deviation(product, x, exact)
        assert (measured.backward <= BACKWARD, measured.way == "float32") == (right, right), measured


def _plain(x: np.ndarray, product: Product, rows: slice) -> np.ndarray:
    weight = product.rows(rows)
    block = product.shape[1] // (weight.mins.shape[1] if weight.mins is not None else 1)
    dense = weight.scaled if weight.mins is None else weight.scaled + np.repeat(weight.mins, block, axis=1)
    return (x.astype(np.float64) @ dense.T).astype(np.float32)
