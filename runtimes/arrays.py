"""Named arrays in a file: an npz without pickle or compression, every header checked before memory is taken."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class ProtocolError(ValueError):
    """A file of arrays, a job or an answer that does not keep its format."""


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    write_each(path, arrays.items())


def write_each(path: Path, arrays: Iterable[tuple[str, Any]]) -> int:
    """Write (name, array) pairs as an npz, one array in memory at a time. Returns their number."""
    partial, count = path.with_name(path.name + ".partial"), 0
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
            count += 1
    partial.replace(path)
    return count


def read_arrays(path: Path, *, required: set[str], optional: set[str]) -> dict[str, NDArray[Any]]:
    """Named arrays of an npz. Errors as in read_each."""
    return dict(read_each(path, required=required, optional=optional))


def read_each(path: Path, *, required: set[str], optional: set[str]) -> Iterator[tuple[str, NDArray[Any]]]:
    """(name, array) of an npz in the file's order, one array in memory at a time.

    Every header is checked against its real size before anything is allocated. Raises ProtocolError for a file that
    is no such npz, or holds other names than `required` and some of `optional`.
    """
    for name in members_of(path, required=required, optional=optional):
        yield name, _loaded(path, name)


def members_of(path: Path, *, required: set[str], optional: set[str]) -> list[str]:
    """Names of the arrays in an npz, in the file's order, every header checked as in read_each."""
    with _as_protocol(path), zipfile.ZipFile(path) as archive:
        members = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        if len(set(members)) != len(members) or not required <= set(members) <= required | optional:
            raise ProtocolError(f"{path}: holds {sorted(members)}, expected {sorted(required)}")
        for info in archive.infolist():
            _check_member(path, archive, info)
        return members


class Stored:
    """The arrays of an npz by name, each read when it is asked for; the archive's directory is read once.

    Every header is checked as in read_each when it is opened, and again before anything is allocated. Raises
    ProtocolError.
    """

    def __init__(self, path: Path, *, required: set[str], optional: set[str]) -> None:
        self.names = members_of(path, required=required, optional=optional)
        self._path = path
        with _as_protocol(path):
            self._archive = zipfile.ZipFile(path)

    def read(self, name: str) -> NDArray[Any]:
        with _as_protocol(self._path):
            info = self._archive.getinfo(f"{name}.npy")
            _check_member(self._path, self._archive, info)
            with self._archive.open(info) as file:
                return np.lib.format.read_array(file, allow_pickle=False)


def _loaded(path: Path, name: str) -> NDArray[Any]:
    with _as_protocol(path), np.load(path, allow_pickle=False) as loaded:
        values: NDArray[Any] = loaded[name]
        return values


@contextlib.contextmanager
def _as_protocol(path: Path) -> Iterator[None]:
    """ProtocolError for whatever zipfile and numpy raise on a damaged file."""
    try:
        yield
    except (ProtocolError, MemoryError):
        raise
    except Exception as error:
        raise ProtocolError(f"{path}: cannot be read as npz: {error}") from error


def _check_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ProtocolError(f"{path}: {info.filename} is compressed: a small file could claim any amount of memory")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ProtocolError(f"{path}: {info.filename} has npy version {version}")
        read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        size = file.tell() + dtype.itemsize * int(np.prod(shape, dtype=object))
    if dtype.hasobject or size != info.file_size:
        raise ProtocolError(
            f"{path}: {info.filename} declares {dtype} {shape}, which its {info.file_size} bytes are not"
        )
