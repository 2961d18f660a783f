"""Patches between two merges of one base: there and back bit for bit, and nothing half, wrong or hostile is applied."""

from __future__ import annotations

import json
import lzma
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qalora_runtimes import patching
from qalora_runtimes.__main__ import main
from qalora_runtimes.patches import (
    FLOAT,
    INT,
    TABLE,
    PatchFile,
    beside,
    decompress,
    differences,
    with_differences,
)
from qalora_runtimes.protocol import ProtocolError

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.formats.patch.apply import apply
from qalora_export.formats.patch.export import export_patch
from qalora_export.recipe import GgufSettings
from tests.formats.patch.artifacts import KINDS, content, copied, expected, export_all, moved
from tests.models import make_tiny_canonical


@pytest.mark.parametrize("artifact", KINDS)
def test_a_patch_makes_the_other_artifact_and_goes_back(artifact: str, pair: Path, tmp_path: Path) -> None:
    patch, target = pair / f"{KINDS[artifact]}.patch", copied(pair / "one" / artifact, tmp_path)
    done = apply(patch, target)
    assert (done.target, done.now) == (target, artifact)
    assert content(target) == expected(pair / "two" / artifact)
    apply(patch, target, reverse=True)
    assert content(target) == expected(pair / "one" / artifact)
    apply(patch, target, tmp_path / "elsewhere" / artifact)
    assert content(tmp_path / "elsewhere" / artifact) == expected(pair / "two" / artifact)
    assert content(target).items() >= expected(pair / "one" / artifact).items()
    with pytest.raises(InputError, match="exists already"):
        apply(patch, target, tmp_path / "elsewhere" / artifact)
    apply(patch, target, tmp_path / "elsewhere" / artifact, force=True)
    assert content(tmp_path / "elsewhere" / artifact) == expected(pair / "two" / artifact)


@pytest.mark.parametrize("layout", ["q4_1", "split", "onnx"])
def test_trained_scales_are_patched_too(layout: str, tiny_canonical: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        checkpoint = moved(tiny_canonical, tmp_path / f"{name}.qalora", seed, scales=True)
        (tmp_path / name).mkdir()
        if layout == "onnx":
            export_onnx(checkpoint, tmp_path / name / "onnx")
        else:
            export_gguf(checkpoint, tmp_path / name / "model.gguf", GgufSettings(layout=layout))
    artifact = "onnx" if layout == "onnx" else "model.gguf"
    report = export_patch(tmp_path / "one" / artifact, tmp_path / "two" / artifact, tmp_path / "patch")
    assert report.offsets / 2 < report.moved <= report.offsets
    before, after = content(tmp_path / "one" / artifact), content(tmp_path / "two" / artifact)
    apply(tmp_path / "patch", tmp_path / "one" / artifact)
    assert content(tmp_path / "one" / artifact) == after
    apply(tmp_path / "patch", tmp_path / "one" / artifact, reverse=True)
    assert content(tmp_path / "one" / artifact) == before


@pytest.mark.parametrize("force", [False, True])
def test_what_stands_beside_the_output_is_kept(force: bool, pair: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "new" / "model.gguf.manifest.json"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    with pytest.raises(InputError, match="only what this program made" if force else "exists already"):
        apply(pair / "gguf.patch", pair / "one" / "model.gguf", theirs.parent / "model.gguf", force=force)
    assert content(theirs.parent) == {theirs.name: b"mine"}


@pytest.mark.parametrize(("group", "most"), [(32, 0.12), (64, 0.08), (128, 0.04)])
def test_a_group_is_stored_once_however_many_blocks_it_has(
    group: int, most: float, tiny_model: Path, tmp_path: Path
) -> None:
    """Against the bytes of the quantized tensors: the tiny model's embedding is not small beside them."""
    base = make_tiny_canonical(tmp_path / "base.qalora", tiny_model, group=group)
    for seed in (0, 1):
        export_gguf(moved(base, tmp_path / f"{seed}.qalora", seed), tmp_path / f"{seed}.gguf")
    report = export_patch(tmp_path / "0.gguf", tmp_path / "1.gguf", tmp_path / "patch")
    weights = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256)
    assert report.offsets == weights // group
    assert 0.9 * report.offsets < report.moved <= report.offsets
    names = 4000  # bytes of table and manifests
    assert report.nbytes - names <= most * weights * 20 / 32


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    width=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from([FLOAT, INT]),
    repeat=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 5),
)
def test_differences_are_those_of_the_slow_way(data: Any, width: int, kind: str, repeat: int, groups: int) -> None:
    top = 1 << (8 * width)
    sides = [data.draw(st.lists(st.integers(0, top - 1), min_size=groups, max_size=groups)) for _ in range(2)]

    def ordered(value: int) -> int:
        sign = top >> 1
        return value if kind == INT else top - 1 - value if value & sign else value | sign

    planes = [bytearray() for _ in range(width)]
    for old, new in zip(*sides, strict=True):
        step = (ordered(new) - ordered(old)) % top
        folded = 2 * step if step < top >> 1 else 2 * (top - step) - 1
        for plane, byte in zip(planes, folded.to_bytes(width, "little"), strict=True):
            plane.append(byte)

    def blocks(values: list[int]) -> np.ndarray:
        rows = [b"\7" + value.to_bytes(width, "little") + b"\1" for value in values for _ in range(repeat)]
        return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, width + 2)

    old, new, fields = blocks(sides[0]), blocks(sides[1]), [(1, width, kind, repeat)]
    raw = differences(old, new, fields)
    assert raw == b"".join(map(bytes, planes))
    assert np.array_equal(with_differences(old, raw, fields, reverse=False), new)
    assert np.array_equal(with_differences(new, raw, fields, reverse=True), old)


