"""The device's side of a pack: run every request in a process of its own, write one file of answers.

Nothing is judged here. What is missing or crashes is an answer too: the gates that needed it are "not run".
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import qalora_runtimes
from qalora_runtimes.fingerprint import machine
from qalora_runtimes.launch import RUNNERS, run_runner
from qalora_runtimes.packs import RUN, AnswersWriter, Pack, PackedRequest, read_pack, sha256_file
from qalora_runtimes.protocol import ProtocolError, read_job
from qalora_runtimes.taps import read_names, run_taps

OUT = "answers.zip"
OUTCOME = ("status", "message", "signal_name", "log")  # of a result, beside its files
Say = Callable[[str], None]


def answer(
    folder: Path, out: Path, *, runtimes: Collection[str] | None = None, threads: int | None = None, say: Say = print
) -> dict[str, str]:
    """Answer the pack in `folder` into the file `out`; returns request key -> status of what was run.

    runtimes: only these; threads: instead of those that were packed. Files are hashed before the first run and after
    the last. Raises ProtocolError for a pack that is damaged or changes meanwhile, OSError.
    """
    pack, raw = read_pack(folder)
    if pack.version != qalora_runtimes.__version__:
        raise ProtocolError(
            f"{folder}: was packed for qalora-runtimes {pack.version}, {qalora_runtimes.__version__} is installed: "
            f"install the wheel that lies in it"
        )
    check_files(folder, pack)
    outcomes: dict[str, dict[str, Any]] = {}
    with AnswersWriter(out, raw) as writer, tempfile.TemporaryDirectory(dir=out.parent, prefix=".answers-") as work:
        for number, request in enumerate(pack.requests, 1):
            if runtimes is not None and request.runtime not in runtimes:
                continue
            if request.unless is not None and outcomes.get(request.unless, {}).get("status") != "crashed":
                continue
            say(f"{number} of {len(pack.requests)}: {request.runtime}, {_what(request)}")
            outcomes[request.key] = _run(folder, request, Path(work) / "run", writer, threads or request.threads)
            if message := outcomes[request.key]["message"]:
                say(f"   {outcomes[request.key]['status']}: {message}")
            shutil.rmtree(Path(work) / "run", ignore_errors=True)
        check_files(folder, pack)
        writer.close({"machine": machine(), "packages": _packages(), "requests": outcomes})
    return {key: outcome["status"] for key, outcome in outcomes.items()}


def check_files(folder: Path, pack: Pack) -> None:
    """Raises ProtocolError unless every file of the pack is there with the bytes that were packed."""
    for name, file in pack.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file["size"]:
            raise ProtocolError(f"{path}: is missing, or not of {file['size']} bytes: copy the pack again")
        if sha256_file(path) != file["sha256"]:
            raise ProtocolError(f"{path}: has other bytes than those that were packed: copy the pack again")


def _run(folder: Path, request: PackedRequest, workdir: Path, writer: AnswersWriter, threads: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": folder / request.model,
        "workdir": workdir,
        "exact": request.exact,
        "threads": threads,
        "lora": None if request.lora is None else folder / request.lora,
    }
    if request.kind == RUN:
        extra = {} if request.vocabulary is None else {"vocabulary": request.vocabulary}
        found: Any = run_runner(request.runtime, job=folder / request.job, **options, **extra)
    else:
        assert request.names is not None
        data = None if request.data is None else folder / request.data
        job, names = read_job(folder / request.job), read_names(folder / request.names)
        found = run_taps(request.runtime, job=job, names=names, data=data, **options)
    outcome = {name: getattr(found, name, None) for name in OUTCOME}
    members = {}
    if found.status == "ok":
        members = {name: writer.add(f"{request.key}/{name}", workdir / name) for name in request.members}
    return {**outcome, "members": members}


def _what(request: PackedRequest) -> str:
    path = "exact path" if request.exact else "as it ships"
    return path if request.kind == RUN else f"{path}, looking inside"


def _packages() -> dict[str, str]:
    """Versions of what can have answered."""
    found = {}
    for name in ("numpy", *sorted({runner.package for runner in RUNNERS.values()})):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
