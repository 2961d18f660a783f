"""One file or many shards; nothing outside of the folder."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qalora_export.checkpoint.model_folder import INDEX, SINGLE, ModelFolder, as_float32
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.grid import differing
from tests.checkpoint.files import same_bytes


def model(folder: Path, shards: dict[str, dict[str, np.ndarray]], weight_map: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    if weight_map is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


A, B = {"a": np.ones(3, np.float32)}, {"b": np.zeros((2, 2), np.float16)}


def test_one_file(tmp_path: Path) -> None:
    opened = ModelFolder(model(tmp_path / "m", {SINGLE: A | B}))
    assert sorted(opened.names()) == ["a", "b"]
    assert "a" in opened
    assert "c" not in opened
    assert differing(np.asarray(opened.tensor("b")), B["b"]) == 0
    assert opened.entry("a").shape == (3,)
    with pytest.raises(InputError, match="no tensor 'c'"):
        opened.tensor("c")


def test_shards(tmp_path: Path) -> None:
    opened = ModelFolder(model(tmp_path / "m", {"x": A, "y": B}, {"a": "x", "b": "y"}))
    assert {name: t.shape for name, t in opened.tensors()} == {"a": (3,), "b": (2, 2)}


@pytest.mark.parametrize("name", ["../x", "/x", "sub/../../x", "..\\x", ""])
def test_shard_names_cannot_escape(tmp_path: Path, name: str) -> None:
    save_file(A, tmp_path / "x")
    folder = model(tmp_path / "m", {}, {"a": name})
    with pytest.raises(UnsafeInputError, match="outside its folder"):
        ModelFolder(folder)


def test_shards_may_not_be_links(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {"y": B}, {"a": "x", "b": "y"})
    save_file(A, tmp_path / "elsewhere")
    (folder / "x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeInputError, match="symbolic link"):
        ModelFolder(folder)
    (folder / "x").unlink()
    os.link(tmp_path / "elsewhere", folder / "x")
    with pytest.raises(UnsafeInputError, match="hard link"):
        ModelFolder(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {"x": A, "y": A | B}, {"a": "x", "b": "y"})
    with pytest.raises(UnsafeInputError, match="two shards hold the same tensor"):
        ModelFolder(folder)


@pytest.mark.parametrize("weight_map", [["x"], {"a": 1}, {"a": None}, "x"])
def test_malformed_index(tmp_path: Path, weight_map: object) -> None:
    with pytest.raises(UnsafeInputError, match="not a table of names"):
        ModelFolder(model(tmp_path / "m", {"x": A}, weight_map))


def test_index_that_names_absent_tensors_or_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 tensors no shard holds"):
        ModelFolder(model(tmp_path / "m", {"x": A}, {"a": "x", "c": "x"}))
    with pytest.raises(InputError, match="file not found"):
        ModelFolder(model(tmp_path / "n", {"x": A}, {"a": "x", "b": "y"}))


def test_missing_folder_config_or_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model folder not found"):
        ModelFolder(tmp_path / "none")
    with pytest.raises(InputError, match="no safetensors weights"):
        ModelFolder(model(tmp_path / "m", {}))
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="convert pickled weights"):
        ModelFolder(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(InputError, match="file not found"):
        ModelFolder(tmp_path / "m")


def test_config_must_be_an_object(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {SINGLE: A})
    (folder / "config.json").write_text("[]")
    with pytest.raises(UnsafeInputError, match="not a JSON object"):
        ModelFolder(folder)


@pytest.mark.parametrize("value", ["512", 0, -1, 2.5, True, [512], {}])
def test_a_context_that_is_no_number_is_refused_by_name(tmp_path: Path, value: object) -> None:
    folder(tmp_path, value)
    with pytest.raises(InputError, match=r"max_position_embeddings is .*, not a positive number"):
        _ = ModelFolder(tmp_path).context


@pytest.mark.parametrize("value", [None, 512])
def test_a_context_is_known_where_the_config_says_it(tmp_path: Path, value: int | None) -> None:
    folder(tmp_path, value)
    assert ModelFolder(tmp_path).context == value


def folder(path: Path, context: object) -> None:
    save_file({"x": np.zeros(1, np.float32)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({} if context is None else {"max_position_embeddings": context}))


def test_widening_is_exact_and_other_dtypes_are_refused() -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16):
        every = np.arange(2**16, dtype=np.uint16).view(dtype)
        every = every[np.isfinite(every.astype(np.float32))]
        assert same_bytes(as_float32(every).astype(dtype), every)
    for dtype in (np.float64, np.int8, np.bool_):
        with pytest.raises(InputError, match="expected a float tensor"):
            as_float32(np.zeros(2, dtype))
