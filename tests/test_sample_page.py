"""The sample page's folder and server, without npm or a browser; tests/web opens the page in one."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from qalora_export.errors import InputError
from samples.web.make import PAGE, TRANSFORMERS, make
from samples.web.npm import LOCK, NodeUnavailableError, install
from samples.web.serve import serving
from tests.web.node import BrowserUnavailableError, chromium


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """node_modules with the names that the page needs, and nothing in them."""
    for source in TRANSFORMERS.scripts.values():
        path = tmp_path / "packages" / "node_modules" / source
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "packages"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "mine" / "onnx"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    (folder / "config.json").write_text('{"max_position_embeddings": 512}')
    return folder


def test_the_folder_is_whole_and_served_with_what_threads_need(model: Path, packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    make(model, out, packages, question="what?")
    described = json.loads((out / "model.json").read_text())
    assert described["kind"] == "onnx"
    assert described["question"] == "what?"
    assert (out / "model/onnx/model.onnx").read_bytes() == b"graph"
    with serving(out) as address:
        for path in ["index.html", "page.js", "vendor/transformers.min.js", "model/config.json"]:
            with urllib.request.urlopen(address + path) as answer:
                assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
                assert answer.read() == (out / path).read_bytes()
            assert answer.headers["Content-Type"].startswith("text/") or path.endswith(".json")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + "vendor/")  # no listing


def test_what_is_no_artifact_is_refused_and_nothing_is_left(model: Path, packages: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no exported ONNX folder"):
        make(tmp_path / "mine", tmp_path / "site", packages)
    with pytest.raises(InputError):
        make(tmp_path / "absent.gguf", tmp_path / "site", packages)
    make(model, tmp_path / "site", packages)
    with pytest.raises(InputError):  # not over what is there
        make(model, tmp_path / "site", packages)


def test_the_page_names_no_other_host_and_allows_none() -> None:
    for path in PAGE.iterdir():
        assert "http" not in path.read_text(encoding="utf-8").replace("http-equiv", ""), path
    policy = (PAGE / "index.html").read_text(encoding="utf-8")
    assert "default-src 'self'" in policy
    assert "connect-src 'self' blob: data:" in policy


def test_every_package_is_pinned_by_its_hash() -> None:
    wanted = json.loads(LOCK.with_name("package.json").read_text(encoding="utf-8"))
    locked = json.loads(LOCK.read_text(encoding="utf-8"))["packages"]
    for name, version in {**wanted["dependencies"], **wanted["devDependencies"]}.items():
        assert locked[f"node_modules/{name}"]["version"] == version
    assert all("integrity" in package for name, package in locked.items() if name and not package.get("inBundle"))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No skip and no traceback: a machine without Node or a browser is told what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NodeUnavailableError, match="node is not installed"):
        install()
    with pytest.raises(BrowserUnavailableError, match="apt-get install chromium"):
        chromium()
