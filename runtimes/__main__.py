"""What runs on this device, running it, answering a pack: `python -m qalora_runtimes [RUNTIME | FOLDER OPTIONS…]`."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import qalora_runtimes
from qalora_runtimes.answering import OUT, answer
from qalora_runtimes.launch import RUNNERS, available
from qalora_runtimes.packs import PACK
from qalora_runtimes.patching import apply_patch
from qalora_runtimes.protocol import ProtocolError
from qalora_runtimes.runner import EXIT_MISSING, EXIT_OK, EXIT_REFUSED

APPLY = "apply"


def main(words: list[str]) -> int:
    """List the runtimes, answer a pack, or hand the words after the first over to the runner that it names; returns
    the exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m qalora_runtimes",
        description="Without anything: which runtimes are installed here. With a folder that verify-parity --pack "
        "wrote: answer it. With apply: put a patch into an artifact. With a runtime: run a job in it.",
        epilog="examples: python -m qalora_runtimes device/ · python -m qalora_runtimes onnxruntime --model onnx "
        "--job job.npz --out logits.npz --fingerprint fingerprint.json",
    )
    parser.add_argument("--version", action="version", version=f"qalora-runtimes {qalora_runtimes.__version__}")
    parser.add_argument("what", nargs="?", metavar="RUNTIME|FOLDER|apply", help="see RUNTIME --help for its options")
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.what is None:
        sys.stdout.write(listing())
        return EXIT_OK
    if given.what in RUNNERS:
        module = RUNNERS[given.what].module
        sys.argv = [module, *given.options]
        runpy.run_module(module, run_name="__main__", alter_sys=True)  # leaves with the runner's exit code
        return EXIT_OK
    if given.what == APPLY:
        return apply(given.options)
    if not (Path(given.what) / PACK).is_file():
        parser.error(f"{given.what!r} is none of {', '.join([APPLY, *sorted(RUNNERS)])}, and no folder with a {PACK}")
    return answer_pack(Path(given.what), given.options)


def answer_pack(folder: Path, words: list[str]) -> int:
    """Answer a pack; the exit code is 0 when all that was asked was answered, 3 when some of it could not be run."""
    parser = argparse.ArgumentParser(
        prog="python -m qalora_runtimes FOLDER", description="Answer what verify-parity --pack asks, into one file."
    )
    parser.add_argument("--out", type=Path, help=f"file of answers to write (default FOLDER/{OUT})")
    parser.add_argument(
        "--runtime", action="append", choices=sorted(RUNNERS), help="only this one; repeatable (default: all packed)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: as packed)")
    given = parser.parse_args(words)
    if given.threads is not None and given.threads < 1:
        parser.error(f"--threads is {given.threads}, it must be at least 1")
    out = given.out or folder / OUT
    try:
        found = answer(folder, out, runtimes=given.runtime, threads=given.threads, say=_say)
    except (ProtocolError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_REFUSED
    _say(f"{out}: take it home, verify-parity --answers {out.name} judges it")
    return EXIT_OK if set(found.values()) <= {"ok"} and found else EXIT_MISSING


def apply(words: list[str]) -> int:
    """Put a patch into an artifact, or take it out; the exit code is 0 when it did."""
    parser = argparse.ArgumentParser(
        prog=f"python -m qalora_runtimes {APPLY}", description="Turn an artifact into another fine-tune of its base."
    )
    parser.add_argument("patch", type=Path, help="what qalora-export export patch wrote")
    parser.add_argument("target", type=Path, help="GGUF file or ONNX folder to change in place")
    parser.add_argument("--reverse", action="store_true", help="take the patch out again")
    parser.add_argument("--out", type=Path, help="write the changed artifact there, and leave the target as it is")
    given = parser.parse_args(words)
    try:
        done = apply_patch(given.patch, given.target, reverse=given.reverse, out=given.out)
    except (ProtocolError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_REFUSED
    _say(f"{done.target} is {done.now} now")
    return EXIT_OK


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def listing() -> str:
    """One line a runtime: its name, what it runs, the installed version or how to get it."""
    lines = []
    for found in available():
        state = f"{found.package} {found.version}" if found.version else f"not installed: pip install {found.package}"
        lines.append(f"{found.name:18} {found.artifact:12} {state}\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
