"""Node and the npm packages that package-lock.json pins, in a cache folder.

The cache is $QALORA_WEB_CACHE, by default ~/.cache/qalora-export/web. Scripts of packages are not run, and packages
that npm calls optional (CUDA builds, other systems) are left out; tests name the two that Node wants for itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from qalora_export.safety import sha256_file

HERE = Path(__file__).parent
LOCK = HERE / "package-lock.json"
OLDEST = 20  # major version of Node.js: what transformers.js 4 asks for
INSTALL_SECONDS = 900
INSTALLED = "installed"  # written last: a folder without it was left by a killed install


class NodeUnavailableError(Exception):
    """Node or its packages cannot be had; the message says what to do."""


def install(*, development: bool = False) -> Path:
    """The folder whose node_modules hold the pinned packages; installed once. Raises NodeUnavailableError.

    development: with what only tests need, a browser's driver and runtimes for Node.
    """
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise NodeUnavailableError(f"{program} is not installed: install Node.js {OLDEST} or newer")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < OLDEST:
        raise NodeUnavailableError(f"node is {version}: install Node.js {OLDEST} or newer")
    folder = _cache() / f"{sha256_file(LOCK)[:16]}{'-dev' if development else ''}"
    if not (folder / INSTALLED).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("package.json", LOCK.name):
            shutil.copyfile(HERE / name, folder / name)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--omit=optional"]
        command += [] if development else ["--omit=dev"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS)
        if done.returncode:
            raise NodeUnavailableError(
                f"npm cannot install the pinned packages; go online once:\n{done.stderr[-2000:]}"
            )
        (folder / INSTALLED).touch()
    return folder


def _cache() -> Path:
    given = os.environ.get("QALORA_WEB_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "qalora-export" / "web"
