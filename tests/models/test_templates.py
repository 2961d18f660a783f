"""Chat templates that come with a model: rendered as Transformers does, and brought to an end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from qalora_export.data.samples import load_samples
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.models.loading import load_tokenizer

CHAT = [{"role": "user", "content": "é\n\U0001f642"}, {"role": "assistant", "content": "b"}]
LOOPS = "{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3
ENDLESS = {
    "nested loops": LOOPS,
    "a long text": "{{ 'a' * 10**9 }}",
    "a long number": "{{ (9 ** (9 ** 9)) | string | length }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "words": "{{ lipsum(n=10000000) }}",
}


def test_a_good_template_renders_as_in_transformers(tiny_model: Path) -> None:
    bounded, plain = load_tokenizer(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    for options in ({"tokenize": False}, {"tokenize": False, "add_generation_prompt": True}):
        assert bounded.apply_chat_template(CHAT, **options) == plain.apply_chat_template(CHAT, **options)
    ids = plain.apply_chat_template(CHAT, return_dict=True)
    assert bounded.apply_chat_template(CHAT, return_dict=True) == dict(ids)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_unsafe_input_that_names_it(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qalora_export.safety.confined.SECONDS", 0.5)
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(ENDLESS[name])
    with pytest.raises(UnsafeInputError, match="chat template") as caught:
        load_tokenizer(folder).apply_chat_template(CHAT, tokenize=False)
    assert str(folder) in caught.value.where


@pytest.mark.parametrize(
    "template", ["{% include 'x' %}", "{{ 1 / 0 }}", "{% if", "{{ " + "(" * 3000 + ")" * 3000 + " }}"]
)
def test_a_broken_template_is_bad_input(template: str, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = template
    with pytest.raises(InputError) as caught:
        tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert isinstance(caught.value, TemplateError)  # so that a caller who knows the line can say it


def test_what_a_template_refuses_names_the_line_of_the_data(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('\x1b[31mno roles\x1b[0m') }}")
    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n', encoding="utf-8"
    )
    with pytest.raises(InputError, match="line 1") as caught:
        load_samples(data, load_tokenizer(folder), sequence_length=64)
    assert "no roles" in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_byte_order_mark_is_refused_and_not_rendered(tiny_model: Path, tmp_path: Path) -> None:
    from qalora_export.formats.gguf.tokenizer.fields import tokenizer_entries

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    template = folder / "chat_template.jinja"
    template.write_text("\ufeff" + template.read_text(encoding="utf-8"), encoding="utf-8")
    for read in (load_tokenizer, lambda place: tokenizer_entries(place, {"vocab_size": 512})):
        with pytest.raises(InputError, match="byte order mark"):
            read(folder)
