"""What the fingerprint says about the machine, read from the system's own files."""

from __future__ import annotations

import numpy as np
import pytest
from qalora_runtimes import fingerprint

CPUINFO = {
    "x86": "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t\t: fpu avx2 amx_int8 avx512f\n\nprocessor\t: 1\n",
    "arm": "processor\t: 0\nFeatures\t: fp asimd dotprod\nHardware\t: Board\n",
    "none": "",
}
FLAGS = {"x86": ["amx_int8", "avx2", "avx512f", "fpu"], "arm": ["asimd", "dotprod", "fp"], "none": []}
MODEL = {"x86": "Some CPU @ 3 GHz", "arm": "Board"}


@pytest.mark.parametrize("kind", CPUINFO)
def test_flags_come_from_cpuinfo(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(fingerprint, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(fingerprint.platform, "machine", lambda: "some processor")
    if CPUINFO[kind]:
        (tmp_path / "cpuinfo").write_text(CPUINFO[kind])
    machine = fingerprint.machine()
    assert machine["flags"] == FLAGS[kind]
    assert machine["model"] == MODEL.get(kind, machine["model"])
    assert machine["architecture"]


def test_an_emulated_arm_core_is_named_as_one_and_its_flags_are_not_those_of_the_machine_below(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(fingerprint.platform, "machine", lambda: "aarch64")
    (tmp_path / "cpuinfo").write_text("vendor_id\t: AuthenticAMD\nmodel name\t: EPYC\nflags\t: avx2\n")
    assert fingerprint.machine()["model"] == "emulated on EPYC"
    assert "avx2" not in fingerprint.machine()["flags"]
    assert (
        fingerprint.model_of("CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n", "aarch64")
        == "Arm implementer 0x41, part 0xd0c"
    )


def test_peak_memory_grows_with_what_is_touched(tmp_path, monkeypatch):
    before = fingerprint.peak_rss_bytes()
    block = np.ones(48 << 20, np.uint8)
    after = fingerprint.peak_rss_bytes()
    assert before is not None
    assert after >= before
    assert after > block.nbytes
    monkeypatch.setattr(fingerprint, "STATUS", tmp_path / "absent")
    assert fingerprint.peak_rss_bytes() >= after // 2
