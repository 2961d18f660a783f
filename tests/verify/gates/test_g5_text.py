"""Gate G5 tells a difference that GGUF cannot avoid, on the texts that show it, from every other difference."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qalora_runtimes.launch import run_runner
from qalora_runtimes.protocol import TextRequest, make_job

from qalora_export.errors import InputError
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.tokenizer.fields import tokenizer_entries
from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED, O200K
from qalora_export.verify.gates.g5_text import expected_answers, text_entry
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.probes.text import CHATS, TOOL_CHATS
from qalora_export.verify.reference.text import folder_answers
from qalora_export.verify.runtimes.record import TextHabits, all_runtimes
from tests.formats.gguf.llama_vocab import llama_ids
from tests.formats.gguf.tokenizer.synthetic import byte_level, with_bos, write_vocabulary
from tests.formats.onnx.genai_text.asking import genai_ids
from tests.models import make_tiny_canonical

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
    assert "1 differ by design (llama.cpp does not normalize to NFC)" in entry.detail
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


# As Qwen 2.5 writes tools and calls; arguments are an object.
TOOL_TEMPLATE = """{{ bos_token }}{%- if tools %}<|user|>system
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|end|>{% endif %}
{%- for message in messages %}<|user|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|user|>assistant
{% endif %}"""


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template_has_bos", [True, False])
def test_conversations_have_the_bos_that_transformers_gives_them(
    adds_bos: bool, template_has_bos: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """Tools, calls and their results are rendered alike; BOS is there once, where the template puts it."""
    source = shutil.copytree(tiny_model, tmp_path / "hf")
    template = TOOL_TEMPLATE if template_has_bos else TOOL_TEMPLATE.removeprefix("{{ bos_token }}")
    (source / "chat_template.jinja").write_text(template)
    if not adds_bos:
        raw = json.loads((source / "tokenizer.json").read_text())
        (source / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": None}))
    checkpoint = make_tiny_canonical(tmp_path / "c", source)
    export_gguf(checkpoint, tmp_path / "m.gguf")
    probes = ProbeSet(np.zeros(1, np.int32), np.ones(1, np.int32), ("",), texts=("on",), chats=(*CHATS, *TOOL_CHATS))
    job = make_job([[1]], text=TextRequest(probes.texts, probes.chats))
    result = run_runner("llama.cpp", model=tmp_path / "m.gguf", job=job, workdir=tmp_path / "run", exact=True)
    assert result.text_answers is not None, result.message
    expected = expected_answers(folder_answers(checkpoint, probes), all_runtimes()["llama.cpp"].habits)
    assert expected["rendered"] == result.text_answers["rendered"]
    entry = text_entry("llama.cpp", probes, expected, result.text_answers)
    if adds_bos and not template_has_bos:  # llama.cpp puts one before every prompt
        assert entry.status == "fail"
        assert "begin the chat template with {{ bos_token }}" in entry.where[0]
    else:
        assert entry.status == "pass", entry.where


def test_a_runtime_that_rewrites_tools_is_warned_about_and_nothing_else_is_excused() -> None:
    right = {"texts": [], "plain_texts": [], "rendered": ["a", "b"], "rendered_ids": [[1], [2]], "bos": ""}
    right |= {"by_design": {}, "by_permission": {}, "genai": {}, "with_tools": [1]}
    probes = replace(PROBES, texts=(), chats=(CHATS[0], TOOL_CHATS[0]))

    def status(habits: TextHabits, **answers: Any) -> Any:
        return text_entry("r", probes, expected_answers(right, habits), {"texts": [], **answers})

    rewrites = TextHabits(rewrites_tools=True)
    entry = status(rewrites, rendered=["a", "other"], rendered_ids=[[1], [3]])
    assert entry.status == "pass"
    assert "tools in its own way" in entry.detail
    assert status(rewrites, rendered=["other", "b"], rendered_ids=[[3], [2]]).status == "fail"
    assert status(rewrites, rendered=["a", None], rendered_ids=[[1], None]).status == "fail"
    assert status(rewrites, rendered=["a", "b"], rendered_ids=[[1], [3]]).status == "fail"
    assert status(TextHabits(), rendered=["a", "other"], rendered_ids=[[1], [3]]).status == "fail"


def test_words_cut_elsewhere_pass_only_where_the_user_accepted_them(tmp_path: Path, tiny_model: Path) -> None:
    """o200k: refused by the export, or exported with a note in the file; then G5 holds llama.cpp to its own form."""
    source = shutil.copytree(tiny_model, tmp_path / "hf")
    raw = byte_level((O200K,))
    (source / "tokenizer.json").write_text(json.dumps(with_bos(raw, "<s>")))
    special = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(special))
    (source / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="--allow-text-differences"):
        tokenizer_entries(source, {"vocab_size": 1024})
    entries = tokenizer_entries(source, {"vocab_size": 1024}, allow_text_differences=True)
    vocabulary = write_vocabulary(tmp_path / "v.gguf", entries)
    assert all_runtimes()["llama.cpp"].text_differences_accepted(vocabulary)

    probes = replace(PROBES, texts=("plain words", "NA\u0303O ÉCOLE สวัสดี हिन्दी"))
    answers = folder_answers(source, probes)
    found = {"texts": llama_ids(vocabulary, probes.texts), "rendered": [], "rendered_ids": []}
    assert found["texts"][0] == answers["texts"][0]
    accepted = text_entry("llama.cpp", probes, expected_answers(answers, GGUF, accepted=True), found)
    assert accepted.status == "pass"
    assert "cut as llama.cpp's gpt-4o cuts them" in accepted.detail
    assert text_entry("llama.cpp", probes, expected_answers(answers, GGUF), found).status == "fail"
    found["texts"][1] = found["texts"][1][::-1]
    assert text_entry("llama.cpp", probes, expected_answers(answers, GGUF, accepted=True), found).status == "fail"


GENAI = TextHabits(adds_specials=False, reads_as_genai=True)
ODD = "x\n    \n    y"  # GenAI does not find the second line end


def genai_folder(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    raw, settings = byte_level(NAMED["llama-bpe"].splits), {"tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, raw, settings


def genai_gate(folder: Path, ids: list[list[int]], *, ordinary: tuple[str, ...], accepted: bool = False) -> Any:
    probes = replace(PROBES, texts=("plain", ODD), ordinary=frozenset(ordinary))
    expected = expected_answers(folder_answers(folder, probes), GENAI, accepted=accepted)
    return text_entry("onnxruntime-genai", probes, expected, {"texts": ids, "rendered": [], "rendered_ids": []})


def test_genais_own_ids_are_a_warning_on_odd_text_and_need_permission_on_ordinary_text(tmp_path: Path) -> None:
    folder, raw, settings = genai_folder(tmp_path)
    found = genai_ids(tmp_path / "onnx", raw, settings, ["plain", ODD])
    assert found != folder_answers(folder, replace(PROBES, texts=("plain", ODD)))["plain_texts"]
    odd = genai_gate(folder, found, ordinary=("plain",))
    assert odd.status == "pass"
    assert "1 differ by design (GenAI cuts white space" in odd.detail
    ordinary = genai_gate(folder, found, ordinary=("plain", ODD))
    assert ordinary.status == "fail"
    assert "export onnx --allow-text-differences accepts it" in ordinary.where[0]
    assert genai_gate(folder, found, ordinary=("plain", ODD), accepted=True).status == "pass"


def test_other_ids_than_the_predicted_ones_fail_in_genai_even_when_accepted(tmp_path: Path) -> None:
    folder, raw, settings = genai_folder(tmp_path)
    plain, odd = genai_ids(tmp_path / "onnx", raw, settings, ["plain", ODD])
    for wrong in ([[*plain, 1], odd], [plain, [*odd, 1]], [plain]):
        entry = genai_gate(folder, wrong, ordinary=(), accepted=True)
        assert entry.status == "fail"
        assert "accepts it" not in entry.where[0]
