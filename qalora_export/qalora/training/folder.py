"""`<out>.training/`: what a run keeps beside its adapter, so that a killed one goes on and a finished one can be read.

    run.json              what the run is made of: settings, sha256 of base and data, number of processes
    checkpoint-STEP/      adapter.safetensors, optimizer, schedule and random state; complete.json is written last
    metrics.jsonl  report.json  loss.png  loss.svg  tensorboard/

A checkpoint without a matching complete.json was cut off by a kill and is ignored. Checkpoints are deleted once the
adapter is saved. The record keeps times and speeds; the adapter folder has none, so equal runs give equal adapters.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qalora_export.errors import InputError
from qalora_export.safety import atomic_directory, atomic_file, read_json, sha256_file

RUN, COMPLETE, ADAPTER = "run.json", "complete.json", "adapter.safetensors"
RECORD = {RUN, "metrics.jsonl", "report.json", "loss.png", "loss.svg", "tensorboard"}
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def folder_for(out: Path) -> Path:
    return out.with_name(out.name + ".training")


def prepare(folder: Path, fingerprint: dict[str, Any], *, resume: bool, force: bool) -> None:
    """Make the folder ready: kept when the same run can go on from a checkpoint in it, emptied otherwise.

    Raises InputError when it holds checkpoints of a different run (unless `force`), is not one of ours, or would have
    to be emptied and holds something that no run writes.
    """
    refuse_others(folder)
    if (folder / RUN).is_file() and resume and last_checkpoint(folder):
        changed = _differences(read_json(folder / RUN), fingerprint)
        if not changed:
            return
        if not force:
            raise InputError(
                "cannot resume: this is not the run that was interrupted",
                where=folder,
                why="changed since then: " + ", ".join(changed),
                fix="restore what changed, or pass --no-resume to start again from step 0",
            )
    refuse_strangers(folder)
    with atomic_directory(folder, force=True) as fresh:  # a kill must not leave a folder without its run.json
        write_json(fresh / RUN, fingerprint)


def refuse_others(folder: Path) -> None:
    """Raise InputError for a folder with content that is not a training record."""
    if folder.exists() and not (folder / RUN).is_file() and any(folder.iterdir()):
        raise InputError(
            "a folder that is not a training record is in the way",
            where=folder,
            fix="move it, or choose another --out",
        )


def refuse_strangers(folder: Path) -> None:
    """Raise InputError as refuse_others does, and for a record that holds something that no run writes."""
    refuse_others(folder)
    if folder.exists() and (foreign := sorted(path.name for path in folder.iterdir() if not _is_record(path.name))):
        raise InputError(
            "the training record holds files that no run wrote",
            where=folder,
            why=f"not ours: {', '.join(foreign[:4])}",
            fix="move them, or choose another --out",
        )


def _is_record(name: str) -> bool:
    """Whether a run writes something of this name, or leaves it when it is killed."""
    return name in RECORD or CHECKPOINT.fullmatch(name) is not None or name.startswith(".")


def _differences(before: Any, now: dict[str, Any]) -> list[str]:
    """Dotted names of the entries that differ."""
    flat_before, flat_now = _flat(before), _flat(json.loads(json.dumps(now)))
    missing = object()
    return [
        key
        for key in sorted(flat_before.keys() | flat_now.keys())
        if flat_before.get(key, missing) != flat_now.get(key, missing)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in _flat(item, f"{prefix}.{key}" if prefix else key).items()
    }


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def mark_complete(path: Path) -> None:
    """Commit a checkpoint: from now on it counts."""
    files = {item.relative_to(path).as_posix(): sha256_file(item) for item in sorted(path.rglob("*")) if item.is_file()}
    write_json(path / COMPLETE, {name: digest for name, digest in files.items() if name != COMPLETE})


def is_complete(path: Path) -> bool:
    """Whether every file the commit mark names is there with the same sha256."""
    if not (path / COMPLETE).is_file():
        return False
    files = read_json(path / COMPLETE)
    if not isinstance(files, dict) or not files:
        return False
    return all((path / name).is_file() and sha256_file(path / name) == digest for name, digest in files.items())


def remove_incomplete(path: Path) -> None:
    """Delete a checkpoint without a commit mark: no run can go on from it."""
    if not (path / COMPLETE).exists():
        shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    for path in sorted(_checkpoints(folder), key=_step, reverse=True):
        if is_complete(path):
            return path
    return None


def keep_only(folder: Path, steps: Iterable[int]) -> None:
    """Delete every checkpoint but those of `steps`, the newest first.

    A checkpoint may name an older one as the best, so a kill in between must not leave it without that one.
    """
    kept = {checkpoint(folder, step) for step in steps}
    for path in sorted(_checkpoints(folder), key=_step, reverse=True):
        if path not in kept:
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and CHECKPOINT.fullmatch(path.name)]


def _step(path: Path) -> int:
    match = CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else -1


def write_json(path: Path, content: Any) -> None:
    with atomic_file(path, force=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic_file(path, force=True) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
