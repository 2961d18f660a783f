"""What travels to a device and back: a folder of requests, and one file of answers. Standard library and numpy alone.

A pack is a folder:

    pack.json     {"format", "version": of qalora-runtimes, "about": whose it is, "files": {path: {size, sha256}},
                  "requests": [Request]}
    artifacts/…   the exported files and their exact variants
    requests/…    job.npz (protocol), names.json (taps)
    *.whl         qalora-runtimes itself, which `python -m qalora_runtimes FOLDER` needs

The answers are one zip of stored members, nothing pickled:

    pack.json     the pack's, byte for byte
    answers.json  {"format", "pack": sha256 of pack.json, "machine", "packages", "requests": {key: outcome}}
    KEY/…         logits.npz and fingerprint.json, or taps.npz

A request's key is the sha256 of all that its answer depends on: runtime, settings, job, names, and name and hash of
every file that is run. So an answer fits the question that was asked of these bytes, and no other.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from qalora_runtimes.protocol import ProtocolError

PACK_FORMAT, ANSWERS_FORMAT = "qalora-pack/1", "qalora-answers/1"
PACK, ANSWERS = "pack.json", "answers.json"
RUN, TAPS = "run", "taps"
MEMBERS = {RUN: ("logits.npz", "fingerprint.json"), TAPS: ("taps.npz",)}
MAX_JSON = 64 << 20  # bytes of pack.json and answers.json
COPIED = 1 << 20

Files = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class PackedRequest:
    """One run of one runtime; paths are relative to the pack. kind: RUN (launch.run_runner) or TAPS (taps.run_taps).

    unless: key of the request that holds all this one asks; it is run only where that one crashed.
    """

    key: str
    kind: str
    runtime: str
    model: str
    job: str
    exact: bool
    threads: int
    vocabulary: int | None = None
    lora: str | None = None
    data: str | None = None
    names: str | None = None
    unless: str | None = None

    @property
    def members(self) -> tuple[str, ...]:
        return MEMBERS[self.kind]


@dataclass(frozen=True)
class Pack:
    """about: checkpoint, probe set, settings and artifacts, as verify-parity wrote them. files: all but pack.json."""

    version: str
    about: Mapping[str, Any]
    files: Files
    requests: tuple[PackedRequest, ...]

    def as_json(self) -> dict[str, Any]:
        return {"format": PACK_FORMAT, **asdict(self)}


def request_key(asked: Mapping[str, Any], files: Iterable[tuple[str, str]]) -> str:
    """asked: JSON's own types. files: (role and name, sha256) of everything that is run."""
    return sha256_of(json.dumps({"asked": dict(asked), "files": sorted(files)}, sort_keys=True).encode())


def parse_pack(raw: bytes, *, where: object) -> Pack:
    """The content of a pack.json. Raises ProtocolError for anything else."""
    table = parse_json(raw, where=where)
    if table.get("format") != PACK_FORMAT:
        raise ProtocolError(f"{where}: is no pack of this version ({PACK_FORMAT}): {table.get('format')!r}")
    try:
        requests = tuple(PackedRequest(**request) for request in table["requests"])
        pack = Pack(str(table["version"]), dict(table["about"]), dict(table["files"]), requests)
        whole = all(map(_is_request, requests)) and all(
            is_inside(name) and type(file["size"]) is int and file["size"] >= 0 and is_digest(file["sha256"])
            for name, file in pack.files.items()
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"{where}: is no pack: {error!r}") from error
    if not whole:
        raise ProtocolError(f"{where}: holds a file or a request that cannot be in a pack")
    return pack


def _is_request(request: PackedRequest) -> bool:
    paths = (request.model, request.job, request.lora, request.data, request.names)
    inside = all(name is None or is_inside(name) for name in paths) and request.model and request.job
    named = request.kind == RUN or (request.kind == TAPS and request.names is not None)
    sizes = type(request.threads) is int and request.threads > 0 and type(request.vocabulary) in (int, type(None))
    return bool(inside and named and sizes and is_digest(request.key) and isinstance(request.runtime, str))


def read_pack(folder: Path) -> tuple[Pack, bytes]:
    """The pack in a folder and the bytes of its pack.json. Raises ProtocolError, OSError."""
    path = folder / PACK
    if path.stat().st_size > MAX_JSON:
        raise ProtocolError(f"{path}: has more than {MAX_JSON} bytes")
    raw = path.read_bytes()
    return parse_pack(raw, where=path), raw


def parse_json(raw: bytes, *, where: object) -> dict[str, Any]:
    """An object of JSON. Raises ProtocolError."""
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise ProtocolError(f"{where}: not a JSON object")
    return table


