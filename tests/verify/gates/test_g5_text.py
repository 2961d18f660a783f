"""Gate G5 tells a difference that GGUF cannot avoid, on the texts that show it, from every other difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qalora_export.verify.gates.g5_text import expected_answers, text_entry
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.text import folder_answers
from qalora_export.verify.runtimes.record import TextHabits
from tests.formats.gguf.tokenizer.synthetic import byte_level

GGUF = TextHabits(reads_gguf=True)
PROBES = ProbeSet(np.zeros(1, np.int32), np.ones(1, np.int32), ("x",), texts=("plain", "cafe\u0301"), chats=())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    raw = byte_level((r"\p{N}",)) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


def unnormalized(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    raw = json.loads((folder / "tokenizer.json").read_text())
    ids: list[int] = Tokenizer.from_str(json.dumps(raw | {"normalizer": None})).encode(text).ids
    return ids


def gate(folder: Path, habits: TextHabits, texts: list[list[int]]) -> Any:
    expected = expected_answers(folder_answers(folder, PROBES), habits)
    return text_entry("llama.cpp", PROBES, expected, {"texts": texts, "rendered": [], "rendered_ids": []})


def test_ids_without_nfc_on_a_text_that_nfc_changes_are_a_warning(folder: Path) -> None:
    right = folder_answers(folder, PROBES)["texts"]
    entry = gate(folder, GGUF, [right[0], unnormalized(folder, PROBES.texts[1])])
    assert entry.status == "pass"
    assert "1 of the texts differ by design (llama.cpp does not normalize to NFC)" in entry.detail
    assert len(entry.figures["warnings"]) == 1


def test_any_other_ids_on_such_a_text_fail(folder: Path) -> None:
    right = folder_answers(folder, PROBES)["texts"]
    assert gate(folder, GGUF, [right[0], [*unnormalized(folder, PROBES.texts[1]), 1]]).status == "fail"


def test_a_difference_on_a_text_that_nfc_leaves_alone_fails(folder: Path) -> None:
    right = folder_answers(folder, PROBES)["texts"]
    assert gate(folder, GGUF, [[*right[0], 1], right[1]]).status == "fail"


def test_a_runtime_that_reads_tokenizer_json_has_no_such_excuse(folder: Path) -> None:
    right = folder_answers(folder, PROBES)["texts"]
    habits = replace(GGUF, reads_gguf=False)
    assert gate(folder, habits, [right[0], unnormalized(folder, PROBES.texts[1])]).status == "fail"
    assert gate(folder, habits, right).status == "pass"