def test_other_codes_are_no_fine_tune_of_this_base(tiny_canonical: Path, pair: Path, tmp_path: Path) -> None:
    export_all(moved(tiny_canonical, tmp_path / "other.qalora", 2, codes=1), tmp_path / "other")
    for artifact, tensor in (("model.gguf", "blk.0."), ("onnx", "model.layers.0.")):
        with pytest.raises(InputError, match="not fine-tunes of one base") as caught:
            export_patch(pair / "one" / artifact, tmp_path / "other" / artifact, tmp_path / "patch")
        assert tensor in caught.value.where
        assert not (tmp_path / "patch").exists()


def test_what_is_no_pair_is_refused(tiny_canonical: Path, pair: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are equal"):
        export_patch(pair / "one" / "onnx", pair / "one" / "onnx", tmp_path / "patch")
    with pytest.raises(InputError, match="no two artifacts of one kind"):
        export_patch(pair / "one" / "onnx", pair / "one" / "model.gguf", tmp_path / "patch")
    for folder, what in ((tiny_canonical, "a checkpoint is not what devices have"), (tmp_path, "no exported model")):
        with pytest.raises(InputError, match=what) as caught:
            export_patch(folder, pair / "one" / "onnx", tmp_path / "patch")
        assert "export gguf" in caught.value.fix


@pytest.mark.parametrize("artifact", KINDS)
def test_nothing_changes_where_the_patch_is_for_something_else(artifact: str, pair: Path, tmp_path: Path) -> None:
    patch, target = pair / f"{KINDS[artifact]}.patch", copied(pair / "two" / artifact, tmp_path)
    with pytest.raises(InputError, match="already"):
        apply(patch, target)
    inside = target / "onnx" / "model.onnx_data" if target.is_dir() else target
    damaged = bytearray(inside.read_bytes())
    damaged[-1] ^= 1
    inside.write_bytes(damaged)
    before = content(target)
    with pytest.raises(InputError, match="is neither what the patch changes nor what it makes"):
        apply(patch, target, reverse=True)
    assert content(target) == before
    other = next(name for name in KINDS if name != artifact)
    with pytest.raises(InputError, match="the patch is for a"):
        apply(pair / f"{KINDS[other]}.patch", target)


def changed(patch: Path, out: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    with zipfile.ZipFile(patch) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, raw in members.items():
            archive.writestr(zipfile.ZipInfo(name), raw)
    return out


def _table(**entries: Any) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        members[TABLE] = json.dumps(json.loads(members[TABLE]) | entries).encode()

    return change


def _other_stream(members: dict[str, bytes]) -> None:
    name = max((name for name in members if name != TABLE), key=lambda name: len(members[name]))
    raw = bytearray(lzma.decompress(members[name]))
    raw[0] ^= 1
    members[name] = lzma.compress(raw, lzma.FORMAT_XZ)


BOMB = lzma.compress(bytes(1 << 22), lzma.FORMAT_XZ, preset=0)
HOSTILE = {
    "a path outside": _table(same={"../../etc/passwd": "0" * 64}),
    "an absolute path": _table(same={"/etc/passwd": "0" * 64}),
    "another format": _table(format="qalora-patch/9"),
    "no files": _table(files=7),
    "a stream less": lambda members: members.pop("0.xz"),
    "a stream that is none": lambda members: members.update({"0.xz": b"nothing"}),
    "a stream with other numbers": _other_stream,
    "a bomb": lambda members: members.update(dict.fromkeys(set(members) - {TABLE}, BOMB)),
}


@pytest.mark.parametrize("artifact", KINDS)
@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_or_hostile_patch_changes_nothing(what: str, artifact: str, pair: Path, tmp_path: Path) -> None:
    patch = changed(pair / f"{KINDS[artifact]}.patch", tmp_path / "patch", HOSTILE[what])
    (tmp_path / "here").mkdir()
    target = copied(pair / "one" / artifact, tmp_path / "here")
    with pytest.raises(UnsafeInputError):
        apply(patch, target)
    assert content(target) == expected(pair / "one" / artifact)
    assert sorted(p.name for p in (tmp_path / "here").iterdir() if "patch" in p.name) == []


def test_whatever_is_damaged_is_one_protocol_error(pair: Path, tmp_path: Path) -> None:
    """Cut short, or bytes changed anywhere and in the archive's directory: some mean nothing, no other error."""
    raw, random = (pair / "gguf.patch").read_bytes(), np.random.default_rng(0)
    refused = 0
    for number in range(400):
        content = bytearray(raw)
        begin = 0 if number % 2 else max(0, len(raw) - 3000)
        for at in random.integers(begin, len(raw), random.integers(1, 6)):
            content[at] = random.integers(0, 256)
        (tmp_path / "patch").write_bytes(content[: random.integers(len(raw))] if number % 5 == 0 else content)
        try:
            patch = PatchFile(tmp_path / "patch")
            for file in patch.table.files:
                source = beside(pair / "one" / "model.gguf", file.path)
                for _ in patch.other_side(file, source, reverse=False):
                    pass
        except ProtocolError:
            refused += 1
    assert refused > 350


def test_a_stream_gives_the_bytes_it_should_and_not_one_more() -> None:
    stream = lzma.compress(b"12345", lzma.FORMAT_XZ)
    assert decompress(stream, 5) == b"12345"
    for size in (0, 4, 6):
        with pytest.raises(ProtocolError):
            decompress(stream, size)
    with pytest.raises(ProtocolError):
        decompress(stream[:-8], 5)


def test_a_file_that_was_half_done_is_finished(pair: Path, tmp_path: Path) -> None:
    """Ended between the two renames: the model is the new one, its manifest the old one."""
    target = copied(pair / "one" / "model.gguf", tmp_path)
    shutil.copyfile(pair / "two" / "model.gguf", target)
    elsewhere = tmp_path / "elsewhere" / "model.gguf"
    apply(pair / "gguf.patch", target, elsewhere)
    assert content(elsewhere) == expected(pair / "two" / "model.gguf")
    shutil.rmtree(elsewhere.parent)
    assert apply(pair / "gguf.patch", target).files == 1
    assert content(target) == expected(pair / "two" / "model.gguf")


@pytest.mark.parametrize("artifact", KINDS)
def test_what_fails_at_the_last_step_leaves_the_old_artifact_whole(
    artifact: str, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    target = copied(pair / "one" / artifact, tmp_path)
    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(patching, "_exchange", full)
    with pytest.raises(OSError, match="No space"):
        patching.apply_patch(pair / f"{KINDS[artifact]}.patch", target)
    assert content(target) == expected(pair / "one" / artifact)
    assert not [path for path in tmp_path.iterdir() if patching.MARK in path.name]


def test_without_an_exchange_in_one_step_a_killed_run_is_put_right(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patching.sys, "platform", "elsewhere")
    target = copied(pair / "one" / "onnx", tmp_path)
    patching.apply_patch(pair / "onnx.patch", target)
    assert content(target) == expected(pair / "two" / "onnx")
    target.rename(tmp_path / f".onnx{patching.MARK}-old")  # killed between its two renames
    shutil.copytree(pair / "one" / "onnx", tmp_path / f".onnx{patching.MARK}")
    patching.apply_patch(pair / "onnx.patch", target, reverse=True)
    assert content(target) == expected(pair / "one" / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_the_device_says_what_it_has_now(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = copied(pair / "one" / "model.gguf", tmp_path)
    assert main(["apply", str(pair / "gguf.patch"), str(target)]) == 0
    assert "is model.gguf now" in capsys.readouterr().out
    assert main(["apply", str(pair / "gguf.patch"), str(target)]) == 2
    assert "already" in capsys.readouterr().err
    assert main(["apply", str(pair / "gguf.patch"), str(target), "--reverse"]) == 0
    assert content(target) == expected(pair / "one" / "model.gguf")