def is_inside(name: object) -> bool:
    """Whether a path stays in its folder whatever system reads it."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name or ":" in name:
        return False
    pure = PurePosixPath(name)
    return not pure.is_absolute() and ".." not in pure.parts


def is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def sha256_of(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes. The exporter's safety package has its own: this one stands alone, without torch."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class AnswersWriter:
    """Writes the file of answers: members as they come, answers.json last. Use as a context manager.

    The file has its name only once it is whole.
    """

    def __init__(self, path: Path, pack: bytes) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.partial")
        self._archive = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_STORED)
        self._pack = pack
        self._archive.writestr(_stored(PACK), pack)

    def add(self, name: str, source: Path) -> str:
        """Copy a file in; returns its sha256."""
        digest = hashlib.sha256()
        with source.open("rb") as file, self._archive.open(_stored(name), "w", force_zip64=True) as member:
            while part := file.read(COPIED):
                digest.update(part)
                member.write(part)
        return digest.hexdigest()

    def close(self, table: Mapping[str, Any]) -> None:
        """Write answers.json and give the file its name."""
        said = {"format": ANSWERS_FORMAT, "pack": sha256_of(self._pack), **table}
        self._archive.writestr(_stored(ANSWERS), json.dumps(said, indent=1).encode())
        self._archive.close()
        self._partial.replace(self._path)

    def __enter__(self) -> AnswersWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()
        self._partial.unlink(missing_ok=True)


class AnswersFile:
    """A file of answers, which may hold anything: every size is checked before memory or disk is taken.

    pack: what was asked; raw: its pack.json; table: answers.json. Raises ProtocolError for a file that is none, whose
    answers belong to another pack, or holds anything that is not declared.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with damaged(f"{path}: is no file of answers, or"):
            self._archive = zipfile.ZipFile(path)
            self._infos = {info.filename: info for info in self._archive.infolist()}
        size = path.stat().st_size
        if len(self._infos) != len(self._archive.infolist()):
            raise ProtocolError(f"{path}: holds a name twice")
        for info in self._infos.values():
            if (
                info.compress_type != zipfile.ZIP_STORED
                or info.compress_size != info.file_size
                or info.file_size > size
            ):
                raise ProtocolError(f"{path}: {info.filename} is compressed: a small file could claim any size")
        raw = self._small(PACK)
        self.pack, self.raw = parse_pack(raw, where=f"{path}: {PACK}"), raw
        self.table = parse_json(self._small(ANSWERS), where=f"{path}: {ANSWERS}")
        if self.table.get("format") != ANSWERS_FORMAT or self.table.get("pack") != sha256_of(raw):
            raise ProtocolError(f"{path}: the answers belong to another pack than the one inside")
        if not isinstance(self.table.get("requests"), dict):
            raise ProtocolError(f"{path}: {ANSWERS} says nothing of its requests")

    def outcome(self, key: str) -> Mapping[str, Any] | None:
        """What answers.json says of a request; None where it was not run."""
        found = self.table["requests"].get(key)
        return found if isinstance(found, dict) else None

    def check(self) -> None:
        """Read every part once. Raises ProtocolError unless each has its declared hash, and there is nothing else."""
        known = {request.key: request for request in self.pack.requests}
        declared = {PACK, ANSWERS}
        for key in self.table["requests"]:
            outcome = self.outcome(key)
            if key not in known or outcome is None:
                raise ProtocolError(f"{self.path}: answers what was not asked: {key[:64]!r}")
            if outcome.get("status") == "ok":
                for name in known[key].members:
                    self._copied(key, name, None)
                    declared.add(f"{key}/{name}")
        if surplus := self._infos.keys() - declared:
            raise ProtocolError(f"{self.path}: holds {min(surplus)[:80]!r}, which answers nothing")

    def extract(self, request: PackedRequest, folder: Path) -> dict[str, Path]:
        """Name -> file of a request's answer, copied into `folder`; its hash is that of answers.json."""
        found = {name: folder / name for name in request.members}
        for name, target in found.items():
            with target.open("wb") as out:
                self._copied(request.key, name, out)
        return found

    def _copied(self, key: str, name: str, out: BinaryIO | None) -> None:
        member, digest = f"{key}/{name}", hashlib.sha256()
        declared = (self.outcome(key) or {}).get("members")
        if member not in self._infos or not isinstance(declared, dict):
            raise ProtocolError(f"{self.path}: {member} is missing")
        with damaged(f"{self.path}: {member}"), self._archive.open(self._infos[member]) as file:
            while part := file.read(COPIED):
                digest.update(part)
                if out is not None:
                    out.write(part)
        if digest.hexdigest() != declared.get(name):
            raise ProtocolError(f"{self.path}: {member} is not what was answered: its sha256 is another one")

    def _small(self, name: str) -> bytes:
        info = self._infos.get(name)
        if info is None or info.file_size > MAX_JSON:
            raise ProtocolError(f"{self.path}: is no file of answers: no {name} of at most {MAX_JSON} bytes")
        with damaged(f"{self.path}: {name}"):
            return self._archive.read(info)


@contextlib.contextmanager
def damaged(where: object) -> Iterator[None]:
    """ProtocolError for whatever zipfile raises on an archive that is none, or lies about its places."""
    try:
        yield
    except ProtocolError:
        raise
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ProtocolError(f"{where}: is damaged: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's first byte; anything else is the disk's
            raise
        raise ProtocolError(f"{where}: is damaged: {error}") from error


def _stored(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name)  # of 1980: equal answers are equal bytes
