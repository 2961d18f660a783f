"""job.npz and logits.npz: round trip, and every malformed file is one ProtocolError."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qalora_runtimes.arrays import ProtocolError
from qalora_runtimes.protocol import (
    MAX_POSITIONS,
    MODES,
    Job,
    TextRequest,
    make_job,
    read_answers,
    read_job,
    write_answers,
    write_job,
)

GOOD = {"ids": np.arange(5, dtype=np.int32), "lengths": np.array([2, 3], np.int32), "mode": np.array("prefill")}
TEXT = {"texts": ["a"], "chats": [[{"role": "user", "content": "b"}]]}


def as_bytes(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    mode=st.sampled_from(list(MODES)),
    texts=st.lists(st.text(st.characters(exclude_categories=()), max_size=20), max_size=3),
)
def test_a_job_survives_the_round_trip(tmp_path_factory, lengths, mode, texts):
    path = tmp_path_factory.mktemp("job") / "job.npz"
    request = TextRequest(tuple(texts), (({"role": "user", "content": "hé 🙂"},),))
    job = make_job([range(length) for length in lengths], mode, request)
    write_job(path, job)
    back = read_job(path)
    assert (back.mode, back.text, back.total, back.longest) == (mode, request, sum(lengths), max(lengths))
    assert all(np.array_equal(a, b) for a, b in zip(back.sequences, job.sequences, strict=True))


def test_a_job_written_by_numpy_alone_is_read(tmp_path: Path):
    np.savez(tmp_path / "job.npz", **GOOD, text=as_bytes(TEXT))
    job = read_job(tmp_path / "job.npz")
    assert [ids.tolist() for ids in job.sequences] == [[0, 1], [2, 3, 4]]
    assert job.text == TextRequest(("a",), (({"role": "user", "content": "b"},),))


BAD = {
    "missing lengths": {"lengths": None},
    "unknown array": {"surprise": np.zeros(1)},
    "ids of another type": {"ids": np.arange(5, dtype=np.int64)},
    "ids of two dimensions": {"ids": np.zeros((5, 1), np.int32)},
    "lengths that do not add up": {"lengths": np.array([2, 2], np.int32)},
    "a length of zero": {"lengths": np.array([0, 5], np.int32)},
    "lengths that overflow int32": {"lengths": np.array([2**31 - 1] * 2 + [7], np.int32)},
    "no sequence": {"ids": np.zeros(0, np.int32), "lengths": np.zeros(0, np.int32)},
    "a negative id": {"ids": np.array([0, 1, -1, 2, 3], np.int32)},
    "an unknown mode": {"mode": np.array("neither")},
    "a mode that is a list": {"mode": np.array(["prefill"])},
    "a mode that is a number": {"mode": np.array(1)},
    "pickled objects": {"mode": np.array({"a": 1}, dtype=object)},
    "text that is no JSON": {"text": np.frombuffer(b"{", np.uint8)},
    "text that is no object": {"text": as_bytes([1])},
    "texts that are numbers": {"text": as_bytes({"texts": [1]})},
    "a chat that is no list": {"text": as_bytes({"chats": ["hello"]})},
    "a chat turn with a number": {"text": as_bytes({"chats": [[{"role": 1}]]})},
    "text of another type": {"text": np.zeros(3, np.float32)},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD.keys())
def test_a_malformed_job_is_refused(tmp_path: Path, changes: dict):
    arrays = {name: value for name, value in (GOOD | changes).items() if value is not None}
    np.savez(tmp_path / "job.npz", **arrays)
    with pytest.raises(ProtocolError):
        read_job(tmp_path / "job.npz")


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_no_job_is_refused(tmp_path: Path, data: bytes):
    (tmp_path / "job.npz").write_bytes(data)
    with pytest.raises(ProtocolError):
        read_job(tmp_path / "job.npz")
    with pytest.raises(ProtocolError):
        read_job(tmp_path / "absent.npz")


def test_a_header_that_promises_more_than_the_file_holds_is_refused_before_allocation(tmp_path: Path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i4", "fortran_order": False, "shape": (1 << 60,)})
    np.savez(tmp_path / "job.npz", **{name: GOOD[name] for name in ("lengths", "mode")})
    with zipfile.ZipFile(tmp_path / "job.npz", "a") as archive:
        archive.writestr("ids.npy", header.getvalue() + bytes(20))
    with pytest.raises(ProtocolError, match="declares"):
        read_job(tmp_path / "job.npz")


def test_two_arrays_of_one_name_are_refused(tmp_path: Path):
    np.savez(tmp_path / "job.npz", **GOOD)
    with zipfile.ZipFile(tmp_path / "job.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("ids.npy", b"")
    with pytest.raises(ProtocolError, match="holds"):
        read_job(tmp_path / "job.npz")


def test_limits_hold_for_jobs_made_in_memory():
    with pytest.raises(ProtocolError, match="limit"):
        Job((np.zeros(MAX_POSITIONS + 1, np.int32),))
    with pytest.raises(ProtocolError, match="at least one"):
        make_job([[]])


def test_answers_survive_the_round_trip(tmp_path: Path):
    logprobs = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    logprobs[1, 2] = np.nan
    write_answers(tmp_path / "logits.npz", [logprobs], {"texts": [[1, 2]]})
    back = read_answers(tmp_path / "logits.npz", positions=4)
    assert back.logprobs.tobytes() == logprobs.tobytes()
    assert (back.decoded, back.text) == (None, {"texts": [[1, 2]]})
    assert [path.name for path in tmp_path.iterdir()] == ["logits.npz"]
    with pytest.raises(ProtocolError, match="expected float32"):
        read_answers(tmp_path / "logits.npz", positions=5)
    write_answers(tmp_path / "logits.npz", iter([logprobs, logprobs + 1]))
    both = read_answers(tmp_path / "logits.npz", positions=4)
    assert both.decoded is not None
    assert (both.logprobs.tobytes(), both.decoded.tobytes()) == (logprobs.tobytes(), (logprobs + 1).tobytes())
    write_answers(tmp_path / "logits.npz", [logprobs, logprobs[:3]])
    with pytest.raises(ProtocolError, match="decoded is float32"):
        read_answers(tmp_path / "logits.npz", positions=4)
