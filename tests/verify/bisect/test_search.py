"""The bisect names the layer and tensor where a fault was planted, in both runtimes, on both paths."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from qalora_runtimes.taps import TapsResult, run_taps

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.formats.onnx.exact import exact_variant
from qalora_export.models.families.decoder import POINTS
from qalora_export.models.families.llama import LLAMA
from qalora_export.verify.bisect.points import layer_points, model_points
from qalora_export.verify.bisect.search import Bisection, Step, bisect, explain, suspect_of, worst_nmse
from qalora_export.verify.bisect.values import ReferenceModel, Suspect, reader_of
from qalora_export.verify.metrics import position_metrics
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.report.bisect_plot import error_plot
from qalora_export.verify.rule import Check, Entry
from qalora_export.verify.runtimes.record import Artifact
from qalora_export.verify.runtimes.twin import write_twin
from tests.verify.exports import Exported, copy_of, gguf_block, onnx_tensor, patch, read_at

IDS = (np.arange(24, dtype=np.int32) * 17) % 360
FAILURE = Suspect("G2", "exact", "prefill", "a sequence", IDS)


@pytest.fixture(scope="module", autouse=True)
def _quiet_threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as context:
        context.setenv("OMP_WAIT_POLICY", "passive")
        yield


@pytest.fixture(scope="module")
def model(exported: Exported) -> ReferenceModel:
    return ReferenceModel(exported.checkpoint, threads=1)


def run_of(kind: str, line: Exported, suspect: Suspect, folder: Path) -> Artifact:
    if suspect.path == "shipped":
        return Artifact(line.gguf if kind == "gguf" else line.onnx)
    if kind == "onnx":
        return Artifact(exact_variant(line.onnx, folder / "exact"))
    write_twin(line.gguf, folder / "twin.gguf")
    return Artifact(folder / "twin.gguf")


def found_in(
    kind: str,
    line: Exported,
    model: ReferenceModel,
    folder: Path,
    suspect: Suspect = FAILURE,
    launch: Callable = run_taps,
) -> Bisection:
    read = reader_of(
        kind,
        run_of(kind, line, suspect, folder),
        CanonicalCheckpoint(line.checkpoint),
        suspect,
        folder / "taps",
        threads=1,
        launch=launch,
    )
    return bisect(kind, suspect, model, 2, read, family=LLAMA, through="test")


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("path", ["exact", "shipped"])
@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_every_point_of_a_right_artifact_agrees(
    kind: str, path: str, mode: str, exported: Exported, model: ReferenceModel, tmp_path: Path
) -> None:
    failure = replace(FAILURE, path=path, mode=mode)
    found = found_in(kind, exported, model, tmp_path, failure)
    assert (found.first, found.note) == (None, "")
    assert [step.name for step in found.layers] == [p.name for p in model_points(2)]
    assert all(step.nmse <= step.bound for step in found.layers)


def halve_scale(line: Exported, kind: str, module: str, tensor: str) -> None:
    path, at = scale_of(line, kind, module, tensor)
    value = np.frombuffer(read_at(path, at, 2), np.float16)[0]
    patch(path, at, (value * np.float16(1.5)).tobytes())


def scale_of(line: Exported, kind: str, module: str, tensor: str) -> tuple[Path, int]:
    if kind == "gguf":
        return line.gguf, gguf_block(line.gguf, f"{tensor}.weight")
    return line.onnx / "onnx/model.onnx_data", onnx_tensor(line.onnx, f"{module}.scale")


PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.mark.parametrize(("module", "tensor"), PROJECTIONS.items())
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_one_wrong_scale_in_a_projection_is_named(
    kind: str, layer: int, module: str, tensor: str, exported: Exported, model: ReferenceModel, tmp_path: Path
) -> None:
    line = copy_of(exported, tmp_path)
    name = f"model.layers.{layer}.{module}"
    halve_scale(line, kind, name, f"blk.{layer}.{tensor}")
    found = found_in(kind, line, model, tmp_path)
    assert found.first is not None
    assert (found.first_layer, found.first.name) == (f"model.layers.{layer}", name)
    assert [step.diverges for step in found.layers] == [False, layer == 0, layer == 1, False, False]
    assert [step.name for step in found.inside if step.diverges] == [name]


@pytest.mark.parametrize(
    ("norm", "tensor", "names"),
    [
        ("model.layers.1.input_layernorm", "blk.1.attn_norm", ("model.layers.1", "model.layers.1.input_layernorm")),
        (
            "model.layers.0.post_attention_layernorm",
            "blk.0.ffn_norm",
            ("model.layers.0", "model.layers.0.post_attention_layernorm"),
        ),
        ("model.norm", "output_norm", ("model.norm", "model.norm")),
    ],
)
@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_one_wrong_norm_weight_is_named(
    kind: str, norm: str, tensor: str, names: tuple[str, str], exported: Exported, model: ReferenceModel, tmp_path: Path
) -> None:
    line = copy_of(exported, tmp_path)
    dtype, path = (np.float32, line.gguf) if kind == "gguf" else (np.float16, line.onnx / "onnx/model.onnx_data")
    at = gguf_block(path, f"{tensor}.weight") if kind == "gguf" else onnx_tensor(line.onnx, f"{norm}.weight")
    value = np.frombuffer(read_at(path, at, np.dtype(dtype).itemsize), dtype)[0]
    patch(path, at, dtype(value * 1.1).tobytes())
    found = found_in(kind, line, model, tmp_path)
    assert found.first is not None
    assert (found.first_layer, found.first.name) == names


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_nan_on_the_shipped_path_is_named(kind: str, exported: Exported, model: ReferenceModel, tmp_path: Path) -> None:
    line = copy_of(exported, tmp_path)
    name = "model.layers.1.self_attn.o_proj"
    path, at = scale_of(line, kind, name, "blk.1.attn_output")
    patch(path, at, np.float16(np.nan).tobytes())
    found = found_in(kind, line, model, tmp_path, replace(FAILURE, path="shipped"))
    assert found.first is not None
    assert (found.first.name, found.first.nmse) == (name, float("inf"))


def test_a_runtime_that_crashes_is_a_note(exported: Exported, model: ReferenceModel, tmp_path: Path) -> None:
    def crash(*_: object, **__: object) -> TapsResult:
        return TapsResult("crashed", "llama.cpp ended with -11")

    found = found_in("gguf", exported, model, tmp_path, launch=crash)
    assert "ended with -11" in found.note
    assert found.describe().startswith("bisect: the values inside could not be read")
    assert found.as_json()["first_tensor"] is None


def test_values_that_the_runtime_does_not_show_are_said(
    exported: Exported, model: ReferenceModel, tmp_path: Path
) -> None:
    def hide(*args: object, **options: object) -> TapsResult:
        result = run_taps(*args, **options)
        return TapsResult("ok", "", {name: v for name, v in result.taps.items() if name != "l_out-0"})

    found = found_in("gguf", exported, model, tmp_path, launch=hide)
    assert found.note == "the runtime does not show model.layers.0"
    assert found.first is None


def entry(gate: str, status: str = "fail", figure: str = "x", measured: float = 2.0) -> Entry:
    return Entry(gate, "r", status, "d", (Check(figure, measured, 1.0, "u", "why"),), ("place",))


def test_the_gate_that_says_most_and_its_worst_sequence_are_chosen() -> None:
    probes = ProbeSet(np.arange(6, dtype=np.int32), np.array([2, 4], np.int32), ("short", "long"))
    right = np.log(np.random.default_rng(0).dirichlet(np.ones(8), 6)).astype(np.float32)
    wrong = right.copy()
    wrong[4, 3] += 1
    metrics = position_metrics(right, wrong, np.full(6, -1, np.int32))
    positions = {("r", path): metrics for path in ("exact", "shipped", "exact decode", "shipped decode")}

    def chosen(*entries: Entry) -> tuple[str, str, str] | None:
        failure = suspect_of(entries, positions, "r", probes)
        assert failure is None or (failure.sequence, failure.ids.tolist()) == ("long", [2, 3, 4, 5])
        return (failure.gate, failure.path, failure.mode) if failure else None

    assert chosen(entry("G2"), entry("G3"), entry("G4")) == ("G2", "exact", "prefill")
    assert chosen(entry("G2", "pass"), entry("G3", "pass"), entry("G4"))[::2] == ("G4", "decode")
    assert chosen(entry("G4", figure="exact_nmse_max")) == ("G4", "exact", "decode")
    assert chosen(entry("G4", figure="shipped_kl_mean")) == ("G4", "shipped", "decode")
    assert chosen(entry("G0"), entry("G2", "not run")) is None


def test_the_finding_stands_in_front_of_the_failed_logits_gates() -> None:
    found = Bisection("r", "G2", "exact", "prefill", "s", "t", [Step("model.norm", "final norm", 1e-3, 1e-9)])
    entries = explain([entry("G0"), entry("G2"), entry("G3", "pass")], found)
    assert [e.where[0] for e in entries] == ["place", found.describe(), "place"]
    assert "model.norm (final norm), NMSE 1.00e-03" in found.describe()


def test_worst_nmse_is_the_worst_position_and_never_hides_a_nan() -> None:
    want = np.ones((3, 4), np.float32)
    got = want.copy()
    got[1] *= 1.5
    assert worst_nmse(want, got) == pytest.approx(0.25)
    assert worst_nmse(want, want) == 0.0
    assert worst_nmse(np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)) == float("inf")
    got[0, 0] = np.nan
    assert worst_nmse(want, got) == worst_nmse(want, want[:2]) == float("inf")


def test_the_plot_is_well_formed_and_shows_every_step() -> None:
    steps = [Step("a<b", "w", 0.0, 1e-9), Step("c", "w", float("inf"), 1e-9), Step("d", "w", float("nan"), 1e-9)]
    svg = error_plot(Bisection("r", "G2", "exact", "prefill", "s", "t", steps, [Step("c.x", "w", 1e-3, 1e-9)]))
    texts = [element.text for element in ET.fromstring(svg).iter() if element.text]
    assert {"a<b", "c", "d", "c.x", "inf", "no value", "1.0e-03"} <= set(texts)


def test_points_have_unique_keys_and_nodes() -> None:
    points = [*model_points(2), *layer_points(0, POINTS)[:-1], *layer_points(1, POINTS)[:-1]]
    assert len({p.key for p in points}) == len({p.node for p in points}) == len(points)
