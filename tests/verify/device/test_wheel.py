"""The wheel of a pack: the package that asks, whole, and importable with numpy alone (tests/test_wheels.py)."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import qalora_runtimes

from qalora_export.verify.device.wheel import write_wheel


def test_it_holds_every_module_with_the_hash_of_its_record(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / write_wheel(tmp_path)) as wheel:
        names = set(wheel.namelist())
        root = Path(qalora_runtimes.__path__[0])
        modules = {f"qalora_runtimes/{path.relative_to(root).as_posix()}" for path in root.rglob("*.py")}
        assert {name for name in names if name.endswith(".py")} == modules
        record = wheel.read(next(name for name in names if name.endswith("RECORD"))).decode()
        for line in record.splitlines()[:-1]:
            name, digest, size = line.rsplit(",", 2)
            found = hashlib.sha256(wheel.read(name)).digest()
            assert digest == "sha256=" + base64.urlsafe_b64encode(found).rstrip(b"=").decode()
            assert int(size) == len(wheel.read(name))


@pytest.mark.slow
def test_pip_installs_it_and_it_answers_for_itself(tmp_path: Path) -> None:
    wheel, target = tmp_path / write_wheel(tmp_path), tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(pip, check=True, capture_output=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    words = [sys.executable, "-P", "-m", "qalora_runtimes", "--version"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout.strip() == f"qalora-runtimes {qalora_runtimes.__version__}", done.stderr
