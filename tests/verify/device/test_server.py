"""verify-parity --server against a llama-server on loopback, with its key; what its API lacks is not run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qalora_export.errors import ExitCode, InputError
from qalora_export.recipe import VerifySettings
from qalora_export.verify.device.server import ELSEWHERE, EXACT, INSIDE, LlamaServer
from qalora_export.verify.stage import verify_parity
from tests.verify.exports import Exported

KEY = "a key of this test"
SERVE = """
import os, sys
os.environ["OMP_WAIT_POLICY"] = "passive"
import xllamacpp
p = xllamacpp.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 256; p.n_parallel = 1; p.verbosity = 0
p.api_keys = [sys.argv[2]]; p.use_jinja = True; p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
s = xllamacpp.Server(p); print(s.listening_address, flush=True); sys.stdin.read()
"""
SETTINGS = VerifySettings(threads=1, long_length=64)


@pytest.fixture
def server(exported: Exported) -> Iterator[str]:
    """The address of a server that runs the exported file."""
    words = [sys.executable, "-c", SERVE, str(exported.gguf), KEY]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    (tmp_path / "key").write_text(KEY + "\n")
    return tmp_path / "key"


@pytest.mark.slow
def test_what_its_api_gives_is_judged_and_the_rest_is_not_run(
    exported: Exported, server: str, key: Path, tmp_path: Path
) -> None:
    given = {"gguf": exported.gguf, "onnx": exported.onnx, "server": server, "api_key_file": key}
    report = verify_parity(exported.checkpoint, tmp_path / "report", SETTINGS, **given)
    entries = {entry.gate: entry for entry in report.entries}
    assert {entry.runtime for entry in report.entries} == {"llama.cpp"}
    passed = {gate for gate, entry in entries.items() if entry.status == "pass"}
    assert {"G0", "G1", "G5"} <= passed and not passed & {"G2", "G3", "G4", "G6"}
    assert entries["G6"].where == ()
    assert report.exit_code == ExitCode.RUNTIME_UNAVAILABLE
    assert EXACT in entries["G2"].detail
    assert INSIDE in entries["G3"].detail
    assert (EXACT in entries["G4"].detail, INSIDE in entries["G4"].detail) == (True, True)
    assert entries["G6"].status == "not run"
    assert "not asked: which ids end generation" in entries["G6"].detail
    assert "the text of every id" not in entries["G6"].detail  # it detokenizes
    shipped = next(cost for cost in report.costs if cost.model == "llama.cpp, shipped path")
    assert shipped.kl is not None
    assert 0 < shipped.kl < 0.1
    assert server in report.facts["device"]["words"]
    assert report.facts["environment"]["cpu"] == {}  # whoever asked, not who answered


@pytest.mark.slow
def test_another_model_and_a_wrong_key_are_found_out(
    exported: Exported, server: str, key: Path, tmp_path: Path
) -> None:
    asked = LlamaServer(server, key)
    with pytest.raises(InputError, match="the server runs another model"):
        asked._require_file({"n_params": 1, "size": 2}, exported.gguf)
    key.write_text("another key")
    report = verify_parity(
        exported.checkpoint, tmp_path / "report", SETTINGS, gguf=exported.gguf, server=server, api_key_file=key
    )
    assert {e.gate: e.status for e in report.entries}["G5"] == "not run"
    assert "Invalid API Key" in next(e.detail for e in report.entries if e.gate == "G5")


@pytest.mark.parametrize("address", ["device:8080", "ftp://device", "http://", "http://user:word@device", "http://a:b"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="no address of a server"):
        LlamaServer(address)


def test_it_asks_for_gguf_files_alone(tmp_path: Path) -> None:
    asked = LlamaServer("http://127.0.0.1:1")
    assert asked.run("onnxruntime", model=tmp_path, exact=False, threads=1).message == ELSEWHERE
    assert asked.run("llama.cpp", model=tmp_path, exact=True, threads=1).message == EXACT
    assert asked.taps("onnxruntime").message == ELSEWHERE
