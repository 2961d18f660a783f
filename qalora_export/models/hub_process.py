"""The process that fetches a hub model, started and watched: how far it is, and its answer.

It is a process of its own because it alone may reach for the network (hub_download).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qalora_export.errors import InputError
from qalora_export.progress import task

POLL = 0.5  # seconds
MIB = 2**20


def download(hub_id: str, revision: str | None, *, without: tuple[str, ...]) -> Path:
    """The snapshot folder of a model that was fetched into Hugging Face's cache. Raises InputError when it was not.

    without: environment variables that the process must not see.
    """
    environment = {name: value for name, value in os.environ.items() if name not in without}
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # ours shows it
    command = [sys.executable, "-m", "qalora_export.models.hub_download", hub_id, revision or ""]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            answer = _watched(process, hub_id)
        except BaseException:
            process.kill()
            raise
    if "folder" not in answer:
        where = hub_id if revision is None else f"{hub_id} at revision {revision}"
        raise InputError(
            f"cannot fetch the model from the hub: {answer.get('error')}",
            where=where,
            why="no path of that name exists on this machine either",
            fix=str(answer.get("fix", "try again")),
        )
    return Path(answer["folder"])


def _watched(process: subprocess.Popen[str], hub_id: str) -> dict[str, Any]:
    """The last line that the process says. What it announces before is shown until then."""
    assert process.stdout is not None
    with task(f"fetch {hub_id}: its list of files"):
        answer = _parsed(process.stdout.readline())
    if "bytes" in answer:
        blobs = Path(answer["blobs"])
        before, total = size_of(blobs), -(-int(answer["bytes"]) // MIB)
        _check_room(hub_id, blobs, int(answer["bytes"]))
        with task(f"fetch {hub_id}, MiB", total) as shown:
            while process.poll() is None:
                shown.update(min(total, max(0, size_of(blobs) - before) // MIB))
                time.sleep(POLL)
            shown.update(total if process.returncode == 0 else max(0, size_of(blobs) - before) // MIB)
        answer = _parsed(process.stdout.readline())
    process.wait()
    return answer or {"error": f"the download process ended with exit code {process.returncode}", "fix": "try again"}


def _check_room(hub_id: str, folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise InputError(
            f"the weights of {hub_id} are {nbytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            where=folder,
            fix="make room, or point HF_HOME at another disk",
        )


def _parsed(line: str) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder that others are writing."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # renamed since it was listed
            continue
    return total
