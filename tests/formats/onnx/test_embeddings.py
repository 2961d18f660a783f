"""Embeddings in blocks: ONNX Runtime, the reader and the checkpoint agree in every bit; damage shows."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint, values_of
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.forecast import Forecast
from qalora_export.errors import UnsafeInputError
from qalora_export.formats.contents import FolderContents, compare
from qalora_export.formats.onnx.account import account_onnx
from qalora_export.formats.onnx.check import check_onnx
from qalora_export.formats.onnx.datafile import DataFile
from qalora_export.formats.onnx.exact import exact_variant
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.formats.onnx.read import EMBEDDINGS_KEY, MODULES_KEY, read_back
from qalora_export.formats.onnx.rewrite import Rewriter
from qalora_export.grid import GRIDS, GroupAffine, Levels, SuperBlockGrid, SymmetricGrid, SymmetricLevels
from qalora_export.quantization.rules import parse_rule
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import OnnxSettings, QuantizeSettings
from tests.formats.onnx.helpers import matrices, prefill, proto, session, worst_nmse
from tests.models import make_tiny_model

EMBEDDING = "model.embed_tokens"
K_GRIDS = [grid for grid in GRIDS.values() if isinstance(grid, SuperBlockGrid)]


@st.composite
def on_levels(draw: st.DrawFn) -> GroupAffine:
    """Matrices on grids of super-blocks, groups and whole super-blocks of zeros among them."""
    grid = draw(st.sampled_from(K_GRIDS))
    rng, shape = np.random.default_rng(draw(st.integers(0, 2**32))), (draw(st.integers(1, 5)), 512)
    codes = rng.integers(0, 2**grid.bits, shape, dtype=np.uint8)
    groups, blocks = (shape[0], shape[1] // grid.group_size), (shape[0], 2)
    steps = [(rng.uniform(0.001, 0.1, blocks) * rng.integers(0, 2, blocks)).astype(np.float16) for _ in range(2)]
    if isinstance(grid, SymmetricGrid):
        return GroupAffine.on_levels(
            codes, SymmetricLevels(grid, rng.integers(-128, 128, groups).astype(np.int8), steps[0])
        )
    levels = [
        rng.integers(0, grid.top + 1, groups).astype(np.uint8) * rng.integers(0, 2, groups, np.uint8) for _ in range(2)
    ]
    return GroupAffine.on_levels(codes, Levels(grid, *levels, *steps))


def embedding_folder(path: Path, matrix: GroupAffine) -> Path:
    """y = W[ids] as a mobius graph has it, rewritten by the product's pass."""
    with CanonicalWriter(path / "checkpoint", {}, kind="base") as writer:
        writer.add_embedding(EMBEDDING, matrix)
    weight = ir.Value(name=f"{EMBEDDING}.weight", shape=ir.Shape(matrix.shape), type=ir.TensorType(ir.DataType.FLOAT))
    ids = ir.Value(name="ids", shape=ir.Shape(["b", "s"]), type=ir.TensorType(ir.DataType.INT64))
    gather = ir.node("Gather", [weight, ids], {"axis": 0})
    gather.outputs[0].name, gather.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 24, "com.microsoft": 1}
    graph = ir.Graph([ids], gather.outputs, nodes=[gather], name="embedding", opset_imports=opsets)
    graph.initializers[weight.name] = weight
    model, folder = ir.Model(graph, ir_version=10), path / "onnx"
    folder.mkdir()
    checkpoint = CanonicalCheckpoint(path / "checkpoint")
    with DataFile(folder) as data:
        rewriter = Rewriter(model, checkpoint, data, 4)
        for value in rewriter.weights():
            rewriter.place(value)
    model.metadata_props[MODULES_KEY] = "{}"
    model.metadata_props[EMBEDDINGS_KEY] = json.dumps({EMBEDDING: [matrix.bits, matrix.group_size]})
    ir.save(model, folder / "onnx/model.onnx")
    return folder


def bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    assert values.dtype == np.float32
    return np.ascontiguousarray(values).view(np.uint32)


@settings(max_examples=80, deadline=None)
@given(st.one_of(matrices(), on_levels()))
def test_every_value_in_every_bit(matrix: GroupAffine) -> None:
    """Extreme float16 scales and offsets, ±0 among them, and products: what ONNX Runtime gathers, what our reader says
    and what the checkpoint holds."""
    with tempfile.TemporaryDirectory() as name:
        folder = embedding_folder(Path(name), matrix)
        wanted, found = values_of(matrix), read_back(folder).tensor(f"{EMBEDDING}.weight")
        ids = np.arange(len(wanted))[None]
        (gathered,) = session(folder).run(["y"], {"ids": ids})
    assert np.array_equal(bits(found), bits(wanted))
    assert np.array_equal(bits(gathered[0]), bits(wanted))


