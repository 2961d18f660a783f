"""One exception class per exit code. Every message says what, where, why and what to do next."""

from enum import IntEnum


class ExitCode(IntEnum):
    OK = 0
    PARITY_FAILED = 1
    BAD_INPUT = 2
    RUNTIME_UNAVAILABLE = 3
    UNSAFE_INPUT = 4


class QaloraError(Exception):
    """Base of everything this project raises on purpose.

    what: the finding in one sentence.  where: file, tensor or setting.  why: the rule that was broken.
    fix: what the user can do next.
    """

    code = ExitCode.BAD_INPUT

    def __init__(self, what: str, *, where: object = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, str(where), why, fix
        parts = [what]
        parts += [f"where: {self.where}"] if self.where else []
        parts += [f"why: {why}"] if why else []
        parts += [f"next: {fix}"] if fix else []
        super().__init__(" | ".join(parts))


class ParityError(QaloraError):
    """A gate failed (exit 1)."""

    code = ExitCode.PARITY_FAILED


class InputError(QaloraError):
    """Bad usage, recipe or input (exit 2)."""

    code = ExitCode.BAD_INPUT


class RuntimeUnavailableError(QaloraError):
    """A requested runtime is missing or crashed (exit 3); never a silent skip."""

    code = ExitCode.RUNTIME_UNAVAILABLE


class UnsafeInputError(QaloraError):
    """A file tries something it must not: absurd sizes, escaping paths, overlapping tensors (exit 4)."""

    code = ExitCode.UNSAFE_INPUT


def from_system(error: Exception) -> QaloraError | None:
    """What the machine refused (a file, memory) in our words; None for every other exception, which is a defect."""
    if isinstance(error, OSError) and error.filename is not None:
        return InputError(
            f"cannot read or write a file: {error.strerror or error}",
            where=error.filename,
            fix="check the path, its permissions and the space on the disk",
        )
    # torch's class is known by its name: torch is not imported for an error message.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return InputError(
            "out of memory",
            why=str(error).partition("\n")[0],
            fix="close other programs, use a smaller batch, or a machine with more memory",
        )
    return None
