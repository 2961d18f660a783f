"""What quantizing and merging must keep is compared with the parents that are here; what is not here is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import parent_of
from qalora_export.checkpoint.safetensors_file import read_header
from qalora_export.qalora.merge import merge
from qalora_export.safety import sha256_file
from qalora_export.verify.reference.ancestry import Ancestry, ancestry
from qalora_export.verify.reference.merge_check import MergeCheck, merge_check
from tests.conftest import MadeOnce
from tests.models import make_tiny_canonical
from tests.qalora.adapters import QUERY, own_adapter
from tests.verify.reference.test_merge_check import spoil


@pytest.fixture(scope="module")
def whole(tiny_model: Path, made_once: MadeOnce) -> Path:
    """model, base.qalora, adapter and merged in one folder."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny_model, folder / "model")
        make_tiny_canonical(folder / "base.qalora", folder / "model")
        own_adapter(folder / "base.qalora", folder / "adapter")
        merge(folder / "base.qalora", folder / "adapter", folder / "merged", compare_logits=False)

    return made_once("ancestry", make)


@pytest.fixture
def line(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "line")
    return tmp_path / "line"


def checked(folder: Path, *, accepted: bool = False) -> tuple[MergeCheck, Ancestry]:
    found = merge_check(CanonicalCheckpoint(folder / "merged"))
    return found, ancestry(folder / "merged", found, accepted=accepted)


def reseal(folder: Path) -> None:
    """The manifest of a checkpoint names its files as they are now, so that only what they say can give it away."""
    content = json.loads((folder / "manifest.json").read_text())
    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    content["files"] = {n: {"bytes": (folder / n).stat().st_size, "sha256": sha256_file(folder / n)} for n in names}
    (folder / "manifest.json").write_text(json.dumps(content))


def reseal_line(line: Path) -> None:
    """Base and merged after a change in both: every hash is right."""
    reseal(line / "base.qalora")
    for child in ("adapter", "merged"):
        path = line / child / "manifest.json"
        content = json.loads(path.read_text())
        for parent in content["parents"]:
            if (line / parent["name"]).is_dir():
                parent["sha256"] = parent_of(line / parent["name"], parent["role"]).sha256
        path.write_text(json.dumps(content))
    reseal(line / "merged")


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def other_theta(config: dict) -> None:
    (config.get("rope_parameters") or config)["rope_theta"] = 20_000.0


def lost_end(config: dict) -> None:
    config["eos_token_id"] = 3


CHANGES: dict[str, tuple[str, Callable[[dict], object], str]] = {
    "RoPE base": (
        "config.json",
        other_theta,
        "config.json: rope_parameters.rope_theta: expected 10000.0, found 20000.0",
    ),
    "an unknown key": ("config.json", lambda c: c.update(sinks=4), "config.json: sinks: expected 'absent', found 4"),
    "an end token": ("generation_config.json", lost_end, "generation_config.json: eos_token_id: "),
    "a decoder": ("tokenizer.json", lambda c: c.update(decoder=None), "tokenizer.json: decoder: expected "),
    "a setting of the tokenizer": ("tokenizer_config.json", lambda c: c.update(x=1), "tokenizer_config.json: x: "),
}


def test_a_right_line_is_compared_to_its_beginning(whole: Path) -> None:
    _, found = checked(whole)
    assert found == Ancestry(compared=("base.qalora of model", "merged of base.qalora"))


@pytest.mark.parametrize(("name", "change", "finding"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("where", ["merged", "base.qalora and merged"])
def test_a_change_on_the_way_is_named(
    name: str, change: Callable[[dict], object], finding: str, where: str, line: Path
) -> None:
    for folder in where.split(" and "):
        edit(line / folder / name, change)
    if "base" in where:
        reseal_line(line)
    reseal(line / "merged")
    _, found = checked(line)
    child = where.split(" and ")[0]
    assert len(found.changed) == 1
    assert found.changed[0].startswith(f"{child} {finding}")


EMBEDDING, CODES = "model.embed_tokens.weight", f"{QUERY}.codes"


@pytest.mark.parametrize(
    ("tensor", "count", "finding"),
    [
        (EMBEDDING, 2, "base.qalora model.embed_tokens.weight: 1 values other than in the model it was made from"),
        (CODES, 64, f"base.qalora {QUERY}: 1 rows are not those of the model it was made from, the first is 0 ("),
    ],
    ids=["a value that is not quantized", "a row of codes"],
)
def test_weights_that_are_not_the_models_are_named_though_every_hash_and_the_merge_are_right(
    tensor: str, count: int, finding: str, line: Path
) -> None:
    entry = read_header(line / "base.qalora" / "model.safetensors")[tensor]
    old = (line / "base.qalora" / "model.safetensors").read_bytes()[entry.begin : entry.begin + count]
    for folder in ("base.qalora", "merged"):
        spoil(line / folder, tensor, bytes(byte ^ 0xFF for byte in old))
    reseal_line(line)
    merged, found = checked(line)
    assert merged.wrong == {}
    assert len(found.changed) == 1
    assert found.changed[0].startswith(finding)


def test_a_tensor_more_in_the_model_is_named(line: Path) -> None:
    path = line / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.layers.0.extra.weight": tensors["model.norm.weight"].clone()}, path, {"format": "pt"})
    source = parent_of(line / "model", "source").sha256
    edit(line / "base.qalora" / "manifest.json", lambda c: c["parents"][0].update(sha256=source))
    reseal_line(line)
    assert checked(line)[1].changed == ("base.qalora model.layers.0.extra.weight: not taken along",)


def test_a_template_a_file_more_and_a_file_less_are_named(line: Path) -> None:
    merged = line / "merged"
    (merged / "chat_template.jinja").write_text("{{ messages }}")
    (merged / "additional_chat_templates").mkdir()
    (merged / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (merged / "generation_config.json").unlink()
    reason = "merged chat_template.jinja: other text (14 bytes)"
    assert checked(line)[1].changed == (
        "merged additional_chat_templates/tools.jinja: not in base.qalora",
        reason,
        "merged generation_config.json: not in merged",
    )


def test_without_the_adapter_everything_but_offsets_is_compared_and_the_rest_is_unchecked(line: Path) -> None:
    shutil.rmtree(line / "adapter")
    found, said = checked(line)
    assert (found.wrong, said.changed) == ({}, ())
    assert said.unchecked == ("the adapter of this merge is not here (--adapter gives it)",)
    spoil(line / "merged", f"{QUERY}.scale", b"\x00\x00")
    reseal(line / "merged")
    assert list(checked(line)[0].wrong) == [f"{QUERY}.scale (other than in the base)"]


def test_a_merge_alone_is_unchecked_until_that_is_accepted(line: Path) -> None:
    shutil.rmtree(line / "adapter")
    shutil.rmtree(line / "base.qalora")
    missing = "the base of this merge is not here (--base gives it) nor its adapter (--adapter)"
    assert checked(line)[1] == Ancestry(unchecked=(missing,))
    assert checked(line, accepted=True)[1] == Ancestry(said=(missing,))


def test_what_cannot_be_compared_is_said(line: Path) -> None:
    shutil.rmtree(line / "model")
    gone = "the model that base.qalora was made from is not here (--original gives it)"
    assert checked(line)[1] == Ancestry(compared=("merged of base.qalora",), said=(gone,))
    (line / "merged" / "manifest.json").unlink()
    assert checked(line)[1].gaps == ("merged has no manifest: nothing says what it was made from",)
