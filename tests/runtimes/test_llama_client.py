"""The HTTP client: a stock server on loopback, and answers that must not be believed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from qalora_runtimes.llama_cpp.__main__ import api_key
from qalora_runtimes.llama_cpp.client import Client, whole_vocabulary
from qalora_runtimes.protocol import make_job, read_answers, write_job
from qalora_runtimes.scoring import RunnerError

from tests.runtimes.conftest import worst_nmse


def entries(probabilities: list[float | None]) -> list[dict]:
    logs = [None if p is None else float(np.log(p)) for p in probabilities]
    return [{"id": i, "logprob": p} for i, p in enumerate(logs)][::-1]


def test_log_probabilities_are_put_back_in_the_order_of_ids():
    np.testing.assert_allclose(np.exp(whole_vocabulary(entries([0.5, 0.3, 0.2]), 3)), [[0.5, 0.3, 0.2]], rtol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        entries([0.5, 0.3]),
        [*entries([0.5, 0.3]), {"id": 1, "logprob": -1.6}],
        [*entries([0.5, 0.3]), {"id": 7, "logprob": -1.6}],
        entries([0.5, 0.3, 0.1]),
    ],
    ids=["missing", "twice", "unknown", "clipped"],
)
def test_an_incomplete_vocabulary_is_refused(bad):
    with pytest.raises(RunnerError):
        whole_vocabulary(bad, 3)


def test_nan_stays_nan():
    assert np.isnan(whole_vocabulary(entries([None, None, None]), 3)).all()


@pytest.fixture
def liar():
    """A server that answers every request with `liar.answer`; yields (client, server)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            data = self.server.answer
            self.send_response(self.server.status)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.status = 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Client(f"http://127.0.0.1:{server.server_port}"), server
    server.shutdown()
    server.server_close()


LIES = {
    "evaluated 3 tokens": {
        "timings": {"prompt_n": 3},
        "completion_probabilities": [{"top_logprobs": entries([0.5, 0.5])}],
    },
    "no log-probabilities": {"timings": {"prompt_n": 1}},
    "1 of 2": {"timings": {"prompt_n": 1}, "completion_probabilities": [{"top_logprobs": entries([1.0])}]},
}


@pytest.mark.parametrize("words", LIES)
def test_a_server_that_does_something_else_than_asked_is_refused(liar, words):
    client, server = liar
    server.answer = json.dumps({"tokens": [1]} | LIES[words]).encode()
    with pytest.raises(RunnerError, match=words):
        client.next_token_logprobs(np.array([1, 2, 3], np.int32), 2, fresh=False)


def test_http_errors_carry_the_servers_own_words(liar):
    client, server = liar
    server.status, server.answer = 400, json.dumps({"error": {"message": "no such template"}}).encode()
    with pytest.raises(RunnerError, match="no such template"):
        client.next_token_logprobs(np.array([1], np.int32), 2, fresh=True)
    for answer, words in ((b"<html>", "no usable answer"), (b"[]", "no JSON object"), (b"{}", "is it a llama-server")):
        server.status, server.answer = 200, answer
        with pytest.raises(RunnerError, match=words):
            client.next_token_logprobs(np.array([1], np.int32), 2, fresh=True)


def test_an_address_that_is_no_web_address_is_refused():
    with pytest.raises(RunnerError, match="http://"):
        Client("file:///etc/passwd")
    with pytest.raises(RunnerError, match="no usable answer"):
        Client("http://127.0.0.1:9").next_token_logprobs(np.array([1], np.int32), 2, fresh=True)


SERVE = """
import os, sys
os.environ["OMP_WAIT_POLICY"] = "passive"
import xllamacpp
p = xllamacpp.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 256; p.n_parallel = 1; p.verbosity = 0
p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
s = xllamacpp.Server(p); print(s.listening_address, flush=True); sys.stdin.read()
"""


def test_a_running_server_is_used_as_it_is(tiny_gguf, job, expected, tmp_path):
    """`--server URL` as for a stock llama-server on a device: no model, no package, only HTTP."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tiny_gguf)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        address = server.stdout.readline().strip()
        write_job(tmp_path / "job.npz", make_job(job.sequences[:3]))
        command = [
            sys.executable,
            "-m",
            "qalora_runtimes.llama_cpp",
            "--server",
            address,
            "--job",
            tmp_path / "job.npz",
            "--out",
            tmp_path / "out.npz",
            "--fingerprint",
            tmp_path / "fp.json",
        ]
        done = subprocess.run([str(word) for word in command], cwd="/", capture_output=True, text=True, timeout=300)
        server.stdin.close()
    assert done.returncode == 0, done.stderr
    logprobs = read_answers(tmp_path / "out.npz", positions=20).logprobs
    assert worst_nmse(logprobs, expected[:20]) < 1e-9
    assert json.loads((tmp_path / "fp.json").read_text())["package"] == "llama-server"


@pytest.fixture
def locked():
    """A server that answers only who knows its key, and sends others away; yields (address, keys it was shown)."""
    shown: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            shown.append(self.headers.get("Authorization"))
            right = shown[-1] == "Bearer s3cret"
            self.send_response(302 if self.path == "/moved" else 200 if right else 401)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            self.wfile.write(b'{"build_info": "b1"}' if right else b'{"error": {"message": "Invalid API Key"}}')

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", shown
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_key_goes_with_every_request_and_to_no_other_host(locked):
    address, shown = locked
    assert Client(address, key="s3cret").build() == "b1"
    with pytest.raises(RunnerError, match="Invalid API Key"):
        Client(address).build()
    with pytest.raises(RunnerError, match="refused /moved"):
        Client(address, key="s3cret")._call("/moved")
    assert shown == ["Bearer s3cret", None, "Bearer s3cret"]
    with pytest.raises(RunnerError, match="printable"):
        Client(address, key="a\r\nX: y")


def test_the_key_of_a_server_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    assert api_key(None) is None
    monkeypatch.setenv("LLAMA_API_KEY", "from the environment")
    assert api_key(None) == "from the environment"
    (tmp_path / "key").write_text("s3cret\n")
    assert api_key(tmp_path / "key") == "s3cret"
    (tmp_path / "key").write_text("\n")
    with pytest.raises(RunnerError, match="holds no key"):
        api_key(tmp_path / "key")


OTHERS = """
import sys, urllib.error, urllib.request
from pathlib import Path
from qalora_runtimes.llama_cpp.local_server import LocalServer
from qalora_runtimes.llama_cpp.settings import LlamaSettings
from qalora_runtimes.llama_cpp.wheel import import_wheel
from qalora_runtimes.protocol import make_job
settings = LlamaSettings.of(exact=False, threads=1, job=make_job([range(8)]))
server = LocalServer(import_wheel(), Path(sys.argv[1]), None, settings)
client = server.client()
assert client._tokenize("a", special=False)
try:
    urllib.request.urlopen(urllib.request.Request(f"{client.address}/tokenize", b'{"content": "a"}'))
except urllib.error.HTTPError as error:
    print(error.code)
"""


def test_our_own_server_answers_nobody_else(tiny_gguf):
    done = subprocess.run([sys.executable, "-c", OTHERS, tiny_gguf], capture_output=True, text=True)
    assert done.stdout.split() == ["401"], done.stderr
