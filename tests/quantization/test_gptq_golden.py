"""What the real AutoGPTQ and GPTQModel wrote (golden/make_golden.py): our reading equals theirs to their rounding."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import qalora_export as q
from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError, QaloraError
from qalora_export.grid import unpack_codes
from qalora_export.quantization.gptq_import import convert
from qalora_export.quantization.gptq_layer import Stored, check_layer, read_layer
from qalora_export.quantization.gptq_version import choose_version

pytestmark = pytest.mark.usefixtures("warm_runners")

GOLDEN = Path(__file__).parent / "golden"
LIBRARIES = ("autogptq", "gptqmodel")
META = {"autogptq": {}, "gptqmodel": {"meta": {"quantizer": ["gptqmodel:7.3.6"]}}}


def load(library: str) -> tuple[dict, dict[str, dict[str, np.ndarray]]]:
    with np.load(GOLDEN / f"{library}.npz") as file:
        info = json.loads(file["info"].tobytes())
        layers = {case: {} for case in info["cases"]}
        for key in file.files:
            if "/" in key:
                case, part = key.split("/")
                layers[case][part] = file[key]
    return info, layers


FILES = {library: load(library) for library in LIBRARIES}
ALL = [(library, case) for library, (info, _) in FILES.items() for case in info["cases"]]


def read(folder: Path, library: str, case: str, *, qzeros: str = "qzeros", **config: object) -> Stored:
    """The case as a layer `m` of a folder, read as import does."""
    info, layers = FILES[library]
    parts = {f"m.{part}": layers[case][part] for part in ("qweight", "scales", "g_idx")}
    save_file(parts | {"m.qzeros": layers[case][qzeros]}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    model, shape = ModelFolder(folder), layers[case]["weight"].shape
    gptq = info["cases"][case] | META[library] | config
    version = choose_version(model, gptq, {"m": shape}, None)
    layer = check_layer(model, "m", shape, gptq)
    return read_layer(model, "m", layer, version.rule(layer.bits))


def fp16(stored: Stored) -> np.ndarray:
    """s·(q − z) rounded once to float16, as the libraries compute it: (out, in)."""
    size = stored.codes.shape[1] // stored.zeros.shape[1]
    scales, zeros = np.repeat(stored.scales, size, axis=1), np.repeat(stored.zeros, size, axis=1)
    return (scales.astype(np.float64) * (stored.codes.astype(np.int64) - zeros)).astype(np.float16)


def expected(library: str, case: str) -> np.ndarray:
    return FILES[library][1][case]["weight"]


def test_every_kind_is_there() -> None:
    assert len(ALL) == 32
    for library in LIBRARIES:
        cases = FILES[library][0]["cases"].values()
        assert {c["bits"] for c in cases} == {2, 3, 4, 8}
        assert {c["sym"] for c in cases} == {True, False}
        assert {c["group_size"] for c in cases} == {32, 64, 128, -1}
    assert FILES["autogptq"][0]["version"] == "0.7.1"
    assert FILES["gptqmodel"][0]["version"] == "7.3.6"


READABLE = [
    (library, case)
    for library, case in ALL
    if not case.endswith("-act") and (library, "zero") != ("autogptq", case[-4:])
]


@pytest.mark.parametrize(("library", "case"), READABLE)
def test_our_reading_equals_theirs(tmp_path: Path, library: str, case: str) -> None:
    stored = read(tmp_path, library, case)
    assert np.count_nonzero(fp16(stored) != expected(library, case)) == 0
    matrix, report = convert(stored, name="m")
    rounded = matrix.dequantize().astype(np.float16)
    ulp = np.spacing(np.maximum(np.abs(expected(library, case)), np.abs(matrix.offset).max()).astype(np.float16))
    assert (np.abs(rounded.astype(np.float64) - expected(library, case)) <= ulp.astype(np.float64)).all()
    if FILES[library][0]["cases"][case]["sym"]:
        assert report.changed == 0
        assert np.array_equal(rounded, expected(library, case))


@pytest.mark.parametrize(("library", "case"), READABLE)
def test_zero_points_are_those_of_the_quantizer(tmp_path: Path, library: str, case: str) -> None:
    stored, zeros = read(tmp_path, library, case), FILES[library][1][case]["zeros"]  # (out, G)
    group = FILES[library][1][case]["g_idx"]
    size = stored.codes.shape[1] // stored.zeros.shape[1]
    assert np.array_equal(stored.zeros, zeros[:, group[::size]])


@pytest.mark.parametrize("case", [case for library, case in READABLE if library == "gptqmodel"])
def test_version_2_of_gptqmodel_reads_the_same(tmp_path: Path, case: str) -> None:
    for folder in ("v1", "v2"):
        (tmp_path / folder).mkdir()
    one = read(tmp_path / "v1", "gptqmodel", case)
    two = read(tmp_path / "v2", "gptqmodel", case, qzeros="qzeros_v2", checkpoint_format="gptq_v2")
    assert np.array_equal(one.zeros, two.zeros)


@pytest.mark.parametrize("case", [case for library, case in READABLE if library == "gptqmodel" and case[0] == "3"])
def test_three_bits_of_gptqmodel_before_6_1(tmp_path: Path, case: str) -> None:
    old = {"qzeros": "qzeros_before_6_1", "meta": {"quantizer": ["gptqmodel:5.6.0"]}}
    stored = read(tmp_path, "gptqmodel", case, **old)
    assert np.count_nonzero(fp16(stored) != expected("gptqmodel", case)) == 0
    if "-sym-" in case:  # the values alone tell, whatever the name says
        for qzeros in ("qzeros_before_6_1", "qzeros"):
            for meta in (None, {"quantizer": ["gptqmodel:5.6.0"]}, {"quantizer": "gptqmodel:7.3.6"}):
                again = read(tmp_path, "gptqmodel", case, qzeros=qzeros, meta=meta)
                assert np.array_equal(again.zeros, stored.zeros)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqmodels_borrows_are_known_without_its_name(tmp_path: Path, bits: int) -> None:
    case = f"{bits}-asym-g32-zero"
    zeros = FILES["gptqmodel"][1][case]["zeros"]
    assert (zeros == 0).any()
    assert np.array_equal(read(tmp_path, "gptqmodel", case, meta=None).zeros, zeros)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_that_autogptq_covered_are_refused(tmp_path: Path, bits: int) -> None:
    case = f"{bits}-asym-g32-zero"
    zeros = FILES["autogptq"][1][case]["zeros"]
    assert (zeros == 0).any()
    with pytest.raises(InputError, match=r"up to \d+ zero points of this checkpoint are lost"):
        read(tmp_path, "autogptq", case)


@pytest.mark.parametrize("library", LIBRARIES)
def test_activation_order_is_refused_with_the_remedy(tmp_path: Path, library: str) -> None:
    with pytest.raises(InputError, match=r"do not lie together.*desc_act=False, or with static_groups=True"):
        read(tmp_path, library, "4-sym-g32-act")


@pytest.mark.slow
def test_a_model_of_the_real_autogptq_goes_all_the_way(tmp_path: Path, tiny_model: Path) -> None:
    """As it lies on the hub: no checkpoint_format, the file's own name, zero biases; AutoGPTQ saves no tokenizer."""
    source = Path(shutil.copytree(GOLDEN / "autogptq", tmp_path / "gptq"))
    for file in ModelFolder(tiny_model).companions():
        shutil.copy(file, source / file.name)
    report = q.quantize(source, tmp_path / "base")
    assert report.method == "import-gptq"
    assert any("7 biases that are all zero" in note for note in report.notes)
    written, stored = CanonicalCheckpoint(tmp_path / "base"), ModelFolder(source)
    assert len(written.modules) == 7
    for name in written.modules:
        matrix = written.group_affine(name)
        scales, layer = np.asarray(stored.tensor(f"{name}.scales")).astype(np.float64), matrix.codes.shape
        zeros = unpack_codes(np.array(stored.tensor(f"{name}.qzeros")).view(np.uint8), 4).astype(np.int64) + 1
        exact = np.repeat(scales, 32, axis=0).T * (matrix.codes - np.repeat(zeros, 32, axis=0).T)
        assert np.array_equal(matrix.scale, scales.T.astype(np.float16)), layer
        half_ulp = np.spacing(np.abs(matrix.offset)).astype(np.float64) / 2
        assert (np.abs(matrix.dequantize() - exact) <= np.repeat(half_ulp, 32, axis=1) * 1.001).all()
    q.export_gguf(tmp_path / "base", tmp_path / "model.gguf")
    q.export_onnx(tmp_path / "base", tmp_path / "onnx")
    settings = q.VerifySettings(threads=1)
    parity = q.verify_parity(
        tmp_path / "base", tmp_path / "report", settings, gguf=tmp_path / "model.gguf", onnx=tmp_path / "onnx"
    )
    gates = {(entry.gate, entry.runtime): entry.status for entry in parity.entries}
    assert {runtime for _, runtime in gates} == {"llama.cpp", "onnxruntime", "onnxruntime-genai"}
    assert {key for key, status in gates.items() if status != "pass"} == set()


ODD = [None, [], {}, "x", -1, 0, 3, 1e9, True, ["gptq"], {"a": 1}, {"quantizer": [None, 3]}, {"quantizer": {"a": 1}}]


@pytest.mark.parametrize(
    "key", ["bits", "group_size", "desc_act", "sym", "checkpoint_format", "pack_dtype", "meta", "dynamic"]
)
def test_a_config_of_odd_values_is_read_right_or_refused(tmp_path: Path, key: str) -> None:
    read_right = 0
    for value in ODD:
        try:
            stored = read(tmp_path, "gptqmodel", "4-asym-g64", **{key: value})
        except QaloraError:
            continue
        assert np.array_equal(fp16(stored), expected("gptqmodel", "4-asym-g64"))
        read_right += 1
    assert read_right or key in ("bits", "checkpoint_format", "pack_dtype")
