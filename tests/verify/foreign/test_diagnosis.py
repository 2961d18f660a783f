"""The whole diagnosis in llama.cpp: right files cost what they cost, every other part is named and proven."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qalora_export.cli.main import main
from qalora_export.errors import ExitCode, InputError
from qalora_export.recipe import VerifySettings
from qalora_export.verify.foreign.diagnosis import PARTS, Part, exit_code, in_one_sentence
from qalora_export.verify.foreign.report import Diagnosis
from qalora_export.verify.foreign.stage import diagnose
from tests.verify.foreign.conftest import Plain
from tests.verify.foreign.damages import BY_NAME, damaged
from tests.verify.foreign.files import rewritten

OTHERS = ("RoPE base", "merges cut", "BOS not put before a text", "template changed", "EOS id", "temperature 5")
PROOFS = {"RoPE base": "gives the runtime's logits"}


def of(plain: Plain, file: Path, out: Path) -> Diagnosis:
    return diagnose(plain.model, out, VerifySettings(threads=1), gguf=file)


def test_a_right_file_is_right_and_tells_its_price(
    plain: Plain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = rewritten(plain.gguf, tmp_path / "model.gguf", {"": "Q8_0", "blk.0.ffn_up.weight": "Q6_K"})
    words = ["verify-parity", plain.model, "--gguf", file, "--out", tmp_path / "report", "--threads", 1]
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    shown = capsys.readouterr().err
    assert not caught.value.code, shown
    assert "Nothing is broken: this is what Q8_0 costs here" in " ".join(shown.split())
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [part["part"] for part in report["parts"]] == list(PARTS)
    assert {part["state"] for part in report["parts"]} == {"ok"}
    assert 0 < report["costs"]["as shipped in llama.cpp"]["kl"] < 0.1
    assert report["sentence"] in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("name", OTHERS)
def test_a_damaged_file_is_named(name: str, plain: Plain, tmp_path: Path) -> None:
    damage = BY_NAME[name]
    found = of(plain, damaged(plain.gguf, tmp_path / "model.gguf", "Q8_0", damage), tmp_path / "report")
    assert found.exit_code == ExitCode.PARITY_FAILED
    broken = [part for part in found.parts if part.state == "broken"]
    assert [part.id for part in broken] == [damage.part], found.sentence
    assert any(damage.said in text for text in (broken[0].sentence, broken[0].proof, *broken[0].findings))
    assert PROOFS.get(name, "") in broken[0].proof


def test_wrong_weights_are_proven_by_the_models_own(plain: Plain, tmp_path: Path) -> None:
    file = damaged(plain.gguf, tmp_path / "model.gguf", "Q8_0", BY_NAME["two layers swapped"])
    found = of(plain, file, tmp_path / "report")
    assert [part.id for part in found.parts if part.state == "broken"] == ["weights"]
    before, after = (float(word) for word in re.findall(r"[\d.]+", found.parts[0].proof)[:2])
    assert before > 10 * after


def test_a_runtime_that_refuses_the_file_has_found_something(plain: Plain, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    rewritten(plain.gguf, file, "Q8_0", change=lambda values: values.pop("blk.1.ffn_up.weight"))
    found = of(plain, file, tmp_path / "report")
    assert found.exit_code == ExitCode.PARITY_FAILED
    states = {part.id: part.state for part in found.parts}
    assert states["weights"] == states["graph"] == "broken"
    assert found.sentence.startswith("The weights are broken: model.layers.1.mlp.up_proj.weight is missing")


def test_a_model_that_is_quantized_itself_is_refused(exported: object, plain: Plain, tmp_path: Path) -> None:
    checkpoint = exported.checkpoint  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="the model is quantized itself"):
        diagnose(checkpoint, tmp_path / "report", gguf=plain.gguf)


def test_the_first_broken_part_is_in_the_sentence() -> None:
    ends, graph = Part("ends", "llama.cpp", "broken", "it never stops"), Part("graph", "llama.cpp", "broken", "epsilon")
    assert in_one_sentence([ends, graph], "") == (
        "The graph and metadata are broken: epsilon. Also broken: end tokens and sampling."
    )
    missing = Part("kernels", "llama.cpp", "not run", "no package")
    assert exit_code([missing]) == ExitCode.RUNTIME_UNAVAILABLE
    assert exit_code([missing, ends]) == ExitCode.PARITY_FAILED
    assert exit_code([]) == ExitCode.RUNTIME_UNAVAILABLE
    assert "could not be run: no package" in in_one_sentence([missing], "")
