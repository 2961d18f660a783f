"""What verify-parity found, as an object and as report.json.

report.json (format "qalora-parity/1"):

    verdict       "pass" | "fail" | "not run"; exit_code 0 | 1 | 3
    costs         one row per model from the original to each runtime's paths: model, against (what kl and top1 are
                  measured against), kl, loss (nats), top1 over all positions of the probe set, kl_text, top1_text over
                  its text; score (exact, total); null where it is not at hand, and note says why
    checkpoint    name, kind, manifest_sha256, parameters, quantized_parameters
    artifacts     one per artifact: runtime kinds it serves, name, bytes, sha256, bits_per_weight, context (positions:
                  all that this report speaks of; note: why they are fewer than the model's)
    probe         sequences, positions, sha256, seed, prompts, names and lengths of the sequences
    task          what the task score in `costs` is of, in words; null where no task was given
    gates         one entry per gate and runtime: gate, title, row (what its headline figure means to a reader),
                  headline (that figure, null where it was not measured), headline_raw (the same before it was scaled,
                  null where nothing is), runtime, status ("pass" | "fail" | "not run"), measured, raw (before it was
                  scaled), bound, unit, figure (which of the checks these are: the first that failed, else the
                  headline), detail, where (tensors, facts or positions), checks (every figure with its bound and
                  reason), figures, seconds (what several gates look at is in those of the first)
    runtimes      per run "runtime/path/mode": the runner's fingerprint (version, CPU flags, threads, tokens/s, memory)
    bisect        per runtime whose logits failed: first_layer, first_tensor, what, nmse, and for every layer and every
                  point inside the first wrong one: name, what, nmse, bound, diverges; plotted in bisect-RUNTIME.svg
    reference     what computed the reference, in how many seconds; from_earlier_runs: what was kept (verify.store)
    environment   packages, machine
    device        null, or what answered (verify.device): answers and pack, or server; machine, packages, words
    not_checked   what is not here to be held against (ancestors, manifests), each in words, as in the verdict line
    provenance    links: child, role, parent, sha256, state ("verified" | "not found" | "broken"), note
    settings      the resolved settings;  command: how to run it again;  positions: name of the npz with every position

Numbers that JSON cannot hold are the strings "inf", "-inf" and "nan".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qalora_export.checkpoint.provenance import Link
from qalora_export.errors import ExitCode, UnsafeInputError
from qalora_export.safety import read_json
from qalora_export.verify.bisect.search import Bisection
from qalora_export.verify.gates.registry import all_gates
from qalora_export.verify.metrics import PositionMetrics
from qalora_export.verify.report.bisect_plot import error_plot
from qalora_export.verify.report.costs import Cost
from qalora_export.verify.rule import Check, Entry, exit_code

FORMAT = "qalora-parity/1"
STATUSES = ("pass", "fail", "not run")
REPORT, POSITIONS, HTML, JUNIT = "report.json", "positions.npz", "report.html", "junit.xml"
NOT_AT_HAND = "not at hand"
VERDICTS = {ExitCode.OK: "pass", ExitCode.PARITY_FAILED: "fail", ExitCode.RUNTIME_UNAVAILABLE: "not run"}


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Every finding of one run. out: the report folder. positions: per-position metrics by (runtime, path)."""

    out: Path
    entries: list[Entry]
    links: list[Link]
    facts: dict[str, Any]
    positions: dict[tuple[str, str], PositionMetrics] = field(default_factory=dict)
    bisections: dict[str, Bisection] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)

    @property
    def exit_code(self) -> ExitCode:
        return exit_code(self.entries)

    @property
    def verdict(self) -> str:
        return VERDICTS[self.exit_code]

    @property
    def passed(self) -> bool:
        return self.exit_code == ExitCode.OK

    def as_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "format": FORMAT,
            "verdict": self.verdict,
            "exit_code": int(self.exit_code),
            "costs": [cost.as_json() for cost in self.costs],
            **self.facts,
            "gates": [entry_json(entry) for entry in self.entries],
            "provenance": [link.as_json() for link in self.links],
            "bisect": {runtime: found.as_json() for runtime, found in self.bisections.items()},
            "positions": POSITIONS,
        }


