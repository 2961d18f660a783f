"""`qalora-export verify-parity CHECKPOINT`"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from qalora_runtimes.process import PATIENCE

from qalora_export.console import next_command

if TYPE_CHECKING:
    from qalora_export.recipe import EvaluateSettings, VerifySettings


def command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Canonical checkpoint that the artifacts were exported from; or the plain model, a folder or hub id, "
            "that a file of any tool was made from."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html, report.json, junit.xml and positions.npz.")
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="GGUF file to verify in llama.cpp.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="ONNX folder to verify in ONNX Runtime and GenAI.")] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Base checkpoint that this one was merged from. Default: found beside it by its hash."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Adapter that was merged into the checkpoint. Default: found beside it by its hash."),
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(help="Model that the base was quantized from. Default: found beside it by its hash."),
    ] = None,
    without_parents: Annotated[
        bool,
        typer.Option(
            "--without-parents",
            help="Let a merged checkpoint pass whose base or adapter is not here; the verdict says so.",
        ),
    ] = False,
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="llama.cpp, onnxruntime or onnxruntime-genai; repeatable. Default: all that fit."),
    ] = None,
    pack: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Verify nothing: write all that is asked of the runtimes into a folder for a device."
        ),
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Judge what a device answered to a pack of the same flags.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask a running llama-server, not llama.cpp here, as far as its API goes."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Key of that server. Default: $LLAMA_API_KEY.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Your own prompts (JSONL or text), beside the fixed edge cases.")
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Questions with answers (JSONL): the task score of every model and runtime, by greedy answers.",
        ),
    ] = None,
    scored: Annotated[int | None, typer.Option(help="How many of its questions are asked (the first 32).")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer to a question of --evaluate, in tokens (64).")
    ] = None,
    sequences: Annotated[int | None, typer.Option(help="At least this many sequences (16 or more).")] = None,
    positions: Annotated[int | None, typer.Option(help="At least this many positions (1000 or more).")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence, in tokens.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Largest mean KL of the shipped path, nats (0.1).")] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Least share of positions with the same first choice (default 0.8).")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every runtime and of PyTorch.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the probe set.")] = None,
    patience: Annotated[
        float | None,
        typer.Option(
            envvar=PATIENCE,
            metavar="SECONDS",
            help="Longest silence of a runtime before it is ended. Default: 300, and what loading and a prompt need.",
        ),
    ] = None,
    no_bisect: Annotated[
        bool, typer.Option("--no-bisect", help="Do not look for the first layer that diverges when logits fail.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Compute every reference anew; keep none in ~/.cache/qalora-export.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing report.")] = False,
) -> None:
    """Prove that an exported model computes the numbers of its checkpoint; or find out what is broken in any file.

    Seven gates per runtime, on every position of the probe set: G0 bytes, G1 weights, G2 exact path, G3 shipped path,
    G4 decode, G5 text, G6 behaviour. A gate that could not run is "not run", never a pass.

    Given a plain model instead of a checkpoint, the file may be of any tool in any quantization: weights, graph and
    metadata, tokenizer, chat template, end tokens and sampling, kernels are looked at one after the other, and the
    first sentence says which of them is broken, or what the quantization costs.

    On another device: --pack writes a folder, python -m qalora_runtimes FOLDER answers it there without torch, and
    --answers judges that file here by the same gates.

    Exit codes: 0 every gate passed, nothing broken · 1 parity failed, something broken · 2 bad usage or input · 3 a
    requested runtime is missing or crashed, or the base or adapter of a merge is not here (--without-parents accepts
    that) · 4 unsafe input.

    [bold]Examples[/bold]

      qalora-export verify-parity merged.qalora --gguf model.gguf --onnx onnx/ --out parity/

      qalora-export verify-parity merged.qalora --gguf model.gguf --base base.qalora --prompts data.jsonl --out parity/

      qalora-export verify-parity merged.qalora --onnx onnx/ --runtime onnxruntime --positions 5000 --out parity/

      qalora-export verify-parity merged.qalora --gguf model.gguf --pack device/

      qalora-export verify-parity merged.qalora --gguf model.gguf --answers answers.zip --out parity/

      qalora-export verify-parity merged.qalora --gguf model.gguf --server http://phone:8080 --out parity/

      qalora-export verify-parity HuggingFaceTB/SmolLM2-135M-Instruct --gguf downloaded-Q4_K_M.gguf --out diagnosis/

      qalora-export verify-parity my-model --onnx folder-of-another-tool/ --out diagnosis/
    """
    from qalora_export.cli.parity_table import print_report
    from qalora_export.errors import InputError
    from qalora_export.recipe import EvaluateSettings, VerifySettings
    from qalora_export.recipe_file import validated
    from qalora_export.verify.stage import verify_parity

    if patience is not None:
        os.environ[PATIENCE] = str(patience)  # where whoever starts a runner looks
    given: dict[str, Any] = {
        "runtimes": runtime or None,
        "prompts": str(prompts) if prompts else None,
        "scored": scored,
        "sequences": sequences,
        "positions": positions,
        "max_length": max_length,
        "max_kl": max_kl,
        "min_top1": min_top1,
        "threads": threads,
        "seed": seed,
        "without_parents": without_parents or None,
    }
    flags = {key: value for key, value in given.items() if value is not None}
    settings = validated(VerifySettings, flags, where="command line")
    asked = {"data": evaluate and str(evaluate), "max_new_tokens": max_new_tokens}
    task = (
        validated(EvaluateSettings, {k: v for k, v in asked.items() if v}, where="command line") if evaluate else None
    )
    if pack is not None:
        if (answers, server, out) != (None, None, None):
            raise InputError(
                "--pack verifies nothing", where="command line", fix="leave --answers, --server and --out out"
            )
        _pack(checkpoint, pack, settings, gguf=gguf, onnx=onnx, evaluate=task, force=force)
    if out is None:
        raise InputError("nowhere to write the report", where="command line", fix="pass --out FOLDER")
    if not is_checkpoint(checkpoint):
        if answers is not None or server is not None:
            raise InputError("a device is judged by a checkpoint of this tool", where=checkpoint, fix="name that one")
        _diagnose(checkpoint, out, settings, gguf=gguf, onnx=onnx, cache=not no_cache, force=force)
    report = verify_parity(
        checkpoint,
        out,
        settings,
        gguf=gguf,
        onnx=onnx,
        base=base,
        adapter=adapter,
        original=original,
        answers=answers,
        server=server,
        api_key_file=api_key_file,
        evaluate=task,
        bisect=not no_bisect,
        cache=not no_cache,
        force=force,
    )
    print_report(report)
    artifact = gguf or onnx  # verify_parity refuses to run without one
    compared = [] if report.passed else [checkpoint]  # value by value, when something is wrong
    next_command(shlex.join(["qalora-export", "inspect", *map(str, [artifact, *compared])]))
    raise typer.Exit(int(report.exit_code))


def _pack(
    checkpoint: Path,
    pack: Path,
    settings: VerifySettings,
    *,
    gguf: Path | None,
    onnx: Path | None,
    evaluate: EvaluateSettings | None,
    force: bool,
) -> NoReturn:
    from qalora_export.console import console, styled
    from qalora_export.verify.device.pack import pack_verification

    report = pack_verification(checkpoint, pack, settings, gguf=gguf, onnx=onnx, evaluate=evaluate, force=force)
    asked = f"{report.requests} runs of {', '.join(report.runtimes)}, {report.positions} positions"
    console.print(styled("packed {}: {}, {} MB", str(report.out), asked, f"{report.nbytes / 1e6:,.0f}"))
    name = shlex.quote(report.out.name)
    console.print(styled("on the device: python3 -m qalora_runtimes {}; README.txt in it says what it needs", name))
    raise typer.Exit(0)


def is_checkpoint(model: Path) -> bool:
    """Whether it is for the gates: a canonical checkpoint, or what is none and no plain model either."""
    from qalora_export.checkpoint.canonical import is_canonical

    return is_canonical(model) if (model / "config.json").is_file() else model.exists()


def _diagnose(
    model: Path,
    out: Path,
    settings: VerifySettings,
    *,
    gguf: Path | None,
    onnx: Path | None,
    cache: bool,
    force: bool,
) -> NoReturn:
    from qalora_export.cli.diagnosis_table import print_diagnosis
    from qalora_export.verify.foreign.stage import diagnose

    diagnosis = diagnose(model, out, settings, gguf=gguf, onnx=onnx, cache=cache, force=force)
    print_diagnosis(diagnosis)
    raise typer.Exit(int(diagnosis.exit_code))
