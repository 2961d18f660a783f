"""What gate G6 found so far, and how a token and a text are shown in a finding."""

from __future__ import annotations

from dataclasses import dataclass, field

from qalora_export.verify.rule import Limit
from qalora_export.verify.target import Target

SHOWN, MOST = 3, 100  # findings of one kind in the table, and of single ids in report.json
CLIP = 60


@dataclass
class Found:
    """counts, findings: by figure of `limits`. warnings: by design. missing: what could not be asked. near: ties."""

    limits: tuple[Limit, ...]
    counts: dict[str, float] = field(default_factory=dict)
    findings: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = {limit.figure: 0 for limit in self.limits}

    def wrong(self, figure: str, finding: str, count: int = 1) -> None:
        self.counts[figure] += count
        self.findings.setdefault(figure, []).append(finding)

    @property
    def where(self) -> list[str]:
        """The first SHOWN of each figure, what explains most first: settings, ends, texts, then answers."""
        return [finding for limit in reversed(self.limits) for finding in self.findings.get(limit.figure, [])[:SHOWN]]


def shown_token(target: Target, index: int) -> str:
    texts = target.session.behaviour.texts
    return f"{index} {clip(texts[index] if index < len(texts) else None)}"


def clip(value: object) -> str:
    return repr(value)[:CLIP]
