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
