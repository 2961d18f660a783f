"""What every verb has in common: help with examples, --out where it writes, a next command that the parser accepts."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text

from qalora_export.cli import verbs
from qalora_export.cli.main import app, export_app, main

ALL = {(name,): module for name, module in verbs.VERBS.items()}
ALL |= {("export", name): module for name, module in verbs.EXPORTS.items()}
READ_ONLY = {("inspect",), ("doctor",)}
NEXT = re.compile(r"^next: (qalora-export .*)$", re.MULTILINE)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def parse(line: str) -> None:
    """Let the command line's own parser read a printed command; it raises for what it would refuse."""
    verbs.register(app, export_app)
    program, *words = shlex.split(line)
    assert program == "qalora-export"
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("", list(words))


def test_the_parser_refuses_what_is_wrong() -> None:
    for line in ("qalora-export merge a b", "qalora-export merge a b --out c --nothing", "qalora-export quantize a"):
        with pytest.raises(Exception, match=r"(?i)missing|no such"):
            parse(line)


@pytest.mark.parametrize("verb", ALL, ids=" ".join)
def test_help_has_examples_that_parse(verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*verb, "--help") == 0
    assert "Examples" in capsys.readouterr().out
    text = inspect.getdoc(import_module(ALL[verb]).command) or ""
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith("qalora-export ")]
    assert examples
    for example in examples:
        assert example.split()[1 : 1 + len(verb)] == list(verb)
        parse(example)


def command_of(verb: tuple[str, ...]) -> Any:
    verbs.register(app, export_app)
    command: Any = typer.main.get_command(app)
    for name in verb:
        command = command.commands[name]
    return command


@pytest.mark.parametrize("verb", ALL, ids=" ".join)
def test_no_bracket_of_a_help_text_is_taken_for_markup(verb: tuple[str, ...]) -> None:
    """Rich leaves out what it takes for a style, such as the name of a recipe's table."""
    command = command_of(verb)
    for text in (command.help, *(parameter.help for parameter in command.params)):
        shown = Text.from_markup(text or "")
        assert {str(span.style) for span in shown.spans} <= {"bold"}
        assert len(shown.plain) == len((text or "").replace("\\[", "[").replace("[bold]", "").replace("[/bold]", ""))


@pytest.mark.parametrize("verb", sorted(set(ALL) - READ_ONLY), ids=" ".join)
def test_what_writes_takes_out_and_force(verb: tuple[str, ...]) -> None:
    options = {option for parameter in command_of(verb).params for option in parameter.opts}
    assert {"--out", "--force"} <= options


def test_no_verb_at_all_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert "qalora-export" in capsys.readouterr().out
    assert run("export", "pdf") == 2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    turns = [{"role": "user", "content": "on"}, {"role": "assistant", "content": "done"}]
    (tmp_path / "my data.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    return tmp_path / "my data.jsonl"


def test_every_stage_ends_with_a_next_command_that_parses(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths hold a blank and brackets, which a shell and rich's markup would take apart."""
    folder = tmp_path / "with a blank [x]"
    base, adapter, merged = folder / "base.qalora", folder / "adapter", folder / "merged.qalora"
    chain = (
        ("quantize", tiny_model, "--out", base, "--method", "rtn"),
        ("train", base, "--data", data, "--out", adapter, "--max-steps", "1", "--rank", "2"),
        ("merge", base, adapter, "--out", merged, "--no-compare-logits"),
        ("evaluate", merged, "--data", data, "--max-new-tokens", "2"),
        ("evaluate", tiny_model, "--data", data, "--max-new-tokens", "2"),
        ("export", "gguf", merged, "--out", folder / "model.gguf"),
        ("export", "onnx", merged, "--out", folder / "onnx"),
    )
    for command in chain:
        assert run(*command) == 0, capsys.readouterr().err
        printed = NEXT.findall(capsys.readouterr().err)
        assert len(printed) == 1, command
        parse(printed[0])
        if command[0] != "evaluate":
            assert str(command[command.index("--out") + 1]) in shlex.split(printed[0])