def entry_json(entry: Entry) -> dict[str, Any]:
    """One gate of one runtime."""
    gate, deciding = all_gates()[entry.gate], entry.deciding
    headline = next((check for check in entry.checks if check.figure == gate.limits[0].figure), None)
    return {
        "gate": entry.gate,
        "title": gate.title,
        "row": gate.row,
        "headline": headline.measured if headline else None,
        "headline_raw": headline.raw if headline else None,
        "runtime": entry.runtime,
        "status": entry.status,
        "figure": deciding.figure if deciding else None,
        "measured": deciding.measured if deciding else None,
        "raw": deciding.raw if deciding else None,
        "bound": deciding.bound if deciding else None,
        "unit": deciding.unit if deciding else None,
        "detail": entry.detail,
        "where": list(entry.where),
        "checks": [asdict(check) | {"passed": check.passed} for check in entry.checks],
        "figures": dict(entry.figures or {}),
        "seconds": round(entry.seconds, 3),
    }


def write_report(report: ParityReport, folder: Path) -> None:
    """report.json, positions.npz and a plot for each bisect."""
    text = json.dumps(plain(report.as_json()), indent=1, allow_nan=False, ensure_ascii=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    arrays = {
        f"{runtime}/{path}/{name}": getattr(metrics, name)
        for (runtime, path), metrics in report.positions.items()
        for name in ("nmse", "kl", "agree", "bad")
    }
    np.savez_compressed(folder / POSITIONS, **arrays)
    for runtime, found in report.bisections.items():
        (folder / f"bisect-{runtime}.svg").write_text(error_plot(found), encoding="utf-8")


def read_report(path: Path) -> dict[str, Any]:
    """A report.json, as far as others print it: verdict, and per gate its names, status and figures.

    Raises UnsafeInputError when it is none.
    """
    report = read_json(path)
    gates = report.get("gates") if isinstance(report, dict) else None
    if not isinstance(gates, list) or not isinstance(report.get("verdict"), str) or not all(map(_is_gate, gates)):
        raise UnsafeInputError("not a report of verify-parity", where=path, fix="run verify-parity again")
    return dict(report)


def _is_gate(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.get("status") not in STATUSES:
        return False
    texts = all(isinstance(entry.get(key), str) for key in ("gate", "title", "row", "runtime"))
    if not {"measured", "bound", "headline", "figure"} <= entry.keys():
        return False
    figures = (entry["measured"], entry["bound"], entry["headline"])
    named = entry["figure"] is None or isinstance(entry["figure"], str)
    return texts and named and all(value is None or type(value) in (int, float, str) for value in figures)


def withdraw(folder: Path) -> None:
    """Delete a report's verdict, the one that programs read first; other files of the folder stay."""
    for name in (REPORT, JUNIT, HTML, POSITIONS):
        (folder / name).unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """JSON's own types only: numpy numbers unwrapped, non-finite numbers as strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def explain(entry: Entry) -> str:
    """Every figure out of bounds, then the detail."""
    failed = [f"{c.figure} {measured_text(c)} > {number(c.bound)}" for c in entry.checks if not c.passed]
    return "; ".join([*failed, entry.detail])


def measured_text(check: Check) -> str:
    """The figure as it was measured and, where the bound is on a scaled one, that one beside it."""
    if check.raw is None or check.raw == check.measured:
        return number(check.measured)
    return f"{number(check.raw)}, scaled {number(check.measured)}"


def rules_of(entries: Iterable[Entry]) -> list[str]:
    """How figures of these entries were scaled, each rule once, where that changed one."""
    scaled = (check for entry in entries for check in entry.checks if check.raw not in (None, check.measured))
    return list(dict.fromkeys(f"{check.unit}, scaled: {check.rule}" for check in scaled))


def number(value: float) -> str:
    """Counts as they are, everything else with three significant digits."""
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


def nats(value: float | None) -> str:
    """A KL or a loss: small ones by their size, the others with four digits behind the point."""
    if value is None:
        return NOT_AT_HAND
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.4f}"


def share(value: float | None) -> str:
    """A share of positions, in percent."""
    return NOT_AT_HAND if value is None else f"{100 * value:.2f} %"
