import json
from pathlib import Path

import numpy as np
import pytest

from qalora_export.data.calibration import calibration_windows
from qalora_export.errors import InputError
from qalora_export.models.loading import load_tokenizer
from tests.models import TEXT


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return load_tokenizer(tiny_model)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_windows_are_drawn_by_seed_without_replacement(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "text.txt", TEXT)
    windows = calibration_windows(path, tokenizer, samples=5, length=64, seed=3)
    assert windows.shape == (5, 64)
    assert windows.dtype == np.int64
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    body = tokenizer(TEXT, add_special_tokens=False).input_ids
    every = {tuple(body[i : i + 63]) for i in range(0, len(body) - 62, 63)}
    assert {tuple(row[1:]) for row in windows} <= every
    assert np.array_equal(windows, calibration_windows(path, tokenizer, samples=5, length=64, seed=3))
    assert not np.array_equal(windows, calibration_windows(path, tokenizer, samples=5, length=64, seed=4))


def test_a_short_text_gives_one_short_window(tmp_path: Path, tokenizer) -> None:
    windows = calibration_windows(write(tmp_path / "a.txt", TEXT[:400]), tokenizer, samples=9, length=4096, seed=0)
    assert windows.shape == (1, 1 + len(tokenizer(TEXT[:400], add_special_tokens=False).input_ids))


def test_jsonl_of_texts_and_chats(tmp_path: Path, tokenizer) -> None:
    chat = [{"role": "user", "content": TEXT[:200]}, {"role": "assistant", "content": TEXT[:300]}]
    lines = [json.dumps({"text": TEXT[:250]}), "", json.dumps({"messages": chat})]
    path = write(tmp_path / "data.jsonl", "\n".join(lines))
    windows = calibration_windows(path, tokenizer, samples=1, length=4096, seed=0)
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    expected = [tokenizer.bos_token_id]
    for text in (TEXT[:250], rendered):
        expected += tokenizer(text, add_special_tokens=False).input_ids
    assert windows[0].tolist() == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "empty"),
        ("a.txt", " \n\n ", "empty"),
        ("a.jsonl", "\n", "empty"),
        ("a.txt", "too short", "only . tokens"),
        ("a.jsonl", '{"text": "fine"}\n{"text": \n', r"not valid JSON.*a\.jsonl, line 2"),
        ("a.jsonl", '{"text": "fine"}\n\n[1]\n', r"not a JSON object.*a\.jsonl, line 3"),
        ("a.jsonl", '{"messages": ["hello"]}', r"message 1 needs a string 'role'.*a\.jsonl, line 1"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path: Path, tokenizer, name: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibration_windows(write(tmp_path / name, content), tokenizer, samples=1, length=64, seed=0)


def test_missing_or_binary_files_are_refused(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(InputError, match="not found"):
        calibration_windows(tmp_path / "none.txt", tokenizer, samples=1, length=64, seed=0)
    (tmp_path / "b.txt").write_bytes(b"\xff\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        calibration_windows(tmp_path / "b.txt", tokenizer, samples=1, length=64, seed=0)


def test_chats_need_a_template(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = None
    path = write(tmp_path / "a.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(InputError, match="no chat template"):
        calibration_windows(path, tokenizer, samples=1, length=64, seed=0)


def test_a_sequence_length_without_room_is_refused(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(InputError, match="leaves no room"):
        calibration_windows(write(tmp_path / "a.txt", TEXT), tokenizer, samples=1, length=1, seed=0)
