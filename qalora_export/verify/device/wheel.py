"""qalora-runtimes as a wheel, made from the package that is imported here: the one whose questions are packed.

A pure-Python wheel is a zip of the package and a folder of metadata (PEP 427). runtimes/pyproject.toml builds the same
package; from an installed qalora-export there is no source tree to build from.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

import qalora_runtimes
from qalora_runtimes.launch import RUNNERS

NAME = "qalora_runtimes"
NEEDS = "numpy>=1.26"
SUFFIXES = (".py", ".typed")


def write_wheel(folder: Path) -> str:
    """Write the wheel into `folder`; returns its name. Equal packages are equal bytes."""
    version = qalora_runtimes.__version__
    info = f"{NAME}-{version}.dist-info"
    root = Path(next(iter(qalora_runtimes.__path__)))
    members = {
        f"{NAME}/{path.relative_to(root).as_posix()}": path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.suffix in SUFFIXES and "build" not in path.relative_to(root).parts
    }
    members[f"{info}/METADATA"] = _metadata(version).encode()
    members[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: qalora-export\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = "".join(f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in members.items())
    members[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    name = f"{NAME}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content, zipfile.ZIP_DEFLATED)
    return name


def _metadata(version: str) -> str:
    lines = ["Metadata-Version: 2.1", "Name: qalora-runtimes", f"Version: {version}", "Requires-Python: >=3.11"]
    lines.append(f"Requires-Dist: {NEEDS}")
    for runner in RUNNERS.values():
        lines += [f"Provides-Extra: {runner.package}", f'Requires-Dist: {runner.package} ; extra == "{runner.package}"']
    return "\n".join([*lines, "", ""])


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
