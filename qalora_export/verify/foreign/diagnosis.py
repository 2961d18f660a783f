"""What is broken: one verdict per part in a fixed order, and one sentence for the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qalora_export.errors import ExitCode

State = Literal["ok", "broken", "not run"]
# A part that is broken explains what comes behind it, never what stands before it.
PARTS = {
    "weights": "weights",
    "graph": "graph and metadata",
    "tokenizer": "tokenizer",
    "template": "chat template",
    "ends": "end tokens and sampling",
    "kernels": "kernels",
}


@dataclass(frozen=True, slots=True)
class Part:
    """id: of PARTS. runtime: that was asked, "" where none was. sentence: what is broken, or what was seen to be right,
    or why it was not run. findings: one line each, the gravest first. proof: what was tried to isolate it.
    """

    id: str
    runtime: str
    state: State
    sentence: str
    findings: tuple[str, ...] = ()
    proof: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def title(self) -> str:
        return PARTS[self.id]

    def behind(self, cause: str, mended: str) -> Part:
        """This part where `cause` had to be mended first, so that it is broken whatever it says of the rest."""
        return replace(
            self, state="broken", sentence=cause, findings=(cause, *self.findings), proof=f"{mended}: {self.sentence}"
        )


def exit_code(parts: Iterable[Part]) -> ExitCode:
    """1 where something is broken, else 3 where something could not be run, else 0."""
    states = {part.state for part in parts}
    if "broken" in states:
        return ExitCode.PARITY_FAILED
    return ExitCode.RUNTIME_UNAVAILABLE if "not run" in states or not states else ExitCode.OK


def in_one_sentence(parts: Iterable[Part], cost: str) -> str:
    """The first part that is broken and what else is, or what is not known, or that nothing is and what it costs."""
    order = list(PARTS)
    parts = sorted(parts, key=lambda part: order.index(part.id))
    broken = [part for part in parts if part.state == "broken"]
    missing = [part for part in parts if part.state == "not run"]
    if broken:
        first = broken[0]
        others = list(dict.fromkeys(part.title for part in broken if part.id != first.id))
        also = f" Also broken: {', '.join(others)}." if others else ""
        return f"The {first.title} {_are(first)} broken: {first.sentence}.{also}"
    if missing:
        names = ", ".join(dict.fromkeys(part.title for part in missing))
        return f"Nothing is broken as far as it could be seen, but {names} could not be run: {missing[0].sentence}."
    return f"Nothing is broken: {cost}."


def _are(part: Part) -> str:
    return "is" if part.id in ("tokenizer", "template") else "are"
