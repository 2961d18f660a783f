"""A pack, a device that answers it, and the gates on its answers; real runtimes; the device is this machine."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qalora_runtimes import answering
from qalora_runtimes.answering import answer
from qalora_runtimes.launch import RunnerResult, run_runner
from qalora_runtimes.packs import ANSWERS, PACK, AnswersFile, read_pack, sha256_of
from qalora_runtimes.protocol import ProtocolError, read_job

from qalora_export.errors import ExitCode, InputError, UnsafeInputError
from qalora_export.recipe import EvaluateSettings, VerifySettings
from qalora_export.verify.device.answers import DeviceAnswers
from qalora_export.verify.device.pack import pack_verification
from qalora_export.verify.report.parity_report import ParityReport
from qalora_export.verify.stage import verify_parity
from tests.conftest import MadeOnce
from tests.verify.exports import Exported, copy_of
from tests.verify.fake_runs import GATES, NEED_RUNS

pytestmark = pytest.mark.usefixtures("warm_runners")
SETTINGS = VerifySettings(threads=1, runtimes=("llama.cpp",), long_length=64)


@pytest.fixture
def pack(exported: Exported, made_once: MadeOnce) -> Path:
    """A pack of the GGUF, read-only."""
    made = made_once(
        "pack", lambda at: pack_verification(exported.checkpoint, at / "device", SETTINGS, gguf=exported.gguf)
    )
    return made / "device"


@pytest.fixture
def answers(pack: Path, made_once: MadeOnce) -> Path:
    """What this machine answers, read-only."""
    return made_once("answers", lambda at: answer(pack, at / "answers.zip", say=lambda _: None)) / "answers.zip"


def judge(exported: Exported, out: Path, answers: Path | None, **more: Any) -> ParityReport:
    given = {"settings": SETTINGS, "gguf": exported.gguf, **more}
    return verify_parity(exported.checkpoint, out, answers=answers, **given)


def statuses(report: ParityReport) -> dict[str, str]:
    return {entry.gate: entry.status for entry in report.entries}


def changed(answers: Path, out: Path, change: Callable[[dict[str, bytes]], None], *, hashes: bool) -> Path:
    """A copy whose members were changed; hashes: answers.json is made to fit."""
    with zipfile.ZipFile(answers) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    if hashes:
        table = json.loads(members[ANSWERS])
        for key, outcome in table["requests"].items():
            outcome["members"] = {name: sha256_of(members[f"{key}/{name}"]) for name in outcome["members"]}
        members[ANSWERS] = json.dumps(table).encode()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out


@pytest.mark.slow
def test_answers_of_a_device_are_judged_as_the_runtime_here_is(
    exported: Exported, answers: Path, tmp_path: Path
) -> None:
    report = judge(exported, tmp_path / "device", answers)
    assert statuses(report) == dict.fromkeys(GATES, "pass")
    here = judge(exported, tmp_path / "here", None)
    measured = [[(c.figure, c.measured) for e in r.entries for c in e.checks] for r in (report, here)]
    assert measured[0] == measured[1]
    written = json.loads((tmp_path / "device" / "report.json").read_text())
    assert written["device"]["packages"]["xllamacpp"] in written["device"]["words"]
    assert written["device"]["machine"] == written["environment"]["cpu"]
    assert "Answered on" in (tmp_path / "device" / "report.html").read_text()
    assert here.facts["device"] is None


@pytest.mark.slow
def test_where_a_run_crashes_on_the_device_each_part_is_answered_alone(
    exported: Exported, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashes(runtime: str, *, job: Path, **options: Any) -> RunnerResult:
        if read_job(job).mode == "both":
            return RunnerResult("crashed", "killed", signal_name="SIGKILL")
        return run_runner(runtime, job=job, **options)

    monkeypatch.setattr(answering, "run_runner", crashes)
    found = answer(pack, tmp_path / "answers.zip", say=lambda _: None)
    assert sorted(found.values()).count("crashed") == 2
    report = judge(exported, tmp_path / "report", tmp_path / "answers.zip")
    assert statuses(report) == dict.fromkeys(GATES, "pass")


def test_a_task_is_packed_and_answers_to_a_pack_without_it_are_refused(
    exported: Exported, answers: Path, tmp_path: Path
) -> None:
    lines = [{"prompt": question, "completion": "no"} for question in ("light on", "light off")]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = EvaluateSettings(data=str(tmp_path / "test.jsonl"), max_new_tokens=4)
    pack_verification(exported.checkpoint, tmp_path / "pack", SETTINGS, gguf=exported.gguf, evaluate=asked)
    requests = [read_job(file).behaviour for file in (tmp_path / "pack").rglob("job.npz")]
    scored = [(len(request.scored), bool(request.questions)) for request in requests if request and request.scored]
    assert sorted(scored) == [(2, False)] * 3 + [(2, True)]  # both paths as a whole, and the task alone on either
    with pytest.raises(InputError, match="another task"):
        judge(exported, tmp_path / "report", answers, evaluate=asked)


@pytest.mark.slow
def test_what_the_device_lacks_is_not_run_and_never_a_pass(
    exported: Exported, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = RunnerResult("missing", "no such package")
    monkeypatch.setattr(answering, "run_runner", lambda *_, **__: missing)
    monkeypatch.setattr(answering, "run_taps", lambda *_, **__: missing)
    answer(pack, tmp_path / "answers.zip", say=lambda _: None)
    report = judge(exported, tmp_path / "report", tmp_path / "answers.zip")
    wanted = {"G0": "pass", "G1": "pass"} | dict.fromkeys(NEED_RUNS, "not run")
    assert {gate: statuses(report)[gate] for gate in wanted} == wanted
    assert report.exit_code == ExitCode.RUNTIME_UNAVAILABLE
    assert all("on the device: no such package" in e.detail for e in report.entries if e.gate in ("G2", "G5", "G6"))


@pytest.mark.slow
def test_a_runtime_that_was_not_packed_is_not_run(exported: Exported, answers: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"runtimes": ("onnxruntime",)})
    report = judge(exported, tmp_path / "report", answers, settings=settings, onnx=exported.onnx)
    assert statuses(report)["G2"] == "not run"
    assert "was not packed" in next(e.detail for e in report.entries if e.gate == "G2")


@pytest.mark.slow
def test_changed_numbers_with_their_hash_are_red(exported: Exported, answers: Path, tmp_path: Path) -> None:
    def other_numbers(members: dict[str, bytes]) -> None:
        for name in (name for name in members if name.endswith("logits.npz")):
            content = bytearray(members[name])
            begin = content.index(b"\x93NUMPY") + 128 + 4 * 100_000  # float32 of log-probabilities
            content[begin : begin + 40_000] = np.float32(-1).tobytes() * 10_000
            members[name] = bytes(content)

    # The archive inside has a checksum of its own, which zipfile checks; whoever forges numbers forges that as well.
    def with_checksums(members: dict[str, bytes]) -> None:
        other_numbers(members)
        for name in (name for name in members if name.endswith("logits.npz")):
            members[name] = _rewritten(members[name], tmp_path)

    forged = changed(answers, tmp_path / "forged.zip", with_checksums, hashes=True)
    report = judge(exported, tmp_path / "report", forged)
    assert report.exit_code == ExitCode.PARITY_FAILED
    assert statuses(report)["G2"] == "fail"


def _rewritten(npz: bytes, folder: Path) -> bytes:
    """The same members with checksums that fit."""
    source, target = folder / "in.npz", folder / "out.npz"
    source.write_bytes(npz)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            with source.open("rb") as file:
                file.seek(info.header_offset + 26)
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
                file.seek(info.header_offset + 30 + name + extra)
                new.writestr(zipfile.ZipInfo(info.filename), file.read(info.file_size))
    return target.read_bytes()


@pytest.mark.slow
def test_damage_is_refused_before_anything_is_judged(answers: Path, tmp_path: Path) -> None:
    def one_bit(members: dict[str, bytes]) -> None:
        name = next(name for name in members if name.endswith("taps.npz"))
        members[name] = members[name][:-1000] + bytes([members[name][-1000] ^ 1]) + members[name][-999:]

    def refused(change: Callable[[dict[str, bytes]], None], saying: str) -> None:
        file = changed(answers, tmp_path / "changed.zip", change, hashes=False)
        with pytest.raises(UnsafeInputError, match=saying):
            DeviceAnswers(file, lambda _: "")

    refused(one_bit, "is not what was answered")
    refused(lambda members: members.update({"more": b"x"}), "answers nothing")
    refused(lambda members: members.update({PACK: members[PACK] + b" "}), "belong to another pack")
    refused(lambda members: members.pop(next(n for n in members if n.endswith("logits.npz"))), "is missing")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(answers.read_bytes()[:-100])
    with pytest.raises(UnsafeInputError, match="no file of answers"):
        DeviceAnswers(cut, lambda _: "")


@pytest.mark.slow
def test_answers_of_something_else_are_refused_by_name(exported: Exported, answers: Path, tmp_path: Path) -> None:
    longer = SETTINGS.model_copy(update={"positions": 1200})
    with pytest.raises(InputError, match=r"--positions 1000, this run has 1200"):
        judge(exported, tmp_path / "report", answers, settings=longer)
    other = copy_of(exported, tmp_path)
    other.gguf.write_bytes(other.gguf.read_bytes() + b"\0" * 32)
    with pytest.raises(InputError, match="another gguf artifact"):
        judge(other, tmp_path / "report", answers)
    checkpoint = shutil.copytree(exported.checkpoint, tmp_path / "other.qalora")
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(InputError, match="another checkpoint"):
        judge(Exported(checkpoint, exported.gguf, exported.onnx), tmp_path / "report", answers)


@pytest.mark.slow
def test_a_pack_that_changed_on_its_way_is_not_answered(pack: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pack, tmp_path / "device")
    model = copy / next(name for name in read_pack(copy)[0].files if name.endswith("model.gguf"))
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    with pytest.raises(ProtocolError, match="other bytes than those that were packed"):
        answer(copy, tmp_path / "answers.zip", say=lambda _: None)
    model.unlink()
    with pytest.raises(ProtocolError, match="is missing"):
        answer(copy, tmp_path / "answers.zip", say=lambda _: None)
    assert not (tmp_path / "answers.zip").exists()


def test_answers_that_claim_any_size_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(PACK, b"0" * 1_000_000)
    with pytest.raises(ProtocolError, match="is compressed"):
        AnswersFile(tmp_path / "bomb.zip")
