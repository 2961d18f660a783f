"""tokenizer.json → GGUF entries; whatever llama.cpp would do differently is refused with what was found."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qalora_export.errors import InputError
from qalora_export.formats.gguf.tokenizer.alphabet import byte_alphabet
from qalora_export.formats.gguf.tokenizer.fields import name_for_llama_cpp, tokenizer_entries
from qalora_export.formats.gguf.tokenizer.pretokenizer import identify


def entries(folder: Path) -> dict:
    config = json.loads((folder / "config.json").read_text())
    return {
        entry.key.removeprefix("tokenizer.").removeprefix("ggml."): entry.value
        for entry in tokenizer_entries(folder, config)
    }


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict], None]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def replace_token(folder: Path, index: int, text: str) -> None:
    """Give id `index` of the vocabulary another text; merges that made the old one go."""

    def change(raw: dict) -> None:
        vocab = raw["model"]["vocab"]
        old = next(token for token, number in vocab.items() if number == index)
        raw["model"]["vocab"] = {text if token == old else token: number for token, number in vocab.items()}
        raw["model"]["merges"] = [rule for rule in raw["model"]["merges"] if old not in ("".join(rule), *rule)]

    edit(folder / "tokenizer.json", change)


def test_the_sample_tokenizer(folder: Path) -> None:
    found, raw = entries(folder), json.loads((folder / "tokenizer.json").read_text())
    assert (found["model"], found["pre"]) == ("gpt2", "llama-bpe")
    assert [found["tokens"][index] for index in raw["model"]["vocab"].values()] == list(raw["model"]["vocab"])
    special = {token["content"]: token["id"] for token in raw["added_tokens"]}
    assert [index for index, kind in enumerate(found["token_type"]) if kind == 3] == sorted(special.values())
    assert found["merges"] == [" ".join(pair) for pair in raw["model"]["merges"]]
    assert found["bos_token_id"] == special["<|begin_of_text|>"]
    assert found["eos_token_id"] == special["<|end|>"]
    assert found["padding_token_id"] == special["<|pad|>"]
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)
    assert found["chat_template"] == (folder / "chat_template.jinja").read_text()


def test_the_vocabulary_is_padded_to_the_embedding(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(vocab_size=config["vocab_size"] + 3))
    found = entries(folder)
    assert found["token_type"][-3:] == [5, 5, 5]
    assert len(set(found["tokens"])) == len(found["tokens"])


def test_a_second_end_token_becomes_end_of_turn(folder: Path) -> None:
    edit(folder / "generation_config.json", lambda config: config.update(eos_token_id=[config["eos_token_id"], 5]))
    assert entries(folder)["eot_token_id"] == 5


def test_templates_by_name(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    found = entries(folder)
    assert (found["chat_template"], found["chat_templates"], found["chat_template.tool_use"]) == (
        "A",
        ["tool_use"],
        "B",
    )


def test_merges_spelled_as_strings_mean_the_same(folder: Path) -> None:
    before = entries(folder)["merges"]
    edit(folder / "tokenizer.json", lambda raw: raw["model"].update(merges=before))
    assert entries(folder)["merges"] == before


TOKENIZER_FAULTS: dict[str, tuple[Callable[[dict], None], str]] = {
    "word level": (lambda raw: raw["model"].update(type="WordLevel"), "WordLevel"),
    "byte fallback without its spaces": (
        lambda raw: raw["model"].update(byte_fallback=True, ignore_merges=False),
        "spaces in this way",
    ),
    "suffix": (lambda raw: raw["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "normalizer": (lambda raw: raw.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    "merge lost its result": (lambda raw: raw["model"]["merges"].insert(0, ["!", "~"]), "merge rule 0"),
    "merge twice": (lambda raw: raw["model"]["merges"].append(raw["model"]["merges"][0]), "repeated"),
    "id beyond the embedding": (lambda raw: raw["model"]["vocab"].update(zzz=99999), "99999"),
    "id twice": (lambda raw: raw["model"]["vocab"].update(zzz=0), "belongs to"),
    "lstrip": (lambda raw: raw["added_tokens"][0].update(lstrip=True), "lstrip"),
    "pre-tokenizer": (lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    "prefix space": (lambda raw: raw["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "known"),
    "no pre-tokenizer": (lambda raw: raw.update(pre_tokenizer=None), "known"),
    "post-processor": (lambda raw: raw.update(post_processor={"type": "BertProcessing"}), "BertProcessing"),
    "malformed template": (lambda raw: raw.update(post_processor={"type": "TemplateProcessing"}), "malformed"),
    "malformed added token": (lambda raw: raw["added_tokens"].append({"id": 3}), "malformed"),
}


@pytest.mark.parametrize("fault", TOKENIZER_FAULTS)
def test_tokenizer_faults(folder: Path, fault: str) -> None:
    change, said = TOKENIZER_FAULTS[fault]
    edit(folder / "tokenizer.json", change)
    with pytest.raises(InputError, match=said):
        entries(folder)


CONFIG_FAULTS: dict[str, tuple[Callable[[dict], None], str]] = {
    "bos is another token": (lambda raw: raw.update(bos_token="<|user|>"), "start"),
    "bos is unknown": (lambda raw: raw.update(bos_token="<s>"), "not in the vocabulary"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_tokenizer_config_faults(folder: Path, fault: str) -> None:
    change, said = CONFIG_FAULTS[fault]
    edit(folder / "tokenizer_config.json", change)
    with pytest.raises(InputError, match=said):
        entries(folder)


def test_bos_is_added_as_the_post_processor_does_whatever_the_config_says(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda config: config.update(add_bos_token=False))
    assert entries(folder)["add_bos_token"] is True


def test_six_ends_have_a_key_and_more_need_a_text_that_llama_cpp_knows(folder: Path) -> None:
    first = entries(folder)["eos_token_id"]
    edit(folder / "generation_config.json", lambda config: config.update(eos_token_id=[first, 5, 6, 7, 8, 9]))
    found = entries(folder)
    assert [found[f"{name}_token_id"] for name in ("eot", "eom", "fim_pad", "fim_sep", "fim_rep")] == [5, 6, 7, 8, 9]
    edit(folder / "generation_config.json", lambda config: config.update(eos_token_id=[first, 5, 6, 7, 8, 9, 10]))
    with pytest.raises(InputError, match="ends at 7 tokens"):
        entries(folder)


def test_a_vocabulary_with_fill_in_marks_has_three_places(folder: Path) -> None:
    first = entries(folder)["eos_token_id"]
    replace_token(folder, 40, "<|fim_prefix|>")
    edit(folder / "generation_config.json", lambda config: config.update(eos_token_id=[first, 5, 6, 7]))
    with pytest.raises(InputError, match="ends at 4 tokens"):
        entries(folder)


def test_ends_that_llama_cpp_knows_by_their_text_leave_the_places_to_others(folder: Path) -> None:
    first = entries(folder)["eos_token_id"]
    replace_token(folder, 40, "<|eot_id|>")
    edit(folder / "generation_config.json", lambda config: config.update(eos_token_id=[first, 40, 5, 6]))
    found = entries(folder)
    assert (found["eot_token_id"], found["eom_token_id"], found["fim_pad_token_id"]) == (5, 6, 40)


def test_an_end_that_stands_only_in_config_json_has_its_place(folder: Path) -> None:
    first = entries(folder)["eos_token_id"]
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", lambda config: config.update(eos_token_id=[first, 5]))
    assert entries(folder)["eot_token_id"] == 5


def test_tokens_that_only_the_config_declares_become_added_tokens(folder: Path) -> None:
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    token = {"content": "<|tool|>", "special": True}
    edit(folder / "config.json", lambda config: config.update(vocab_size=size + 1))
    edit(folder / "tokenizer_config.json", lambda config: config.update(added_tokens_decoder={str(size): token}))
    found = entries(folder)
    assert (found["tokens"][size], found["token_type"][size]) == ("<|tool|>", 3)


def test_a_name_with_phi_3_is_changed_unless_the_tokenizer_strips_spaces(folder: Path) -> None:
    assert name_for_llama_cpp("my-Phi-3-tune", folder) == "my-Phi_3-tune"
    assert name_for_llama_cpp("lamp", folder) == "lamp"

    def strip(raw: dict) -> None:
        keeps = ("<unk>", "<s>", "<|endoftext|>")
        for text in (*keeps, "</s>"):
            raw["added_tokens"].append({"id": len(raw["model"]["vocab"]), "content": text, "special": True})
        for token in raw["added_tokens"]:
            token["rstrip"] = token["content"] not in keeps

    edit(folder / "tokenizer.json", strip)
    assert name_for_llama_cpp("lamp", folder) == "lamp (Phi-3)"


def test_ignore_merges_is_part_of_the_identity(tiny_model: Path) -> None:
    raw = json.loads((tiny_model / "tokenizer.json").read_text())
    other = copy.deepcopy(raw)
    other["model"]["ignore_merges"] = False
    assert (identify(raw), identify(other)) == ("llama-bpe", "smaug-bpe")
    other["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    assert identify(other) is None


def test_byte_alphabet_is_that_of_tokenizers() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_alphabet()) == sorted(ByteLevel.alphabet())
    assert [byte_alphabet()[byte] for byte in b"A \n"] == ["A", "Ġ", "Ċ"]
