"""Where a stage may write, and what `force` may replace: artifacts of ours, and nothing else.

Ours is a folder of which our manifest names every file, a file that the manifest beside it names, and a file that says
itself that we wrote it. Inputs, the folders around and inside them, links, and a folder with one foreign file are not.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from qalora_export.checkpoint.manifest import MANIFEST, files_of, is_ours, sidecar_path
from qalora_export.errors import InputError, QaloraError
from qalora_export.safety import atomic_file, exclusive, local_path, read_json, refuse_existing, sha256_bytes
from qalora_export.safety.limits import MAX_JSON_BYTES, parse_json

OWN_FORMAT = "qalora-"  # how the "format" of every JSON file of ours begins
GGUF_MAGIC, GGUF_KEY = b"GGUF", b"qalora.version"
ZIP_MAGIC, PATCH_TABLE = b"PK\x03\x04", "patch.json"
GGUF_HEAD = 64 * 2**20  # metadata, tokenizer included, ends well before
SHOWN = 4


@contextlib.contextmanager
def claim_output(target: Path, *, force: bool, inputs: Iterable[Path | str | None] = ()) -> Iterator[None]:
    """Own `target` (a file or folder) while the block runs: every stage writes inside such a block.

    inputs: what the stage reads. Raises InputError, before anything is written, when `target` is, holds or lies inside
    an input, lies inside an artifact, is a link, or is the home or working folder; when it exists (unless `force`);
    when `force` would replace what this program did not make (at that time, or when the output takes its name); and
    when another command is writing it.
    """
    refuse_place(target, inputs)
    with exclusive(target, refuse_foreign):
        refuse_existing(target, force=force)
        if force:
            refuse_foreign(target)
        yield


def refuse_place(target: Path, inputs: Iterable[Path | str | None] = ()) -> None:
    """Raise InputError when nothing may ever be written at `target`, with `force` or without."""
    if target.is_symlink():
        raise InputError(
            "the output is a symbolic link",
            where=target,
            why="replacing it could destroy what it points to",
            fix="give the path itself",
        )
    here = target.resolve()
    for what, folder in (("working", Path.cwd()), ("home", _home())):
        if folder is not None and (here == folder or here in folder.parents):
            raise InputError(
                f"the output would take the place of the {what} folder", where=target, fix="name a new one"
            )
    for given in inputs:
        if given is None:
            continue
        source = local_path(given).resolve()
        if here == source or (target.exists() and source.exists() and target.samefile(source)):
            raise InputError("the output is an input", where=target, fix="choose another path")
        if here in source.parents:
            raise InputError(
                "the output would take the place of a folder that holds an input",
                where=target,
                why=f"{given} lies in it",
                fix="choose another path",
            )
        if source in here.parents:
            raise InputError(
                "the output would lie inside an input",
                where=target,
                why=f"everything in {given} is part of what is read",
                fix="choose another path",
            )
    if not here.name:
        raise InputError("the output would take the place of all files", where=target, fix="name a new one")
    for folder in here.parents:
        if (folder / MANIFEST).is_file() and is_ours(folder / MANIFEST):
            raise InputError(
                "the output would lie inside an artifact",
                where=target,
                why=f"the manifest of {folder} names every file of it, and would refute it from then on",
                fix="choose another path",
            )


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except RuntimeError:
        return None


def refuse_foreign(target: Path) -> None:
    """Raise InputError when anything at `target` is not of our making."""
    if found := foreign_files(target):
        shown = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        raise InputError(
            "--force replaces only what this program made",
            where=target,
            why=f"not ours: {shown}",
            fix="move or delete it yourself, or choose another path",
        )


def foreign_files(target: Path) -> list[str]:
    """Names of the files at `target` that are not ours; empty when it is all ours, an empty folder or not there."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        return [] if is_own_file(target) else [target.name]
    if not target.exists():
        return []
    known = files_of(target / MANIFEST)
    known |= {MANIFEST} if known else set()
    return sorted(name for name in _files(target) if name not in known)


def is_own_file(path: Path) -> bool:
    """Whether a regular file is ours: named by the manifest beside it, or of one of our formats."""
    if path.is_symlink() or not path.is_file():
        return False
    if path.name in files_of(sidecar_path(path)):
        return True
    with path.open("rb") as file:
        head = file.read(len(GGUF_MAGIC))
        if head == GGUF_MAGIC:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(GGUF_KEY, 0, GGUF_HEAD) >= 0
    if head == ZIP_MAGIC:
        return _own_patch(path)
    return path.suffix == ".json" and _own_json(path)


def write_signed(path: Path, text: str, *, comment: tuple[str, str]) -> Path | None:
    """Write a text of ours beside files that a user may also have: never over one that we did not sign, or that was
    edited since. Then NAME.qalora.SUFFIX is tried. Returns where it was written, None when both are taken.

    comment: how a comment begins and ends in that kind of file; the last line signs all lines above it.
    """
    content = text.encode("utf-8", "backslashreplace")  # the name of a file may be no text
    for candidate in (path, path.with_name(f"{path.stem}.qalora{path.suffix}")):
        with exclusive(candidate):
            if _occupied(candidate, comment):
                continue
            with atomic_file(candidate, force=True) as temporary:
                temporary.write_bytes(content + _signature(content, comment))
            return candidate
    return None


def _occupied(path: Path, comment: tuple[str, str]) -> bool:
    if path.is_symlink() or path.is_dir():
        return True
    if not path.exists():
        return False
    *lines, last = path.read_bytes().splitlines(keepends=True) or [b""]
    return last != _signature(b"".join(lines), comment)


def _signature(content: bytes, comment: tuple[str, str]) -> bytes:
    begin, end = comment
    return f"{begin}written by qalora-export; sha256 of the lines above: {sha256_bytes(content)}{end}\n".encode()


def _own_json(path: Path) -> bool:
    try:
        content = read_json(path)
    except QaloraError:
        return False
    return isinstance(content, dict) and str(content.get("format", "")).startswith(OWN_FORMAT)


def _own_patch(path: Path) -> bool:
    """Whether a zip is what `export patch` wrote: its table, which is stored as it is, says so."""
    try:
        with zipfile.ZipFile(path) as archive:
            table = archive.getinfo(PATCH_TABLE)
            if table.compress_type != zipfile.ZIP_STORED or table.file_size > MAX_JSON_BYTES:
                return False
            content = parse_json(archive.read(table), where=path)
    except (zipfile.BadZipFile, QaloraError, KeyError, NotImplementedError, RuntimeError, ValueError, OSError):
        return False
    return isinstance(content, dict) and str(content.get("format", "")).startswith(OWN_FORMAT)


def _files(folder: Path) -> Iterator[str]:
    """Every file, link and special file below a folder, relative to it; links are not followed."""
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(root) / name).relative_to(folder).as_posix()