@pytest.fixture(scope="module", params=["q6_k", "q4_k"])
def untied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint whose embedding is in blocks, and its folder."""
    path = tmp_path_factory.mktemp(request.param)
    make_tiny_model(path / "model", num_hidden_layers=1, hidden_size=256)
    rules = (parse_rule(f"{EMBEDDING}=grid:{request.param}"),)
    quantize(path / "model", path / "base", QuantizeSettings(method="rtn", rules=rules))
    assert export_onnx(path / "base", path / "onnx").differing == 0
    return path / "base", path / "onnx"


def test_the_folder_holds_blocks_and_every_number(untied: tuple[Path, Path]) -> None:
    base, folder = (CanonicalCheckpoint(untied[0]), read_back(untied[1]))
    found = compare(FolderContents(base), folder)
    assert found.total == 0 and f"{EMBEDDING}.weight" in folder.others
    assert f"{EMBEDDING}.weight" not in folder.initializers
    _, nbytes = folder.stored(f"{EMBEDDING}.weight")
    assert nbytes * 2 < base.entry(f"{EMBEDDING}.weight").nbytes
    data = (untied[1] / "onnx/model.onnx_data").stat().st_size
    assert check_onnx(Forecast.of(base)) <= data
    account = account_onnx(base, folder)
    assert not account.differences and not account.other_bytes


@pytest.mark.parametrize("part", ["codes", "scale", "zero_points", "remainder"])
def test_one_changed_byte_is_found(part: str, untied: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = CanonicalCheckpoint(untied[0]), Path(shutil.copytree(untied[1], tmp_path / "onnx"))
    tensor = next((t for t in proto(folder).graph.initializer if t.name == f"{EMBEDDING}.{part}"), None)
    if tensor is None:
        assert part == "remainder"  # a symmetric grid has none
        return
    at = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    with (folder / "onnx/model.onnx_data").open("r+b") as file:
        file.seek(at + 2)
        byte = file.read(1)
        file.seek(at + 2)
        file.write(bytes([byte[0] ^ 0x11]))
    damaged = read_back(folder)
    assert set(compare(FolderContents(base), damaged).findings()) == {f"{EMBEDDING}.weight"}
    assert any(f"{EMBEDDING}.{part}" in line for line in account_onnx(base, damaged).differences)


def test_another_graph_around_the_blocks_is_found(untied: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(untied[1], tmp_path / "onnx"))
    model = proto(folder)
    (gather,) = [node for node in model.graph.node if node.op_type == "GatherBlockQuantized"]
    size = next(a for a in gather.attribute if a.name == "block_size")
    size.i *= 2
    onnx.save(model, folder / "onnx/model.onnx")
    with pytest.raises(UnsafeInputError, match="GatherBlockQuantized says"):
        read_back(folder).tensor(f"{EMBEDDING}.weight")
    size.i //= 2
    gather.input[2] = "model.norm.weight"
    onnx.save(model, folder / "onnx/model.onnx")
    differences = account_onnx(CanonicalCheckpoint(untied[0]), read_back(folder)).differences
    assert any("GatherBlockQuantized" in line and "model.norm.weight" in line for line in differences)


def test_metadata_that_names_an_embedding_twice_or_nowhere_is_refused(
    untied: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(untied[1], tmp_path / "onnx"))
    model = proto(folder)
    (entry,) = [entry for entry in model.metadata_props if entry.key == EMBEDDINGS_KEY]
    (there,) = json.loads(entry.value).values()
    for name, said in {"lm_head": "does not hold", "model.layers.0.mlp.up_proj": "twice"}.items():
        entry.value = json.dumps({EMBEDDING: there, name: there})
        onnx.save(model, folder / "onnx/model.onnx")
        with pytest.raises(UnsafeInputError, match=said):
            read_back(folder)
    entry.value = json.dumps({EMBEDDING: there})
    weight = onnx.numpy_helper.from_array(np.zeros((2, 2), np.float32), f"{EMBEDDING}.weight")
    model.graph.initializer.append(weight)
    onnx.save(model, folder / "onnx/model.onnx")
    with pytest.raises(UnsafeInputError, match="twice"):
        read_back(folder)


@pytest.mark.parametrize("level", [4, 1])
@pytest.mark.parametrize("grid", ["q6_k", "q5_k", "q8_0"])
def test_an_embedding_in_bytes_that_is_lm_head_too_is_stored_once(grid: str, level: int, tmp_path: Path) -> None:
    """Without int8 the session makes the float32 matrix of the blocks: logits are those of a table in the file."""
    base, folder = tied(tmp_path, grid, level)
    contents = read_back(folder)
    assert list(contents.embeddings) == [EMBEDDING] and f"{EMBEDDING}.weight" not in contents.initializers
    assert compare(FolderContents(base), contents).total == 0
    assert check_onnx(Forecast.of(base)) <= (folder / "onnx/model.onnx_data").stat().st_size
    assert not account_onnx(base, contents).differences
    in_int8 = level == 4 and grid != "q5_k"  # whose offsets are free
    assert in_int8 == any(node.name == "lm_head/MatMulNBits" for node in contents.model.graph.node)

    ids, exact = np.arange(5, 25)[None], exact_variant(folder, tmp_path / "exact")
    plain = with_a_table(exact, contents.tensor(f"{EMBEDDING}.weight"), tmp_path / "plain")
    assert np.array_equal(bits(prefill(exact, ids)), bits(prefill(plain, ids)))
    if in_int8:
        assert 0 < worst_nmse(prefill(folder, ids), prefill(plain, ids)) < 1e-2


def test_another_head_on_the_blocks_is_found(tmp_path: Path) -> None:
    base, folder = tied(tmp_path, "q8_0", 4)
    for change in (_other_scales, _other_codes):
        model = proto(folder)
        change(model)
        copy = Path(shutil.copytree(folder, tmp_path / change.__name__))
        onnx.save(model, copy / "onnx/model.onnx")
        found = account_onnx(base, read_back(copy)).differences
        assert len(found) == 1 and "graph.node" in found[0], found


def _other_scales(model: onnx.ModelProto) -> None:
    (head,) = [node for node in model.graph.node if node.name == "lm_head/MatMulNBits"]
    head.input[2] = "model.norm.weight"


def _other_codes(model: onnx.ModelProto) -> None:
    (blocks,) = [node for node in model.graph.node if node.name == f"{EMBEDDING}/blocks"]
    blocks.input[0] = f"{EMBEDDING}.zero_points"


def tied(path: Path, grid: str, level: int) -> tuple[CanonicalCheckpoint, Path]:
    make_tiny_model(path / "model", num_hidden_layers=1, hidden_size=256, tie_word_embeddings=True)
    rules = (parse_rule(f"{EMBEDDING}=grid:{grid}"),)
    quantize(path / "model", path / "base", QuantizeSettings(method="rtn", rules=rules))
    assert export_onnx(path / "base", path / "onnx", OnnxSettings(accuracy_level=level)).differing == 0
    return CanonicalCheckpoint(path / "base"), path / "onnx"


def with_a_table(folder: Path, values: NDArray[np.float32], target: Path) -> Path:
    """The same folder with the embedding in float32, read by a Gather and by lm_head."""
    model = proto(Path(shutil.copytree(folder, target)))
    table = onnx.numpy_helper.from_array(values, f"{EMBEDDING}/table")
    (turned,) = [node for node in model.graph.node if table.name in node.input]
    kept = [node for node in model.graph.node if not node.name.startswith(f"{EMBEDDING}/") or node is turned]
    makers = {name: node.name for node in model.graph.node for name in node.output}
    (rows,) = {name for node in kept for name in node.input if makers.get(name, "").startswith(f"{EMBEDDING}/")} - {
        table.name,
        *turned.output,
    }
    gather = onnx.helper.make_node("Gather", [table.name, "input_ids"], [rows], axis=0)
    del model.graph.node[:]
    model.graph.node.extend([turned, gather, *(node for node in kept if node is not turned)])
    model.graph.initializer.append(table)
    onnx.save(model, target / "onnx/model.onnx")
    return target


def test_an_embedding_in_nibbles_that_is_lm_head_too_stays_float32(tmp_path: Path) -> None:
    _, folder = tied(tmp_path, "q4_k", 4)
    contents = read_back(folder)
    assert contents.embeddings == {} and contents.tensor(f"{EMBEDDING}.weight").dtype == np.float32
