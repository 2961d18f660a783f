"""The models that a checkpoint was made from: found by their hashes or said to be missing, never another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qalora_export.checkpoint.manifest import parent_of
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.qalora.merge import merge
from qalora_export.recipe import VerifySettings
from qalora_export.verify.metrics import following_ids, next_logprobs, position_metrics
from qalora_export.verify.probes.probe_set import ProbeSet, make_probes
from qalora_export.verify.reference.lineage import lineage
from qalora_export.verify.reference.logits import reference_logprobs
from qalora_export.verify.reference.task import Score
from tests.models import make_tiny_canonical, make_tiny_model
from tests.qalora.adapters import own_adapter


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model → base.qalora → merged.qalora, beside each other."""
    folder = tmp_path_factory.mktemp("line")
    make_tiny_model(folder / "model")
    make_tiny_canonical(folder / "base.qalora", folder / "model", bits=3)
    own_adapter(folder / "base.qalora", folder / "adapter")
    merge(folder / "base.qalora", folder / "adapter", folder / "merged.qalora", compare_logits=False)
    return folder


@pytest.fixture(scope="module")
def probes(line: Path) -> ProbeSet:
    config = json.loads((line / "merged.qalora/config.json").read_text())
    return make_probes(load_tokenizer(line / "model"), config, VerifySettings()).some([1, 6, 8, 9])


def members(line: Path, probes: ProbeSet, **given: Path):
    answers = reference_logprobs(line / "merged.qalora", probes, threads=1).logprobs
    return answers, lineage(line / "merged.qalora", answers, probes, threads=1, **given)


def plainly(model: Path, probes: ProbeSet) -> np.ndarray:
    """The same model as Transformers loads it, whole."""
    network = load_model(model, dtype=torch.float32, attention="eager")
    with torch.inference_mode():
        rows = [network(torch.tensor(ids.astype(np.int64))[None]).logits[0] for ids in probes.sequences()]
    return torch.log_softmax(torch.cat(rows), -1).numpy()


def test_every_model_is_found_and_compared_with_the_one_before(line: Path, probes: ProbeSet) -> None:
    answers, found = members(line, probes)
    assert [(m.role, m.name, m.note) for m in found] == [
        ("original", "model", ""),
        ("base", "base.qalora", ""),
        ("checkpoint", "merged.qalora", ""),
    ]
    original, base = plainly(line / "model", probes), plainly(line / "base.qalora", probes)
    following = following_ids(probes.ids, probes.lengths)
    for member, before, after in zip(found[1:], (original, base), (base, answers), strict=True):
        want = position_metrics(before, after, following)
        assert member.change is not None
        assert member.change.summary().kl_mean == pytest.approx(want.summary().kl_mean, rel=1e-4)
        assert member.change.summary().kl_mean > 1e-3
        np.testing.assert_allclose(member.next, want.next_runtime, atol=1e-4)
    assert found[0].change is None
    np.testing.assert_allclose(found[0].next, position_metrics(original, base, following).next_reference, atol=1e-4)


def test_a_base_is_its_own_line(line: Path, probes: ProbeSet) -> None:
    answers = reference_logprobs(line / "base.qalora", probes, threads=1).logprobs
    found = lineage(line / "base.qalora", answers, probes, threads=1)
    assert [m.role for m in found] == ["original", "checkpoint"]
    assert found[1].change is not None


def test_what_is_not_beside_is_not_at_hand_unless_it_is_given(line: Path, probes: ProbeSet, tmp_path: Path) -> None:
    shutil.copytree(line / "merged.qalora", tmp_path / "merged.qalora")
    _, alone = members(tmp_path, probes)
    assert [m.next is None for m in alone] == [True, True, False]
    assert ("--original" in alone[0].note, "--base" in alone[1].note) == (True, True)
    assert alone[2].change is None
    _, given = members(tmp_path, probes, base=line / "base.qalora", original=line / "model")
    assert [m.next is None for m in given] == [False] * 3
    _, unproven = members(tmp_path, probes, original=line / "model")
    assert unproven[0].next is not None and "no manifest" in unproven[0].note


def test_another_model_is_no_original(line: Path, probes: ProbeSet, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "model", seed=1)
    with pytest.raises(InputError, match="not the model that the base was made from"):
        members(line, probes, original=other)
    shutil.copytree(line / "merged.qalora", tmp_path / "merged.qalora")
    shutil.copytree(line / "base.qalora", tmp_path / "base.qalora")
    _, found = members(tmp_path, probes)  # one of that name beside it, with other weights
    assert found[0].next is None


def test_a_quantized_source_has_no_other_numbers(line: Path, probes: ProbeSet, tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF")
    base = tmp_path / "base.qalora"
    shutil.copytree(line / "base.qalora", base)
    manifest = json.loads((base / "manifest.json").read_text())
    manifest["parents"] = [{"role": "source", "name": "model.gguf", "sha256": parent_of(source, "source").sha256}]
    (base / "manifest.json").write_text(json.dumps(manifest))
    answers = reference_logprobs(base, probes, threads=1).logprobs
    found = lineage(base, answers, probes, threads=1)
    assert (found[0].name, found[0].next) == ("model.gguf", None)
    assert "quantized already" in found[0].note


def test_a_score_that_run_left_is_found_by_the_name_of_the_model(line: Path, probes: ProbeSet, tmp_path: Path) -> None:
    merged = tmp_path / "merged.qalora"
    shutil.copytree(line / "merged.qalora", merged)
    score = {"exact": 3, "total": 4, "accuracy": 0.75, "model_sha256": parent_of(merged, "checkpoint").sha256}
    (tmp_path / "score.merged.json").write_text(json.dumps(score))
    _, found = members(tmp_path, probes)
    assert [member.score for member in found] == [None, None, Score(3, 4)]
    (tmp_path / "score.merged.json").write_text("{}")
    with pytest.raises(UnsafeInputError):
        members(tmp_path, probes)


def test_the_next_token_has_the_probability_that_it_has() -> None:
    random = np.random.default_rng(0)
    logprobs = np.log(random.dirichlet(np.ones(7), 5)).astype(np.float32)
    following = np.array([3, 6, -1, 0, -1], np.int32)
    found = next_logprobs(logprobs, following)
    assert np.isnan(found[[2, 4]]).all()
    np.testing.assert_allclose(found[[0, 1, 3]], logprobs[[0, 1, 3], [3, 6, 0]], rtol=1e-6)
