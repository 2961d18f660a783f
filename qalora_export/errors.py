"""One exception class per exit code. Every message says what, where, why and what to do next."""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum

LONGEST = 2000  # characters of one part of a message; a file may hold a name, or a line, of megabytes


def printable(text: object) -> str:
    """`text` without anything that could steer a terminal: control characters, escape sequences, bidirectional marks
    and lone surrogates as Python writes them (\\x1b, \\u202e, \\udcff); line breaks and tabs stay.
    """
    text = text if isinstance(text, str) else str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _shown(text: object) -> str:
    text = text if isinstance(text, str) else str(text)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}… ({len(text):,} characters in all)"
    return printable(text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names as a question, or all of them where none is near."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


class ExitCode(IntEnum):
    OK = 0
    PARITY_FAILED = 1
    BAD_INPUT = 2
    RUNTIME_UNAVAILABLE = 3
    UNSAFE_INPUT = 4


class QaloraError(Exception):
    """Base of everything this project raises on purpose.

    what: the finding in one sentence.  where: file, tensor or setting.  why: the rule that was broken.
    fix: what the user can do next.  All four are made printable and are cut after 2,000 characters.
    """

    code = ExitCode.BAD_INPUT
    several: "tuple[QaloraError, ...]" = ()  # the findings that this error stands for, when it is not one of its own

    def __init__(self, what: str, *, where: object = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = (_shown(part) for part in (what, where, why, fix))
        parts = [self.what]
        parts += [f"where: {self.where}"] if self.where else []
        parts += [f"why: {self.why}"] if self.why else []
        parts += [f"next: {self.fix}"] if self.fix else []
        super().__init__(" | ".join(parts))

    @property
    def reason(self) -> str:
        """The message without `where`, for a report that outlives the files it speaks of."""
        return "; ".join(part for part in (self.what, self.why, self.fix) if part)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"{n}. {error}" for n, error in enumerate(self.several, 1))])


class ParityError(QaloraError):
    """A gate failed (exit 1)."""

    code = ExitCode.PARITY_FAILED


class InputError(QaloraError):
    """Bad usage, recipe or input (exit 2)."""

    code = ExitCode.BAD_INPUT


class DivergedError(InputError):
    """Training came to a loss or gradient that is not finite."""


class RuntimeUnavailableError(QaloraError):
    """A requested runtime is missing or crashed (exit 3); never a silent skip."""

    code = ExitCode.RUNTIME_UNAVAILABLE


class UnsafeInputError(QaloraError):
    """A file tries something it must not: absurd sizes, escaping paths, overlapping tensors (exit 4)."""

    code = ExitCode.UNSAFE_INPUT


def together(errors: Sequence[QaloraError]) -> QaloraError:
    """The error itself when it is alone, else one that holds them all; its exit code is that of the gravest: unsafe
    input, then bad input, then a runtime.
    """
    if len(errors) == 1:
        return errors[0]
    order = (UnsafeInputError, InputError, RuntimeUnavailableError, ParityError)
    kind = next(kind for kind in order if any(isinstance(error, kind) for error in errors))
    found = kind(f"{len(errors)} findings, each of which stops this")
    found.several = tuple(errors)
    return found


def from_system(error: BaseException) -> QaloraError | None:
    """What the machine or a native library refused, in our words; None for every other exception, which is a defect."""
    if isinstance(error, OSError) and error.errno is not None:
        return InputError(
            f"cannot read or write a file: {error.strerror or os.strerror(error.errno)}",
            where=error.filename or "",
            fix="check the path, its permissions and the space on the disk",
        )
    # torch's class and pyo3's are known by their names: nothing is imported for an error message.
    refused = isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
    if refused or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return InputError(
            "out of memory",
            why=str(error).partition("\n")[0],
            fix="close other programs, use a smaller batch, or a machine with more memory",
        )
    if is_panic(error):
        return InputError(
            "a native library gave up on its input",
            why=str(error),
            fix="one of the given files is damaged, or made for another version of the library: fetch it again",
        )
    return None


@contextlib.contextmanager
def refused_by(
    library: str, *, where: object, doing: str = "read this", fix: str = "fetch the file again"
) -> Iterator[None]:
    """Whatever `library` raises on a file that it cannot read, as InputError; for calls of the library alone.

    doing: what it was asked to do, for the message.

    Libraries raise what the first wrong value happens to lead to (TypeError, AttributeError, a panic); all of it says
    that the file is not as it should be.
    """
    try:
        yield
    except (QaloraError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise  # an interrupt, an exit
        why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise InputError(f"{library} cannot {doing}", where=where, why=why, fix=fix) from error


def is_panic(error: BaseException) -> bool:
    """Whether a Rust library (tokenizers, safetensors) panicked; its exception is not an Exception."""
    return type(error).__name__ == "PanicException"
