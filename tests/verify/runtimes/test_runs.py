"""What a run without an answer is called, and how far a run is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from qalora_runtimes.behaviour import QUESTIONS
from qalora_runtimes.heartbeat import Beat
from qalora_runtimes.launch import RunnerResult
from qalora_runtimes.protocol import make_job

from qalora_export.errors import ExitCode
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.runtimes.record import Artifact
from qalora_export.verify.runtimes.runs import CrashedError, Runs, watch_of
from tests.verify.exports import Exported, copy_of

PROBES = ProbeSet(np.arange(3, dtype=np.int32), np.array([3], np.int32), ("a",), (), ())
REFUSED = RunnerResult("refused", "r refuses (exit code 2): head_size shall be a multiple of 16")


def error(path: Path, result: RunnerResult, workdir: Path) -> CrashedError:
    runs = Runs(PROBES, 512, workdir, 1, lambda *_, **__: result)
    with pytest.raises(CrashedError) as found:
        runs.logprobs("onnxruntime", Artifact(path), "prefill", exact=False)
    assert found.value.code == ExitCode.RUNTIME_UNAVAILABLE
    return found.value


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_a_runtime_that_refuses_what_we_wrote_has_found_a_defect_of_ours(
    kind: str, exported: Exported, tmp_path: Path
) -> None:
    found = error(getattr(exported, kind), REFUSED, tmp_path)
    assert found.what == "onnxruntime refuses an artifact that qalora-export wrote"
    assert "multiple of 16" in found.why and "defect of qalora-export" in found.fix


def test_a_folder_that_was_changed_since_is_not_called_our_defect(exported: Exported, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    (copy.onnx / "config.json").write_text("{}")
    assert "defect" not in str(error(copy.onnx, REFUSED, tmp_path / "work"))


def test_a_crash_is_called_a_crash(exported: Exported, tmp_path: Path) -> None:
    found = error(exported.onnx, RunnerResult("crashed", "died", signal_name="SIGSEGV"), tmp_path)
    assert (found.what, found.why) == ("onnxruntime crashed: died", "signal SIGSEGV")


def test_only_what_a_task_counts_moves_it(tmp_path: Path) -> None:
    """Counts of anything else stand beside it: a bar of tokens does not go back to the third of ten questions."""
    shown: list[tuple[int, str]] = []

    class Shown:
        def update(self, done: int, detail: str = "") -> None:
            shown.append((done, detail))

        def close(self) -> None: ...

    job = make_job([[1, 2, 3]], "both")
    tell = watch_of("llama.cpp", tmp_path, job, Shown()).on_beat
    for beat in (Beat(1, 2, 3, "prefill, tokens"), Beat(2, 1, 3, "decode, tokens"), Beat(3, 2, 10, "answers")):
        tell(beat)
    tell(Beat(4, 0, 0, "texts"))
    assert shown == [(2, ""), (4, ""), (4, "answers, 2 of 10"), (4, "texts")]
    shown.clear()
    tell = watch_of("llama.cpp", tmp_path, job, Shown(), QUESTIONS).on_beat
    for beat in (Beat(1, 1, 1, "prefill, tokens"), Beat(2, 7, 20, QUESTIONS)):
        tell(beat)
    assert shown == [(0, "prefill, tokens, 1 of 1"), (7, "")]
