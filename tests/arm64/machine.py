"""An arm64 machine in a folder: Debian's Python and libraries, wheels from PyPI, run by QEMU's user mode emulation.

Everything is Debian's or PyPI's own build, as an arm64 device has it; nothing is installed into this system and no root
is needed, but apt-get and dpkg-deb are. The cache is $QALORA_REAL_CACHE/arm64, by default ~/.cache/qalora-export/real.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qalora_export.safety import sha256_bytes
from tests.real.packages import cache_folder

SUITE = "bookworm"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
EMULATOR = "qemu-user-static"
PYTHON = ("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib")
LIBRARIES = ("libc6", "libstdc++6", "libgcc-s1", "zlib1g", "libexpat1", "libssl3", "libffi8", "libgomp1")
LIBRARIES += ("libbz2-1.0", "liblzma5", "libuuid1")
# onnxruntime 1.28 and later end with a segmentation fault when they are imported under QEMU 7.2. GenAI asks for 1.31
# and loads whichever it finds; what it needs of it is in 1.27.
WHEELS = ("numpy==2.4.6", "xllamacpp==2026.10.11549", "onnxruntime==1.27.0", "onnxruntime-genai==0.18.0")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
# Processor -> flags by which kernels are chosen: int8 matrix products, the dot product alone, neither.
CPUS = {"max,sve=off": {"asimddp", "i8mm"}, "neoverse-n1": {"asimddp"}, "cortex-a72": set[str]()}
SECONDS = 3600


class ArmUnavailableError(Exception):
    """The emulator or a package cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Arm64:
    """folder: emulator, root and wheels."""

    folder: Path

    def python(self, cpu: str, words: list[object], *, wheel: Path) -> str:
        """Run the arm64 Python on a processor; returns what it printed. wheel: importable beside the runtimes.

        The program that is started is a script, so that runners, which start sys.executable, are emulated too.
        """
        script = self.folder / f"python-{cpu.partition(',')[0]}"
        emulator, python = self.folder / "emulator/usr/bin/qemu-aarch64-static", self.folder / "root/usr/bin/python3.11"
        command = [emulator, "-cpu", cpu, "-L", self.folder / "root", "-0"]
        script.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, command))} "$0" {shlex.quote(str(python))} "$@"\n')
        script.chmod(0o755)
        path = os.pathsep.join(map(str, (self.folder / "site", wheel)))
        environment = {**os.environ, "PYTHONHOME": "/usr", "PYTHONPATH": path, "QALORA_RUNNER_PATIENCE": str(SECONDS)}
        words = [script, *words]
        done = subprocess.run(
            list(map(str, words)), env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout


def install() -> Arm64:
    """The machine, made once. Raises ArmUnavailableError."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise ArmUnavailableError(f"{program} is not here: the arm64 system is made of Debian packages")
    if not KEYRING.is_file():
        raise ArmUnavailableError(f"{KEYRING} is not here: install debian-archive-keyring")
    key = sha256_bytes(repr((SUITE, EMULATOR, PYTHON, LIBRARIES, WHEELS)).encode())
    folder = cache_folder() / "arm64" / key[:16]
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _debian(folder / "arm64", "arm64", (*PYTHON, *LIBRARIES), folder / "root")
        _debian(folder / "host", _host(), (EMULATOR,), folder / "emulator")
        _wheels(folder)
        (folder / "installed").touch()
    return Arm64(folder)


def _host() -> str:
    return _run(["dpkg", "--print-architecture"]).strip()


def _debian(state: Path, architecture: str, packages: tuple[str, ...], target: Path) -> None:
    """Fetch packages by apt with lists of its own, checked by Debian's key, and unpack them into `target`."""
    for name in ("lists/partial", "archives/partial", "packages"):
        (state / name).mkdir(parents=True)
    (state / "status").touch()
    (state / "sources.list").write_text(f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {SUITE} main\n")
    settings = {
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", "-qq", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
    _run([*apt, "update"])
    _run([*apt, "download", *packages], cwd=state / "packages")
    for package in sorted((state / "packages").glob("*.deb")):
        _run(["dpkg-deb", "-x", package, target])


def _wheels(folder: Path) -> None:
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    only = ["--no-deps", "--only-binary=:all:", "--python-version", "3.11", *platforms]
    _run([sys.executable, "-m", "pip", "download", "--quiet", *only, "-d", folder / "wheels", *WHEELS])
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "site")


def _run(command: list[object], cwd: Path | None = None) -> str:
    words = list(map(str, command))
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, timeout=SECONDS)
    if done.returncode:
        raise ArmUnavailableError(f"{shlex.join(words[:3])} … failed; go online once:\n{done.stderr[-2000:]}")
    return done.stdout
