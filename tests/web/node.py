"""The scripts of this folder, run by Node beside the pinned npm packages (samples/web/npm.py installs them)."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samples.web.serve import serving

HERE = Path(__file__).parent
RUN_SECONDS = 900
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAGE_SECONDS = 600  # for one step in the browser: WebAssembly on a busy machine


class BrowserUnavailableError(Exception):
    """No Chromium here; the message says what to do."""


@dataclass(frozen=True)
class Answers:
    """said: the script's JSON. logits: float32 (positions, vocabulary) of each file of that name."""

    said: dict[str, Any]
    logits: dict[str, NDArray[np.float32]]


def chromium() -> str:
    """The browser's program. Raises BrowserUnavailableError."""
    for name in CHROMIUMS:
        if found := shutil.which(name):
            return found
    raise BrowserUnavailableError(f"none of {', '.join(CHROMIUMS)} is installed: apt-get install chromium")


def run(installed: Path, script: str, workdir: Path, job: dict[str, Any], vocabulary: int) -> Answers:
    """A script of this folder on `job`; its keys but "logits". Raises AssertionError when it fails."""
    workdir.mkdir(parents=True)
    for source in (*HERE.glob("*.mjs"), *HERE.glob("*.js")):  # Node looks for packages from where a script lies
        shutil.copyfile(source, installed / source.name)
    asked, answered = workdir / "job.json", workdir / "answers.json"
    asked.write_text(json.dumps(job | {"logits": str(workdir)}), encoding="utf-8")
    done = subprocess.run(
        ["node", installed / script, asked, answered], capture_output=True, text=True, check=False, timeout=RUN_SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:] or done.stdout[-4000:]
    logits = {path.stem: np.fromfile(path, "<f4").reshape(-1, vocabulary) for path in workdir.glob("*.f32")}
    return Answers(json.loads(answered.read_text(encoding="utf-8")), logits)


def browse(installed: Path, folder: Path, workdir: Path, job: dict[str, Any], vocabulary: int = 1) -> Answers:
    """browser.mjs on a static folder, which gets the tests' modules beside its own files."""
    for name in ("ask.html", *(path.name for path in HERE.glob("ask_*.js"))):
        shutil.copyfile(HERE / name, folder / name)
    with serving(folder) as address:
        asked = job | {"address": address, "chromium": chromium(), "timeout": PAGE_SECONDS * 1000}
        return run(installed, "browser.mjs", workdir, asked, vocabulary)
