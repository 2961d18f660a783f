"""A model by path or hub id: the cache as huggingface_hub lays it out, and its real download code against loopback."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import read_manifest
from qalora_export.errors import InputError
from qalora_export.models.sources import MAY_DOWNLOAD, lacking, locate
from qalora_export.quantization.stage import quantize
from qalora_export.recipe_file import load_recipe
from tests.conftest import ROOT
from tests.models import make_tiny_model
from tests.progress_record import recorded

HUB_ID, COMMIT = "Someone/Tiny-1", "0123456789abcdef0123456789abcdef01234567"
GPTQ = "gptq_model-4bit-32g.safetensors"
PICKLE, CODE, OTHER = "pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors"


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the repository on the hub holds: a model in two shards, and files nobody asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path_factory.mktemp("hub") / "model", num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    for name in (PICKLE, CODE, OTHER):
        (folder / name).write_bytes(b"not wanted")
    return folder


def into_cache(remote: Path, cache: Path, names: set[str] | None = None) -> Path:
    """cache/models--Someone--Tiny-1/{blobs,refs,snapshots} as huggingface_hub makes it; returns the snapshot."""
    repo = cache / "models--Someone--Tiny-1"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for path in remote.iterdir():
        if names is None or path.name in names:
            into_snapshot(path, snapshot)
    return snapshot


def into_snapshot(path: Path, snapshot: Path) -> None:
    blob = hashlib.sha256(path.read_bytes()).hexdigest()
    (snapshot.parent.parent / "blobs" / blob).write_bytes(path.read_bytes())
    (snapshot / path.name).symlink_to(f"../../blobs/{blob}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv(MAY_DOWNLOAD, raising=False)
    return folder


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cached_model_is_taken_at_its_commit(remote: Path, cache: Path, revision: str | None) -> None:
    snapshot = into_cache(remote, cache)
    found = locate(HUB_ID, revision)
    assert (found.path, found.hub_id, found.commit) == (snapshot, HUB_ID, COMMIT)
    assert found.notes == (f"took {HUB_ID} at commit {COMMIT} from the cache",)


def test_offline_and_not_cached_is_one_clear_error(remote: Path, cache: Path) -> None:
    with pytest.raises(InputError, match=r"no path on this machine, and the hub's cache does not hold config\.json"):
        locate(HUB_ID)
    shard = sorted(remote.glob("model-*.safetensors"))[0].name
    into_cache(remote, cache, {path.name for path in remote.iterdir()} - {shard})
    with pytest.raises(InputError, match=rf"{shard} of it .*HF_HUB_OFFLINE=1 forbids.*hf download {HUB_ID}"):
        locate(HUB_ID)
    with pytest.raises(InputError, match=r"at revision v2"):
        locate(HUB_ID, "v2")


def test_a_local_folder_wins_over_a_hub_id_and_that_is_said(
    remote: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into_cache(remote, cache)
    (tmp_path / "Someone" / "Tiny-1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = locate(HUB_ID)
    assert (found.path, found.hub_id) == (Path(HUB_ID), None)
    assert found.notes == (f"took the local path {HUB_ID}, not a hub model of that name",)
    with pytest.raises(InputError, match="revision was given for a model on this machine"):
        locate(HUB_ID, "main")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../x/y", "/tmp/none/such", "folder/model.gguf"])
def test_what_is_no_hub_id_is_a_missing_path(cache: Path, name: str) -> None:
    with pytest.raises(InputError, match="model folder not found"):
        locate(name)


def test_a_recipe_keeps_a_hub_id_and_resolves_a_path(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f'model = "{HUB_ID}"\nrevision = "main"\nout = "out"\n')
    assert (load_recipe(file).model, load_recipe(file).revision) == (HUB_ID, "main")
    (tmp_path / HUB_ID).mkdir(parents=True)
    assert load_recipe(file).model == str(tmp_path / HUB_ID)


def test_lacking_names_the_first_file_that_is_not_there(remote: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    assert lacking(folder) == "config.json"
    (folder / "config.json").write_text("{}")
    assert lacking(folder) == "model.safetensors"
    (folder / "model.safetensors").write_text("")
    assert lacking(folder) == "tokenizer.json"
    (folder / "tokenizer.model").write_text("")
    assert lacking(folder) is None
    assert lacking(remote) is None


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that snapshot_download needs, over one folder. asked: every file that was requested."""

    root: Path
    asked: set[str]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        names = sorted(file.name for file in self.root.iterdir())
        if path in (f"/api/models/{HUB_ID}/revision/{rev}" for rev in ("main", COMMIT)):
            siblings = [{"rfilename": name} for name in names]
            self._send(json.dumps({"id": HUB_ID, "sha": COMMIT, "siblings": siblings}).encode(), body=body)
        elif path == f"/api/models/{HUB_ID}/tree/{COMMIT}":
            entries = [self._entry(name) for name in names]
            self._send(json.dumps(entries).encode(), body=body)
        elif path.startswith(f"/{HUB_ID}/resolve/{COMMIT}/") and path.rpartition("/")[2] in names:
            name = path.rpartition("/")[2]
            self.asked.add(name)
            self._send((self.root / name).read_bytes(), body=body)
        else:
            self._send(b'{"error": "not here"}', body=body, status=404, code="RevisionNotFound")

    def _entry(self, name: str) -> dict[str, object]:
        content = (self.root / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send(self, content: bytes, *, body: bool, status: int = 200, code: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(remote: Path) -> Iterator[tuple[str, type[Hub]]]:
    handler = type("Served", (Hub,), {"root": remote, "asked": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(hub: tuple[str, type[Hub]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    """This process and its children find the loopback hub and a cache of their own, and the user allows downloads."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", MAY_DOWNLOAD):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub[0], "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return hub[1]


def test_the_command_line_fetches_safetensors_and_tokenizer_and_pins_the_commit(
    remote: Path, online: type[Hub], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "qalora_export.cli", "quantize", HUB_ID, "--out", str(tmp_path / "b.qalora")]
    done = subprocess.run([*command, "--method", "rtn"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert online.asked == {path.name for path in remote.iterdir()} - {PICKLE, CODE, OTHER}
    manifest = read_manifest(tmp_path / "b.qalora")
    assert manifest["parents"][0]["name"] == f"{HUB_ID}@{COMMIT}"
    assert manifest["settings"]["source"] == {"hub_id": HUB_ID, "revision": COMMIT}
    assert len(CanonicalCheckpoint(tmp_path / "b.qalora").modules) == 7
    online.asked.clear()
    assert locate(HUB_ID).commit == COMMIT  # from the cache now
    assert not online.asked


@pytest.fixture
def autogptq(remote: Path, tmp_path: Path) -> Path:
    """A model that the real AutoGPTQ wrote, whose weights have its own name, with a tokenizer."""
    folder = tmp_path / "autogptq"
    shutil.copytree(ROOT / "tests" / "quantization" / "golden" / "autogptq", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(remote / name, folder / name)
    (folder / PICKLE).write_bytes(b"not wanted")
    return folder


def test_a_cached_autogptq_model_is_found_under_its_own_name(autogptq: Path, cache: Path, tmp_path: Path) -> None:
    snapshot = into_cache(autogptq, cache, {path.name for path in autogptq.iterdir()} - {GPTQ})
    with pytest.raises(InputError, match=r"does not hold model\.safetensors of it"):
        locate(HUB_ID)
    into_snapshot(autogptq / GPTQ, snapshot)
    quantize(HUB_ID, tmp_path / "b.qalora")
    assert CanonicalCheckpoint(tmp_path / "b.qalora").modules["model.layers.0.self_attn.q_proj"] == (4, 32)
    assert read_manifest(tmp_path / "b.qalora")["settings"]["source"] == {"hub_id": HUB_ID, "revision": COMMIT}


def test_an_autogptq_model_is_fetched_under_its_own_name(autogptq: Path, online: type[Hub], tmp_path: Path) -> None:
    online.root = autogptq
    quantize(HUB_ID, tmp_path / "b.qalora")
    assert online.asked == {path.name for path in autogptq.iterdir()} - {PICKLE}
    assert len(CanonicalCheckpoint(tmp_path / "b.qalora").modules) == 7


def test_a_download_shows_how_far_it_is(remote: Path, online: type[Hub]) -> None:
    with recorded() as tasks:
        locate(HUB_ID)
    fetched = next(task for task in tasks if task.description == f"fetch {HUB_ID}, MiB")
    weights = sum(path.stat().st_size for path in remote.glob("model*.safetensors"))
    assert fetched.total == -(-weights // 2**20) == fetched.done and fetched.closed


def test_a_disk_too_small_for_the_weights_is_told_before_they_come(
    online: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"the weights of Someone/Tiny-1 are .* GiB are free.*HF_HOME"):
        locate(HUB_ID)


def test_no_download_when_the_user_is_offline(online: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE=1 forbids a download"):
        locate(HUB_ID)
    assert not online.asked


def test_what_the_hub_refuses_is_told_in_one_error(online: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"cannot fetch the model from the hub: it has no such revision.*check the bra"
    ):
        locate(HUB_ID, "v9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"cannot fetch the model from the hub: .*check the network"):
        locate(HUB_ID)
