"""The probe set: big enough, deterministic, and made of what the user and the edge cases give."""

import json
from pathlib import Path

import numpy as np
import pytest

from qalora_export.errors import InputError
from qalora_export.models.loading import load_tokenizer
from qalora_export.recipe import VerifySettings
from qalora_export.verify.probes.probe_set import ProbeSet, _vocabulary_texts, make_probes
from qalora_export.verify.probes.text import CHATS, TOOL_CHATS


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> dict:
    return json.loads((tiny_model / "config.json").read_text())


def prompts_file(folder: Path, count: int = 200) -> Path:
    path = folder / "prompts.jsonl"
    turns = [(f"lamp {i} on", f'{{"n":{i}}}') for i in range(count)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_size_bounds_and_ids(tokenizer, config: dict, tmp_path: Path) -> None:
    settings = VerifySettings(prompts=str(prompts_file(tmp_path)), sequences=40, positions=1500, max_length=64)
    probes = make_probes(tokenizer, config, settings)
    assert len(probes.lengths) >= 40
    assert probes.ids.size == probes.lengths.sum() >= 1500
    assert probes.lengths.max() == 64
    assert probes.lengths.min() == 1
    assert probes.ids.min() >= 0
    assert probes.ids.max() == config["vocab_size"] - 1
    assert len(set(probes.names)) == len(probes.names)
    for case in (
        "single BOS",
        "one token",
        "special tokens",
        "vocabulary ends",
        "near max_length",
        "unicode",
        "digits",
    ):
        assert case in probes.names
    assert sum(name.startswith("prompt ") for name in probes.names) > 10


def test_same_seed_same_probe_and_another_seed_another(tokenizer, config: dict, tmp_path: Path) -> None:
    prompts = str(prompts_file(tmp_path))
    first, again, other = (make_probes(tokenizer, config, VerifySettings(prompts=prompts, seed=s)) for s in (0, 0, 1))
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256


def test_without_prompts_random_ids_fill_up(tokenizer, config: dict) -> None:
    probes = make_probes(tokenizer, config, VerifySettings())
    assert probes.ids.size >= 1000
    assert any(name.startswith("random ") for name in probes.names)


def test_chats_go_through_the_template(tokenizer, config: dict, tmp_path: Path) -> None:
    probes = make_probes(tokenizer, config, VerifySettings(prompts=str(prompts_file(tmp_path, 3))))
    texts = [
        tokenizer.decode(ids) for ids, name in zip(probes.sequences(), probes.names, strict=True) if "prompt" in name
    ]
    assert len(texts) == 3
    assert all(text.startswith("<|begin_of_text|><|user|>") and "<|assistant|>" in text for text in texts)


def test_conversations_are_those_that_the_template_accepts(tokenizer, config: dict) -> None:
    """Tools for a template that knows of tools; no turn that it refuses; all turns if it refuses every one."""
    loop = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + loop
    before = tokenizer.chat_template
    try:
        chats = {}
        for name, template in (
            ("plain", loop),
            ("tools", "{% if tools %}{{ tools | tojson }}{% endif %}" + loop),
            ("no system", no_system),
            ("nothing", "{{ raise_exception('never') }}"),
        ):
            tokenizer.chat_template = template
            chats[name] = make_probes(tokenizer, config, VerifySettings()).chats
    finally:
        tokenizer.chat_template = before
    assert chats["plain"] == chats["nothing"] == CHATS
    assert chats["tools"] == (*CHATS, *TOOL_CHATS)
    assert len(chats["no system"]) == len(CHATS) - 1


def test_lines_that_nfc_changes_are_in_texts_of_their_own() -> None:
    class Words:
        """Two tokens, of which one is not in NFC."""

        all_special_ids = ()

        def __len__(self) -> int:
            return 2

        def get_added_vocab(self) -> dict:
            return {}

        def batch_decode(self, ids: list) -> list[str]:
            return ["lamp", "e\u0301"]

    assert list(_vocabulary_texts(Words())) == ["lamp\nlamplamp", "e\u0301\ne\u0301e\u0301"]


def test_every_added_token_is_asked_for_inside_words_and_doubled(tokenizer, config: dict) -> None:
    texts = "".join(make_probes(tokenizer, config, VerifySettings()).texts)
    for token in tokenizer.get_added_vocab():
        assert f"a{token}b {token} c{token}{token}\n" in texts


def test_place_names_sequence_and_index() -> None:
    probes = ProbeSet(np.arange(5, dtype=np.int32), np.array([2, 3], np.int32), ("a", "b"))
    assert [probes.place(i) for i in range(5)] == ["a[0]", "a[1]", "b[0]", "b[1]", "b[2]"]


def test_a_context_too_short_is_refused(tokenizer, config: dict) -> None:
    with pytest.raises(InputError, match="too short"):
        make_probes(tokenizer, config, VerifySettings(max_length=4))
