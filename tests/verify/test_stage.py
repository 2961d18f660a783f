"""verify_parity on real artifacts with stand-in runtimes: each fault turns its own gate red, nothing passes unseen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qalora_runtimes.launch import RunnerResult
from qalora_runtimes.process import PATIENCE
from qalora_runtimes.protocol import read_job

from qalora_export.cli.parity_table import print_report
from qalora_export.errors import ExitCode, InputError
from qalora_export.evaluation import evaluate
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.qalora.merge import merge
from qalora_export.recipe import EvaluateSettings
from qalora_export.verify.reference.task import Score
from qalora_export.verify.runtimes.record import requested
from qalora_export.verify.stage import verify_parity
from tests.qalora.adapters import own_adapter
from tests.verify.exports import Exported
from tests.verify.fake_runs import ALL, GATES, MODES, NEED_RUNS, SETTINGS, statuses, verify
from tests.verify.fakes import Change, FakeRuntimes


def test_right_runtimes_pass_every_gate_and_the_report_is_complete(exported: Exported, tmp_path: Path) -> None:
    report = verify(exported, tmp_path / "report", FakeRuntimes(exported.checkpoint), ALL)
    assert report.exit_code == ExitCode.OK
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (written["verdict"], written["exit_code"]) == ("pass", 0)
    assert [(e["gate"], e["runtime"]) for e in written["gates"]] == [(g, r) for r in ALL for g in GATES]
    for entry in written["gates"]:
        assert entry["status"] == "pass"
        assert isinstance(entry["measured"], int | float)
        assert isinstance(entry["bound"], int | float)
        assert entry["measured"] <= entry["bound"]
        assert entry["unit"] and entry["detail"] and entry["checks"]
        assert all(check["reason"] and check["passed"] for check in entry["checks"])
    assert written["probe"]["sequences"] >= 16
    assert written["probe"]["positions"] >= 1000
    g3 = next(entry for entry in written["gates"] if entry["gate"] == "G3")
    assert len(g3["figures"]["layers"]) == 15
    assert written["checkpoint"]["quantized_parameters"] < written["checkpoint"]["parameters"]
    assert {a["name"] for a in written["artifacts"]} == {"model.gguf", "onnx"}
    assert all(link["state"] != "broken" for link in written["provenance"])
    arrays = np.load(tmp_path / "report" / "positions.npz", allow_pickle=False)
    assert arrays["llama.cpp/exact/nmse"].shape == (written["probe"]["positions"],)
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "junit.xml",
        "manifest.json",
        "positions.npz",
        "report.html",
        "report.json",
    ]


def test_every_model_and_path_answers_the_same_questions(exported: Exported, tmp_path: Path) -> None:
    lines = [{"prompt": question, "completion": "no"} for question in ("light on", "light off", "and now?")]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = EvaluateSettings(data=str(tmp_path / "test.jsonl"), max_new_tokens=4)
    own = [miss.answer for miss in evaluate(exported.checkpoint, asked).misses]
    right = [line | {"completion": answer} for line, answer in zip(lines, (own[0], "no", own[2]), strict=True)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, right)))
    fake = FakeRuntimes(exported.checkpoint)

    def wrong_once(said: dict[str, Any]) -> None:
        said["scored"][0] |= {"tokens": [1], "text": "no"}

    fake.behaviour["llama.cpp"] = wrong_once
    settings = SETTINGS.model_copy(update={"runtimes": ("llama.cpp", "onnxruntime"), "scored": 2})
    artifacts = {"gguf": exported.gguf, "onnx": exported.onnx}
    report = verify_parity(
        exported.checkpoint, tmp_path / "report", settings, **artifacts, evaluate=asked, launch=fake, bisect=False
    )
    scores = {cost.model: cost.score for cost in report.costs}
    assert scores == {
        "original model": None,
        "quantized base": Score(1, 2),
        "llama.cpp, exact path": Score(0, 2),
        "llama.cpp, shipped path": Score(0, 2),
        "onnxruntime, exact path": Score(1, 2),
        "onnxruntime, shipped path": Score(1, 2),
    }
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["task"] == "exact greedy answers to the first 2 of 3 questions of test.jsonl, at most 4 tokens"
    assert "--evaluate test.jsonl --max-new-tokens 4 --scored 2" in written["command"]


def swap_two_positions(right: np.ndarray) -> np.ndarray:
    right[[500, 501]] = right[[501, 500]]
    return right


def one_nan(right: np.ndarray) -> np.ndarray:
    right[700, 3] = np.nan
    return right


def cache_off_by_one(right: np.ndarray) -> np.ndarray:
    return np.roll(right, 1, axis=0)


def slightly_wrong(right: np.ndarray) -> np.ndarray:
    """An NMSE of about 1e-8 everywhere: far below anything a user would see, above what kernels may differ by."""
    noise = np.random.default_rng(0).normal(0, 1e-4, right.shape)
    return (right + noise * right.std()).astype(np.float32)


def noisy(right: np.ndarray) -> np.ndarray:
    return (right + np.random.default_rng(0).normal(0, 1.0, right.shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("path", "mode", "change", "failing"),
    [
        ("exact", "prefill", swap_two_positions, {"G2", "G4"}),
        ("exact", "prefill", slightly_wrong, {"G2", "G4"}),
        ("exact", "prefill", one_nan, {"G2"}),
        ("exact", "decode", cache_off_by_one, {"G4"}),
        ("exact", "decode", one_nan, {"G4"}),
        ("exact", "decode", slightly_wrong, {"G4"}),
        ("shipped", "prefill", noisy, {"G3"}),
        ("shipped", "prefill", one_nan, {"G3"}),
        ("shipped", "decode", cache_off_by_one, {"G4"}),
        ("shipped", "decode", one_nan, {"G4"}),
    ],
)
def test_wrong_logits_fail_their_gate(
    path: str, mode: str, change: Change, failing: set[str], exported: Exported, tmp_path: Path
) -> None:
    fake = FakeRuntimes(exported.checkpoint, changes={("llama.cpp", path, mode): change})
    report = verify(exported, tmp_path / "report", fake)
    assert report.exit_code == ExitCode.PARITY_FAILED
    assert {gate for gate, status in statuses(report).items() if status == "fail"} == failing
    assert (tmp_path / "report" / "report.json").is_file()


def test_a_product_that_the_runtime_does_not_show_is_not_run_and_no_failure(exported: Exported, tmp_path: Path) -> None:
    def hide(values: dict[str, np.ndarray]) -> None:
        values.pop("blk.0.attn_v.weight output", None)

    taps = FakeRuntimes(exported.checkpoint, taps_changes={"llama.cpp": hide}).taps
    settings = SETTINGS.model_copy(update={"runtimes": ("llama.cpp",)})
    fake = FakeRuntimes(exported.checkpoint)
    out = tmp_path / "report"
    report = verify_parity(exported.checkpoint, out, settings, gguf=exported.gguf, launch=fake, taps=taps)
    assert report.exit_code == ExitCode.RUNTIME_UNAVAILABLE
    assert {gate for gate, status in statuses(report).items() if status != "pass"} == {"G3", "G4"}
    assert "does not show 1 of its products, blk.0.attn_v.weight" in report.entries[3].detail


def test_the_worst_positions_are_named(exported: Exported, tmp_path: Path) -> None:
    fake = FakeRuntimes(exported.checkpoint, changes={("llama.cpp", "exact", "prefill"): one_nan})
    report = verify(exported, tmp_path / "report", fake)
    entry = next(e for e in report.entries if e.gate == "G2")
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    lengths, names = written["probe"]["lengths"], written["probe"]["names"]
    ends = np.cumsum(lengths)
    name = names[int(np.searchsorted(ends, 700, side="right"))]
    assert entry.where[0].startswith(f"{name}[")
    assert next(e for e in written["gates"] if e["gate"] == "G2")["checks"][0]["measured"] == "inf"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answers: answers["texts"][5].append(1),
        lambda answers: answers["texts"].pop(),
        lambda answers: answers["texts"].__setitem__(3, None),
        lambda answers: answers["rendered"].__setitem__(1, answers["rendered"][1] + " "),
        lambda answers: answers["rendered_ids"][0].insert(0, answers["rendered_ids"][0][0]),
        lambda answers: answers.clear(),
    ],
)
def test_wrong_text_fails_g5(spoil: Callable[[dict], None], exported: Exported, tmp_path: Path) -> None:
    report = verify(exported, tmp_path / "report", FakeRuntimes(exported.checkpoint, answers={"llama.cpp": spoil}))
    assert report.exit_code == ExitCode.PARITY_FAILED
    assert [gate for gate, status in statuses(report).items() if status == "fail"] == ["G5"]


MISSING = RunnerResult("missing", "llama.cpp: xllamacpp is not installed; pip install xllamacpp")
CRASHED = RunnerResult("crashed", "llama.cpp died of SIGSEGV", signal_name="SIGSEGV")


def test_a_missing_runtime_is_exit_3_and_every_gate_of_it_is_not_run(exported: Exported, tmp_path: Path) -> None:
    keys = [("llama.cpp", path, mode) for path in ("exact", "shipped") for mode in MODES]
    fake = FakeRuntimes(exported.checkpoint, broken=dict.fromkeys(keys, MISSING))
    report = verify(exported, tmp_path / "report", fake)
    assert report.exit_code == ExitCode.RUNTIME_UNAVAILABLE
    wanted = {"G0": "pass", "G1": "pass"} | dict.fromkeys(NEED_RUNS, "not run")
    assert {gate: statuses(report)[gate] for gate in wanted} == wanted
    assert all("pip install xllamacpp" in e.detail for e in report.entries if e.status == "not run")


@pytest.mark.parametrize(
    ("key", "not_run"),
    [
        (("llama.cpp", "exact", "prefill"), ["G2", "G4", "G6"]),  # G6: its long sequence
        (("llama.cpp", "exact", "decode"), ["G4"]),
        (("llama.cpp", "shipped", "prefill"), ["G3", "G4"]),
        (("llama.cpp", "shipped", "decode"), ["G4"]),
        (("llama.cpp", "shipped", "text"), ["G5"]),
    ],
)
def test_a_crash_is_exit_3_and_names_the_signal(
    key: tuple[str, str, str], not_run: list[str], exported: Exported, tmp_path: Path
) -> None:
    report = verify(exported, tmp_path / "report", FakeRuntimes(exported.checkpoint, broken={key: CRASHED}))
    assert report.exit_code == ExitCode.RUNTIME_UNAVAILABLE
    assert [gate for gate, status in statuses(report).items() if status == "not run"] == not_run
    assert all("SIGSEGV" in e.detail for e in report.entries if e.status == "not run")


def test_a_failure_beats_a_crash(exported: Exported, tmp_path: Path) -> None:
    fake = FakeRuntimes(
        exported.checkpoint,
        changes={("llama.cpp", "exact", "prefill"): swap_two_positions},
        broken={("llama.cpp", "shipped", "text"): CRASHED},
    )
    assert verify(exported, tmp_path / "report", fake).exit_code == ExitCode.PARITY_FAILED


def test_another_vocabulary_is_never_compared(exported: Exported, tmp_path: Path) -> None:
    fake = FakeRuntimes(exported.checkpoint, changes={("llama.cpp", "exact", "prefill"): lambda right: right[:, :-1]})
    report = verify(exported, tmp_path / "report", fake)
    assert statuses(report)["G2"] == "not run"
    assert report.exit_code == ExitCode.RUNTIME_UNAVAILABLE


def test_bad_usage(exported: Exported, tmp_path: Path) -> None:
    fake = FakeRuntimes(exported.checkpoint)
    with pytest.raises(InputError, match="no gguf artifact"):
        settings = SETTINGS.model_copy(update={"runtimes": ("llama.cpp",)})
        verify_parity(exported.checkpoint, tmp_path / "r", settings, onnx=exported.onnx, launch=fake)
    with pytest.raises(InputError, match="no runtime"):
        verify_parity(exported.checkpoint, tmp_path / "r", SETTINGS.model_copy(update={"runtimes": ()}), launch=fake)
    (tmp_path / "r").mkdir()
    with pytest.raises(InputError, match="exists"):
        verify(exported, tmp_path / "r", fake)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r"]


def test_without_a_choice_every_runtime_of_what_is_given_is_verified(exported: Exported) -> None:
    assert list(requested(None, {"gguf": exported.gguf, "onnx": None})) == ["llama.cpp"]
    assert list(requested(None, {"gguf": None, "onnx": exported.onnx})) == ["onnxruntime", "onnxruntime-genai"]
    assert tuple(requested(None, {"gguf": exported.gguf, "onnx": exported.onnx})) == ALL
    with pytest.raises(InputError, match="no runtime is requested"):
        requested(None, {"gguf": None, "onnx": None})
    with pytest.raises(InputError, match="no gguf artifact"):
        requested(None, {"gguf": exported.gguf.with_name("none.gguf")})


def test_it_prints_no_table(exported: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verify(exported, tmp_path / "report", FakeRuntimes(exported.checkpoint))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "verdict" not in printed.err


def test_the_paths_may_be_strings(exported: Exported, tmp_path: Path) -> None:
    report = verify_parity(
        str(exported.checkpoint),
        str(tmp_path / "report"),
        gguf=str(exported.gguf),
        launch=FakeRuntimes(exported.checkpoint),
        taps=FakeRuntimes(exported.checkpoint).taps,
    )
    assert report.passed


def test_a_merge_without_its_parents_is_not_run_and_the_verdict_says_so(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_adapter(exported.checkpoint, tmp_path / "adapter")
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "merged"
    merge(exported.checkpoint, tmp_path / "adapter", alone, compare_logits=False)
    export_gguf(alone, tmp_path / "alone" / "m.gguf")
    (tmp_path / "alone" / "m.gguf.manifest.json").unlink()
    given = {"gguf": tmp_path / "alone" / "m.gguf", "launch": FakeRuntimes(alone), "taps": FakeRuntimes(alone).taps}
    report = verify_parity(alone, tmp_path / "report", SETTINGS, bisect=False, **given)
    assert (report.exit_code, statuses(report)["G0"]) == (ExitCode.RUNTIME_UNAVAILABLE, "not run")
    assert report.entries[0].detail.startswith("the base of this merge is not here (--base gives it) nor its adapter")
    assert report.facts["not_checked"][-1] == "m.gguf has no manifest"
    print_report(report)
    assert "not checked: the base of this merge is not here" in " ".join(capsys.readouterr().err.split())

    accepted = SETTINGS.model_copy(update={"without_parents": True})
    report = verify_parity(alone, tmp_path / "accepted", accepted, bisect=False, **given)
    assert (report.exit_code, len(report.facts["not_checked"])) == (ExitCode.OK, 2)

    parents = {"base": exported.checkpoint, "adapter": tmp_path / "adapter"}
    report = verify_parity(alone, tmp_path / "whole", SETTINGS, bisect=False, **parents, **given)
    assert (report.exit_code, report.facts["not_checked"][-1]) == (ExitCode.OK, "m.gguf has no manifest")
    assert "merge recomputed from base and adapter in 4 modules" in report.entries[0].detail


def test_a_model_is_loaded_once_for_all_that_is_asked_of_it(exported: Exported, tmp_path: Path) -> None:
    fake, asked = FakeRuntimes(exported.checkpoint), []

    def counted(runtime: str, *, job: Path, exact: bool, **options: Any) -> RunnerResult:
        request = read_job(job)
        asked.append((runtime, "exact" if exact else "shipped", request.passes, request.text is not None))
        return fake(runtime, job=job, exact=exact, **options)

    assert verify(exported, tmp_path / "report", counted, ALL).passed
    both = ("prefill", "decode")
    assert asked == [(r, path, both, path == "shipped") for r in ALL for path in ("exact", "shipped")]


@pytest.mark.parametrize("patience", ["soon", "-3", "inf"])
def test_a_patience_that_is_no_number_is_bad_usage(
    patience: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PATIENCE, patience)
    with pytest.raises(InputError, match=PATIENCE):
        verify(exported, tmp_path / "report", FakeRuntimes(exported.checkpoint))
