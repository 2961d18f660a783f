"""What was found, as an object, as diagnosis in report.json and as a page.

report.json (format "qalora-diagnosis/1"):

    sentence, exit_code   the diagnosis;  verdict  "nothing broken" | "broken" | "not known"
    model, artifact       names; files: name -> sha256
    parts                 in order: part, title, runtime, state ("ok" | "broken" | "not run"), sentence, findings,
                          proof, figures, seconds
    costs                 by step away from the model: kl (mean), kl_max (nats), top1 (share), nmse, scaled
    tensors               name, stored_as, type, values, cause, ratio, error, cosine, scale, worst (see weights.Fit)
    environment           packages, machine
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_export.errors import ExitCode
from qalora_export.verify.foreign.diagnosis import Part, exit_code, in_one_sentence
from qalora_export.verify.foreign.holding import without_step
from qalora_export.verify.foreign.weights import Finding
from qalora_export.verify.report.environment import environment
from qalora_export.verify.report.html import write_page
from qalora_export.verify.report.parity_report import REPORT, plain

FORMAT, TEMPLATE = "qalora-diagnosis/1", "diagnosis.html.j2"
VERDICTS = {
    ExitCode.OK: "nothing broken",
    ExitCode.PARITY_FAILED: "broken",
    ExitCode.RUNTIME_UNAVAILABLE: "not known",
}
MARKS = {"ok": "✓", "broken": "✗", "not run": "–"}


@dataclass(frozen=True)
class Diagnosis:
    """One run. out: the report folder. files: of the artifact, name -> sha256. figures: what each step away from the
    model costs (report.json: costs).
    """

    out: Path
    model: str
    artifact: str
    files: Mapping[str, str]
    parts: list[Part]
    tensors: list[Finding]
    figures: Mapping[str, Mapping[str, float]]

    @property
    def exit_code(self) -> ExitCode:
        return exit_code(self.parts)

    @property
    def verdict(self) -> str:
        return VERDICTS[self.exit_code]

    @property
    def sentence(self) -> str:
        """The diagnosis."""
        return in_one_sentence(self.parts, self.cost)

    @property
    def cost(self) -> str:
        """What the last step costs that was measured."""
        if not self.figures:
            return "what it costs could not be measured"
        name, found = list(self.figures.items())[-1]
        return (
            f"this is what {self.prevailing} costs here, {found['kl']:.3g} nats (KL) and {100 * found['top1']:.1f} % "
            f"of first choices the same, {name}"
        )

    @property
    def prevailing(self) -> str:
        """The type that holds most values."""
        totals = dict[str, int]()
        for tensor in self.tensors:
            kind = without_step(tensor.kind)
            totals[kind] = totals.get(kind, 0) + tensor.values
        return max(totals, key=lambda kind: totals[kind], default="this file")

    def as_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "format": FORMAT,
            "verdict": self.verdict,
            "exit_code": int(self.exit_code),
            "sentence": self.sentence,
            "model": self.model,
            "artifact": {"name": self.artifact, "files": dict(self.files)},
            "parts": [
                {
                    "part": part.id,
                    "title": part.title,
                    "runtime": part.runtime,
                    "state": part.state,
                    "sentence": part.sentence,
                    "findings": list(part.findings),
                    "proof": part.proof,
                    "figures": dict(part.figures),
                    "seconds": round(part.seconds, 3),
                }
                for part in self.parts
            ],
            "costs": {name: dict(figures) for name, figures in self.figures.items()},
            "tensors": [tensor_json(tensor) for tensor in self.tensors],
            "environment": environment(),
        }


def tensor_json(tensor: Finding) -> dict[str, Any]:
    """One tensor."""
    found = {"name": tensor.name, "stored_as": tensor.stored_as, "type": tensor.kind, "values": tensor.values}
    near = tensor.fit
    figures = ("ratio", "error", "cosine", "scale", "worst")
    return found | {"cause": tensor.cause} | {name: getattr(near, name) if near else None for name in figures}


def write_diagnosis(diagnosis: Diagnosis, folder: Path) -> None:
    """report.json and report.html."""
    content = plain(diagnosis.as_json())
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    write_page(folder, TEMPLATE, {"report": content, "diagnosis": diagnosis, "marks": MARKS})
