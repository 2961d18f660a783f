"""Node and the pinned npm packages of package-lock.json, in a cache folder; run.mjs on an exported folder.

The cache is $QALORA_REAL_CACHE/web, by default ~/.cache/qalora-export/real/web. Scripts of packages are not run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.safety import sha256_file
from tests.real.packages import cache_folder

HERE = Path(__file__).parent
LOCK = HERE / "package-lock.json"
OLDEST = 20  # major version: what transformers.js 4 asks for
INSTALL_SECONDS, RUN_SECONDS = 900, 900


class NodeUnavailableError(Exception):
    """Node or its packages cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Answers:
    """What run.mjs says of one folder. said: its JSON. node, wasm: logits, float32 (positions, vocabulary)."""

    said: dict[str, Any]
    node: NDArray[np.float32]
    wasm: NDArray[np.float32]


def install() -> Path:
    """The folder whose node_modules hold the pinned packages; installed once. Raises NodeUnavailableError."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise NodeUnavailableError(f"{program} is not installed: install Node.js {OLDEST} or newer")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < OLDEST:
        raise NodeUnavailableError(f"node is {version}: install Node.js {OLDEST} or newer")
    folder = cache_folder() / "web" / sha256_file(LOCK)[:16]
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("package.json", LOCK.name):
            shutil.copyfile(HERE / name, folder / name)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS)
        if done.returncode:
            raise NodeUnavailableError(
                f"npm cannot install the pinned packages; go online once:\n{done.stderr[-2000:]}"
            )
        (folder / "installed").touch()
    return folder


def run(installed: Path, folder: Path, workdir: Path, job: dict[str, Any]) -> Answers:
    """run.mjs on `folder`; job: its keys but "folder" and "logits". Raises AssertionError when it fails."""
    workdir.mkdir(parents=True)
    script, asked, answered = installed / "run.mjs", workdir / "job.json", workdir / "answers.json"
    shutil.copyfile(HERE / script.name, script)  # Node looks for packages from where the script lies
    asked.write_text(json.dumps(job | {"folder": str(folder.resolve()), "logits": str(workdir)}), encoding="utf-8")
    done = subprocess.run(
        ["node", script, asked, answered], capture_output=True, text=True, check=False, timeout=RUN_SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:] or done.stdout[-4000:]
    said = json.loads(answered.read_text(encoding="utf-8"))
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    node, wasm = (np.fromfile(workdir / f"{name}.f32", "<f4").reshape(-1, vocabulary) for name in ("node", "wasm"))
    return Answers(said, node, wasm)
