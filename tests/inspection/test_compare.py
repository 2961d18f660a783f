"""Any two artifacts are compared value by value; one changed value is found and named."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.formats.contents import Comparison
from qalora_export.formats.contents import compare as compare_contents
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.inspection.view import View, byte_table, open_view
from qalora_export.recipe import GgufSettings, OnnxSettings

MODULE = "model.layers.1.mlp.down_proj"


def compare(left: View, right: View) -> Comparison:
    return compare_contents(left.contents, right.contents)


def _with_one_code_changed(source: Path, target: Path) -> None:
    checkpoint = CanonicalCheckpoint(source)
    with CanonicalWriter(target, checkpoint.config, checkpoint.companions(), kind="base") as writer:
        for name in checkpoint.plain_names():
            writer.add(name, np.asarray(checkpoint.tensor(name)))
        for module in checkpoint.modules:
            matrix = checkpoint.group_affine(module)
            if module == MODULE:
                codes = matrix.codes.copy()
                codes[3, 5] ^= 1
                matrix = replace(matrix, codes=codes)
            writer.add_quantized(module, matrix)


def test_checkpoint_equals_its_exports(tiny_canonical: Path, tmp_path: Path) -> None:
    export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings())
    export_onnx(tiny_canonical, tmp_path / "onnx", OnnxSettings())
    for artifact in (tmp_path / "m.gguf", tmp_path / "onnx", tiny_canonical):
        found = compare(open_view(tiny_canonical), open_view(artifact))
        assert found.equal, (artifact, found)
        assert found.compared == len(CanonicalCheckpoint(tiny_canonical).modules) + 7


def test_one_changed_code_is_found(tiny_canonical: Path, tmp_path: Path) -> None:
    _with_one_code_changed(tiny_canonical, tmp_path / "other")
    found = compare(open_view(tiny_canonical), open_view(tmp_path / "other"))
    assert not found.equal
    assert list(found.matrices) == [MODULE]
    assert (found.matrices[MODULE].codes, found.matrices[MODULE].scale, found.matrices[MODULE].offset) == (1, 0, 0)


def test_a_missing_tensor_is_found(tiny_model: Path, tiny_canonical: Path) -> None:
    found = compare(open_view(tiny_model), open_view(tiny_canonical))
    assert f"{MODULE}.weight" in found.only_left
    assert MODULE in found.only_right


def test_bytes_by_kind(tiny_canonical: Path) -> None:
    table = byte_table(open_view(tiny_canonical))
    count, parameters, size = table["4 bit, g 32"]
    assert count == 14
    assert size == parameters // 2 + 2 * 2 * parameters // 32


def test_cli_inspect_check_notices_a_changed_byte(tiny_canonical: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from qalora_export.cli import main

    main._register_verbs()
    copy = tmp_path / "copy"
    shutil.copytree(tiny_canonical, copy)
    run = CliRunner().invoke(main.app, ["inspect", str(copy), "--check"])
    assert run.exit_code == 0, run.output
    assert "4 bit, g 32" in run.output
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    run = CliRunner().invoke(main.app, ["inspect", str(copy), "--check"])
    assert run.exit_code == 1
    assert "model.safetensors" in run.output
    run = CliRunner().invoke(main.app, ["inspect", str(tiny_canonical), str(copy)])
    assert run.exit_code == 1
