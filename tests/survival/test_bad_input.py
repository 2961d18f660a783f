"""Bad input, verb by verb: one clear message, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.survival.place import (
    BAD,
    BASE,
    EVALUATE,
    GGUF,
    GOOD_CHAT,
    ONNX,
    QUANTIZE,
    REFUTED,
    RTN,
    RUN,
    TRAIN,
    UP,
    VERIFY,
    WEIGHTS,
    WRITERS,
    Case,
    Place,
    check_message,
    judge,
    run,
)

LONG_CHAT = json.dumps(
    {"messages": [{"role": "user", "content": "lamp " * 400}, {"role": "assistant", "content": "y"}]}
)


def width(tensors: dict[str, np.ndarray]) -> None:
    """q_proj of layer 0 with 100 in-features, which no group size divides."""
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :100])


def poison(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[7] = value

    return change


def narrow_model(place: Place) -> None:
    """hidden_size 96: 32 divides it, 64 and 128 do not."""
    from tests.models import make_tiny_model

    shutil.rmtree(place / "model")
    make_tiny_model(place / "model", hidden_size=96)


CASES = (
    # missing
    Case("no model folder", ("quantize", "none", "--out", "new", *RTN), BAD, ("model folder not found", "none")),
    Case("no weights", QUANTIZE, BAD, ("no safetensors weights",), lambda p: (p / WEIGHTS).unlink()),
    Case(
        "pickled weights",
        QUANTIZE,
        BAD,
        ("pickled", "safetensors"),
        lambda p: (p / WEIGHTS).rename(p / "model/pytorch_model.bin"),
    ),
    Case("no config", QUANTIZE, BAD, ("config.json", "not found"), lambda p: (p / "model/config.json").unlink()),
    Case("no recipe", ("run", "none.toml"), BAD, ("recipe not found", "none.toml")),
    Case(
        "no training data",
        ("train", "base.qalora", "--data", "none.jsonl", "--out", "new"),
        BAD,
        ("data file not found", "none.jsonl"),
    ),
    Case("no calibration", ("quantize", "model", "--out", "new"), BAD, ("calibration", "--calibration FILE")),
    Case("no calibration file", ("quantize", "model", "--out", "new", "--calibration", "none.txt"), BAD, ("none.txt",)),
    Case("no adapter", ("merge", "base.qalora", "none", "--out", "new"), BAD, ("adapter folder not found", "none")),
    Case("no artifact", ("inspect", "none.gguf"), BAD, ("GGUF file not found", "none.gguf")),
    Case("no artifact to verify", (*VERIFY, "--gguf", "none.gguf"), BAD, ("none.gguf", "--gguf")),
    Case("no data to evaluate", ("evaluate", "base.qalora", "--data", "none.jsonl"), BAD, ("none.jsonl",)),
    # what cannot be quantized
    Case(
        "group size does not divide",
        (
            "quantize",
            "model",
            "--out",
            "new",
            *RTN,
            "--group-size",
            "128",
            "--rule",
            "*.up_proj=group:128",
            "--strict-groups",
        ),
        BAD,
        ("96 in-features", "q_proj"),
        lambda p: narrow_model(p),
    ),
    Case("matrix of another shape", QUANTIZE, BAD, ("q_proj",), lambda p: p.edit_tensors(WEIGHTS, width)),
    Case(
        "NaN in a weight",
        QUANTIZE,
        BAD,
        (f"{UP}.weight", "finite"),
        lambda p: p.edit_tensors(WEIGHTS, poison(f"{UP}.weight", np.nan)),
    ),
    Case(
        "Inf in a weight",
        QUANTIZE,
        BAD,
        (f"{UP}.weight", "finite"),
        lambda p: p.edit_tensors(WEIGHTS, poison(f"{UP}.weight", np.inf)),
    ),
    Case(
        "NaN in a scale",
        GGUF,
        BAD,
        REFUTED,
        lambda p: p.edit_tensors(BASE, poison(f"{UP}.scale", np.nan)),
    ),
    Case(
        "NaN in a scale, ONNX",
        ONNX,
        BAD,
        REFUTED,
        lambda p: p.edit_tensors(BASE, poison(f"{UP}.scale", np.nan)),
    ),
    Case(
        "architecture",
        QUANTIZE,
        BAD,
        ("MambaForCausalLM", "LlamaForCausalLM"),
        lambda p: p.edit_json("model/config.json", lambda c: c.update(architectures=["MambaForCausalLM"])),
    ),
    Case(
        "architecture to export",
        GGUF,
        BAD,
        REFUTED,
        lambda p: p.edit_json("base.qalora/config.json", lambda c: c.update(architectures=["MambaForCausalLM"])),
    ),
    Case("not canonical", ("export", "gguf", "model", "--out", "new"), BAD, ("not a canonical", "quantize")),
    Case("bits 7", (*QUANTIZE, "--bits", "7"), BAD, ("bits",)),
    # recipes and options
    Case(
        "unknown recipe key",
        RUN,
        BAD,
        ("train.rnk", "did you mean 'rank'"),
        lambda p: p.write("recipe.toml", 'model = "model"\nout = "new"\n[train]\nrnk = 3\n'),
    ),
    Case("recipe is no TOML", RUN, BAD, ("not valid TOML", "line 1"), lambda p: p.write("recipe.toml", "model = \n")),
    Case(
        "recipe of the wrong type",
        RUN,
        BAD,
        ("train.rank",),
        lambda p: p.write("recipe.toml", 'model = "model"\nout = "new"\n[train]\nrank = "3"\n'),
    ),
    Case(
        "recipe path of nobody",
        RUN,
        BAD,
        ("unknown user", "~nobody-here"),
        lambda p: p.write("recipe.toml", 'model = "~nobody-here/model"\nout = "new"\n'),
    ),
    Case(
        "recipe with a date",
        RUN,
        BAD,
        ("train.rank",),
        lambda p: p.write("recipe.toml", 'model = "model"\nout = "new"\n[train]\nrank = 1979-05-27\n'),
    ),
    Case(
        "recipe table is a number",
        RUN,
        BAD,
        ("train",),
        lambda p: p.write("recipe.toml", 'model = "model"\nout = "new"\ntrain = 3\n'),
    ),
    Case("override below a number", (*RUN, "--set", "model.x=1"), BAD, ("model.x",)),
    Case("unknown key by --set", (*RUN, "--set", "train.rnk=1"), BAD, ("did you mean 'rank'",)),
    Case("override without value", (*RUN, "--set", "train.rank"), BAD, ("KEY=VALUE",)),
    Case("unknown option", (*QUANTIZE, "--bitz", "4"), BAD, ("--bitz",)),
    Case("unknown verb", ("quantise", "model"), BAD, ("quantise",)),
    Case("missing option", ("merge", "base.qalora", "adapter"), BAD, ("--out",)),
    Case(
        "run.json of another tool",
        RUN,
        BAD,
        ("run.json", "--force"),
        lambda p: ((p / "new").mkdir(), p.write("new/run.json", "[1]")),
        out="new/base.qalora",
    ),
    # data
    Case("empty data", TRAIN, BAD, ("empty", "data.jsonl"), lambda p: p.write("data.jsonl", "\n\n")),
    Case(
        "a line that does not parse",
        TRAIN,
        BAD,
        ("not valid JSON", "line 3"),
        lambda p: p.write("data.jsonl", f"{GOOD_CHAT}\n\n{{]\n"),
    ),
    Case(
        "data is binary",
        TRAIN,
        BAD,
        ("line 2",),
        lambda p: (p / "data.jsonl").write_bytes(GOOD_CHAT.encode() + b"\n\xff\xfe\n"),
    ),
    Case(
        "longer than the context",
        (*TRAIN, "--sequence-length", "4096", "--too-long", "error"),
        BAD,
        ("line 2", "context"),
        lambda p: p.write("data.jsonl", f"{GOOD_CHAT}\n{LONG_CHAT}\n"),
    ),
    Case(
        "empty calibration",
        ("quantize", "model", "--out", "new", "--calibration", "text.txt"),
        BAD,
        ("empty",),
        lambda p: p.write("text.txt", ""),
    ),
    Case(
        "calibration line",
        ("quantize", "model", "--out", "new", "--calibration", "data.jsonl"),
        BAD,
        ("data.jsonl, line 2",),
        lambda p: p.write("data.jsonl", f"{GOOD_CHAT}\n{{\n"),
    ),
    Case("empty test data", EVALUATE, BAD, ("empty",), lambda p: p.write("data.jsonl", "")),
    Case("test line", EVALUATE, BAD, ("line 2",), lambda p: p.write("data.jsonl", f"{GOOD_CHAT}\n{{\n")),
    Case(
        "test data is binary", EVALUATE, BAD, ("data.jsonl",), lambda p: (p / "data.jsonl").write_bytes(b"\xff\xfe\n")
    ),
    Case(
        "prompt longer than the context",
        EVALUATE,
        BAD,
        ("line 2", "context"),
        lambda p: p.write("data.jsonl", f"{GOOD_CHAT}\n{LONG_CHAT}\n"),
    ),
    Case(
        "verify prompts",
        (*VERIFY, "--gguf", "model.gguf", "--prompts", "data.jsonl"),
        BAD,
        ("data.jsonl, line 2",),
        lambda p: p.write("data.jsonl", f"{GOOD_CHAT}\n{{\n"),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    judge(case, place, capsys)


@pytest.mark.parametrize("command", WRITERS, ids=lambda command: command[0] + command[1][:5])
def test_an_existing_output_is_refused(
    command: tuple[str, ...], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.write("new", "mine")
    assert run(*command) == BAD
    check_message(capsys.readouterr().err, ("exists already", "new", "--force"))
    assert (place / "new").read_text() == "mine"


def test_through_the_installed_command(place: Place) -> None:
    """The same, as a user's shell sees it."""
    command = [str(Path(sys.executable).with_name("qalora-export")), "quantize", "none", "--out", "new", *RTN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == BAD
    assert done.stderr.splitlines() == [
        "error: model folder not found",
        "  where: none",
        "  next: give the folder that holds config.json, a .gguf file, or a hub id such as HuggingFaceTB/SmolLM2-135M",
    ]
