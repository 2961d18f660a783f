"""Every gate on arm64 processors with int8 matrix products, with the dot product, and with neither.

The artifacts are packed here, answered by Debian's Python and PyPI's arm64 wheels under QEMU, and judged here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from qalora_runtimes.packs import PACK, TAPS, AnswersFile, PackedRequest, read_pack
from qalora_runtimes.taps import StoredTaps, read_names

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.recipe import VerifySettings
from qalora_export.verify.device.pack import pack_verification
from qalora_export.verify.kernels.arithmetic import BACKWARD
from qalora_export.verify.kernels.mlas import KLEIDIAI
from qalora_export.verify.kernels.products import deviation
from qalora_export.verify.report.parity_report import ParityReport
from qalora_export.verify.runtimes.record import all_runtimes
from qalora_export.verify.stage import verify_parity
from tests.arm64.machine import CPUS, Arm64
from tests.models import make_tiny_canonical
from tests.verify.exports import Exported

TAPPED = ("llama.cpp", "onnxruntime")  # GenAI's products are onnxruntime's
RUNTIMES = (*TAPPED, "onnxruntime-genai")
SETTINGS = VerifySettings(threads=1, runtimes=RUNTIMES, long_length=256)
# Bits -> group, beside the 4 and 32 of all gates.
KINDS = {2: 32, 3: 32, 4: 128, 8: 32}


@dataclass(frozen=True)
class Packed:
    exported: Exported
    folder: Path

    @property
    def wheel(self) -> Path:
        return next(self.folder.glob("*.whl"))


@pytest.fixture(scope="session")
def packed(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("pack") / "device"
    pack_verification(exported.checkpoint, folder, SETTINGS, gguf=exported.gguf, onnx=exported.onnx)
    return Packed(exported, folder)


Reports = Callable[[str], ParityReport]


@pytest.fixture(scope="session")
def report(arm: Arm64, packed: Packed, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """The gates on one processor, answered once."""
    known: dict[str, ParityReport] = {}

    def of(cpu: str) -> ParityReport:
        if cpu not in known:
            folder = tmp_path_factory.mktemp("arm64")
            words = ["-m", "qalora_runtimes", packed.folder, "--out", folder / "answers.zip"]
            arm.python(cpu, words, wheel=packed.wheel)
            given = {"gguf": packed.exported.gguf, "onnx": packed.exported.onnx, "answers": folder / "answers.zip"}
            known[cpu] = verify_parity(packed.exported.checkpoint, folder / "report", SETTINGS, **given)
        return known[cpu]

    return of


@pytest.mark.parametrize("cpu", CPUS)
def test_every_gate_passes(cpu: str, report: Reports) -> None:
    found = report(cpu)
    assert {(e.runtime, e.gate): e.status for e in found.entries if e.status != "pass"} == {}
    assert {entry.runtime for entry in found.entries} == set(RUNTIMES)
    machine = found.facts["device"]["machine"]
    assert machine["architecture"] == "aarch64"
    assert set(machine["flags"]) & {"asimddp", "i8mm"} == CPUS[cpu]


@pytest.mark.parametrize("cpu", CPUS)
def test_onnx_runtime_multiplies_by_kleidiai_where_there_is_a_dot_product(cpu: str, report: Reports) -> None:
    """Why it is 2e-3 nats from x86: int8 by rows of x, not by blocks, and scales cut to bfloat16."""
    details = {(e.runtime, e.gate): e.detail for e in report(cpu).entries}
    assert (KLEIDIAI in details["onnxruntime", "G3"]) == ("asimddp" in CPUS[cpu])
    assert KLEIDIAI not in details["llama.cpp", "G3"]


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("bits", KINDS)
def test_every_product_of_other_widths_is_what_it_documents(
    bits: int, cpu: str, arm: Arm64, tiny_model: Path, tmp_path: Path
) -> None:
    base = make_tiny_canonical(tmp_path / "base.qalora", tiny_model, bits=bits, group=KINDS[bits])
    export_onnx(base, tmp_path / "onnx")
    artifacts, settings = {"onnx": tmp_path / "onnx"}, SETTINGS.model_copy(update={"runtimes": TAPPED})
    if bits == 8:  # no GGUF type holds them with free offsets
        settings = SETTINGS.model_copy(update={"runtimes": TAPPED[1:]})
    else:
        artifacts["gguf"] = tmp_path / "model.gguf"
        export_gguf(base, artifacts["gguf"])
    pack_verification(base, tmp_path / "device", settings, **artifacts)
    requests = _keep_taps(tmp_path / "device")
    wheel = next((tmp_path / "device").glob("*.whl"))
    arm.python(cpu, ["-m", "qalora_runtimes", tmp_path / "device"], wheel=wheel)
    answers = AnswersFile(tmp_path / "device" / "answers.zip")
    answers.check()
    assert len(requests) == 2 * len(artifacts)  # prompts and decode of each
    for request in requests:
        record = all_runtimes()[request.runtime]
        shipped = record.shipped(artifacts[record.format])
        graph = record.tapped_graph(shipped, CanonicalCheckpoint(base), tmp_path / "graph")
        names = [name for some in read_names(tmp_path / "device" / str(request.names)) for name in some]
        taps = StoredTaps(answers.extract(request, tmp_path)["taps.npz"], names)
        found = [deviation(p, _rows(taps[p.x]), _rows(taps[p.y])) for linear in graph.linears for p in linear.products]
        assert len(found) >= 15
        worst = max(found, key=lambda one: one.backward)
        assert worst.backward <= BACKWARD, worst


def _keep_taps(folder: Path) -> list[PackedRequest]:
    """Leave in a pack what looks inside, and nothing else."""
    pack, _ = read_pack(folder)
    kept = [request for request in pack.requests if request.kind == TAPS]
    (folder / PACK).write_text(json.dumps(replace(pack, requests=tuple(kept)).as_json()))
    return kept


def _rows(value: np.ndarray) -> np.ndarray:
    return value.reshape(len(value), -1)
