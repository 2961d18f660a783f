"""`qalora-export verify-parity` through its entry point, with the real runtimes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qalora_runtimes.process import PATIENCE, patience_for

from qalora_export.cli.main import main
from qalora_export.errors import InputError
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.recipe import GgufSettings
from tests.verify.exports import Exported, copy_of, float32, gguf_block, gguf_value, patch, read_at
from tests.verify.fake_runs import GATES

RUNTIMES = ["llama.cpp", "onnxruntime", "onnxruntime-genai"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["verify-parity", *map(str, arguments), "--threads", "1"])
    return int(caught.value.code or 0)


def gates(report: Path) -> dict[tuple[str, str], str]:
    return {(e["gate"], e["runtime"]): e["status"] for e in json.loads((report / "report.json").read_text())["gates"]}


@pytest.mark.slow
@pytest.mark.pictures
def test_all_three_runtimes_pass_every_gate(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "parity"
    code = run(exported.checkpoint, "--gguf", exported.gguf, "--onnx", exported.onnx, "--out", out)
    shown = capsys.readouterr().err
    assert code == 0, shown
    assert "verdict: pass" in shown
    assert gates(out) == {(gate, runtime): "pass" for runtime in RUNTIMES for gate in GATES}
    written = json.loads((out / "report.json").read_text())
    speeds = {run: f for run, f in written["runtimes"].items() if run.endswith("/decode")}
    assert all(f["decode_tokens_per_second"] > 0 and f["peak_rss_bytes"] > 0 for f in speeds.values())
    assert set(speeds) == {f"{r}/{path}/decode" for r in RUNTIMES for path in ("exact", "shipped")}


def test_a_pack_is_written_for_a_device_and_nothing_is_verified(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = tmp_path / "my device"
    assert run(exported.checkpoint, "--gguf", exported.gguf, "--pack", pack) == 0
    assert "python3 -m qalora_runtimes 'my device'" in capsys.readouterr().err
    assert {"pack.json", "README.txt", "artifacts", "requests"} <= {path.name for path in pack.iterdir()}
    assert run(exported.checkpoint, "--gguf", exported.gguf, "--pack", pack, "--out", tmp_path / "report") == 2
    assert run(exported.checkpoint, "--gguf", exported.gguf) == 2
    assert "nowhere to write the report" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        ("one code", {"G0", "G1", "G2"}),
        ("norm epsilon", {"G0", "G2", "G3"}),
        ("BOS missing", {"G0", "G5"}),
    ],
)
def test_a_damaged_gguf_turns_the_real_run_red(
    fault: str, failing: set[str], exported: Exported, tmp_path: Path
) -> None:
    copy = copy_of(exported, tmp_path)
    if fault == "one code":
        at = gguf_block(copy.gguf, "blk.0.attn_v.weight") + 4
        patch(copy.gguf, at, bytes([read_at(copy.gguf, at, 1)[0] ^ 0x08]))
    elif fault == "norm epsilon":
        patch(copy.gguf, gguf_value(copy.gguf, "llama.attention.layer_norm_rms_epsilon"), float32(1e-2))
    else:
        patch(copy.gguf, gguf_value(copy.gguf, "tokenizer.ggml.add_bos_token"), b"\0")
    assert run(exported.checkpoint, "--gguf", copy.gguf, "--out", tmp_path / "parity") == 1
    found = gates(tmp_path / "parity")
    assert {gate for (gate, _), status in found.items() if status == "fail"} >= failing


@pytest.mark.slow
def test_a_split_artifact_passes_through_llama_cpps_own_lora_loading(exported: Exported, tmp_path: Path) -> None:
    export_gguf(exported.checkpoint, tmp_path / "model.gguf", GgufSettings(layout="split"))
    assert run(exported.checkpoint, "--gguf", tmp_path / "model.gguf", "--out", tmp_path / "parity") == 0
    written = json.loads((tmp_path / "parity" / "report.json").read_text())
    assert all(f["settings"]["lora"] for run, f in written["runtimes"].items() if "/text/" not in run)
    assert set(written["artifacts"][0]["files"]) == {"model.gguf", "model.lora.gguf"}
    (tmp_path / "model.lora.gguf").unlink()
    assert run(exported.checkpoint, "--gguf", tmp_path / "model.gguf", "--out", tmp_path / "without") == 1
    failing = {gate for (gate, _), status in gates(tmp_path / "without").items() if status == "fail"}
    assert {"G0", "G1", "G2"} <= failing


def test_bad_usage_is_exit_2_and_leaves_nothing(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "parity"
    assert run(exported.checkpoint, "--out", out) == 2
    assert "pass --gguf or --onnx" in capsys.readouterr().err
    assert run(exported.checkpoint, "--gguf", exported.gguf, "--runtime", "llama-cpp", "--out", out) == 2
    assert run(exported.checkpoint, "--gguf", exported.gguf, "--positions", "10", "--out", out) == 2
    assert run(exported.checkpoint, "--gguf", tmp_path / "none.gguf", "--out", out) == 2
    assert run(tmp_path, "--gguf", exported.gguf, "--out", out) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_gguf_is_exit_4(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(exported.gguf.read_bytes()[:-100])
    assert run(exported.checkpoint, "--gguf", tmp_path / "cut.gguf", "--out", tmp_path / "parity") == 4
    assert not (tmp_path / "parity").exists()


def test_help_has_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["verify-parity", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert not caught.value.code
    assert "Examples" in shown
    assert "Exit codes: 0 every gate passed" in shown


def test_patience_is_an_option_and_an_environment_variable(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def verify(*_: object, **__: object) -> None:
        asked.append(patience_for(exported.gguf, 100))
        raise InputError("enough")

    monkeypatch.setattr("qalora_export.verify.stage.verify_parity", verify)
    command = (exported.checkpoint, "--gguf", exported.gguf, "--out", tmp_path / "out")
    monkeypatch.setenv(PATIENCE, "7")
    assert run(*command) == 2 and run(*command, "--patience", "1234") == 2
    assert asked == [7, 1234]
    monkeypatch.setenv(PATIENCE, "long")
    assert run(*command) == 2
    assert PATIENCE in capsys.readouterr().err
    assert run("--help") == 0
    assert PATIENCE in " ".join(capsys.readouterr().out.split())
