"""Model files are untrusted input: bounded sizes, paths that cannot escape, writes that are whole or absent."""

from qalora_export.safety.atomic import (
    abandon,
    atomic_directory,
    atomic_file,
    atomic_files,
    could_not_write,
    exclusive,
    refuse_existing,
    scratch_folder,
    sweep,
)
from qalora_export.safety.hashing import FileIdentity, HashedOnce, HashFile, sha256_bytes, sha256_file
from qalora_export.safety.limits import MAX_HEADER_BYTES, MAX_JSON_BYTES, read_json
from qalora_export.safety.paths import StrPath, inside, local_path
from qalora_export.safety.regular import regular_file

__all__ = [
    "MAX_HEADER_BYTES",
    "MAX_JSON_BYTES",
    "FileIdentity",
    "HashFile",
    "HashedOnce",
    "StrPath",
    "abandon",
    "atomic_directory",
    "atomic_file",
    "atomic_files",
    "could_not_write",
    "exclusive",
    "inside",
    "local_path",
    "read_json",
    "refuse_existing",
    "regular_file",
    "scratch_folder",
    "sha256_bytes",
    "sha256_file",
    "sweep",
]
