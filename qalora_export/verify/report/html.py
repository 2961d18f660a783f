"""report.html: one self-contained page that convinces a stranger, or shows what is wrong and where."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_export.verify.gates.g3_shipped_path import cost_figures
from qalora_export.verify.gates.registry import all_gates
from qalora_export.verify.report import plots
from qalora_export.verify.report.bisect_plot import data_uri, error_plot
from qalora_export.verify.report.parity_report import HTML, ParityReport, measured_text, nats, number, rules_of, share

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = "report.html.j2"
HEADLINES = {
    "pass": "PASS: every gate of every runtime",
    "fail": "FAIL: the artifact does not compute the checkpoint's numbers",
    "not run": "NOT PROVEN: a runtime, or something else that had to be checked, is missing",
}
MARKS = {"pass": "✓", "fail": "✗", "not run": "–"}
# Figures of the table of costs: name in metrics.Summary or of gate G3, heading.
COSTS = {
    "kl_mean": "KL mean",
    "kl_p99": "KL p99",
    "kl_max": "KL max",
    "nmse_mean": "NMSE mean",
    "other_choices": "other first choices",
    "perplexity_shift": "shift, nats/token",
}


def write_html(report: ParityReport, folder: Path) -> None:
    """Render the page of a verification."""
    write_page(folder, TEMPLATE, context(report))


def write_page(folder: Path, template: str, content: Mapping[str, Any]) -> None:
    """report.html from a template of this package; everything from outside goes through autoescape."""
    (folder / HTML).write_text(_environment().get_template(template).render(**content), encoding="utf-8")


@cache
def _environment() -> Environment:
    """Kept, because it keeps the templates that it compiled."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("qalora_export.verify.report", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[[Any], str]] = {"number": show, "mib": mib, "share": share, "nats": nats}
    environment.filters |= filters | {"both": measured_text}
    return environment


def context(report: ParityReport) -> dict[str, Any]:
    """What the template shows."""
    runtimes = list(dict.fromkeys(entry.runtime for entry in report.entries))
    lengths = report.facts["probe"]["lengths"]
    return {
        "verdict": report.verdict,
        "headline": HEADLINES[report.verdict],
        "exit_code": int(report.exit_code),
        "marks": MARKS,
        "gates": list(all_gates().values()),
        "runtimes": runtimes,
        "entries": report.entries,
        "by_place": {(entry.gate, entry.runtime): entry for entry in report.entries},
        "facts": report.facts,
        "links": report.links,
        "steps": report.costs,
        "rules": rules_of(report.entries),
        "costs": [cost_rows(report, runtime) for runtime in runtimes],
        "cost_names": COSTS,
        "layers": [layer_rows(report, runtime) for runtime in runtimes],
        "bisections": [(found, data_uri(error_plot(found))) for found in report.bisections.values()],
        "speeds": [speed_row(report, runtime) for runtime in runtimes],
        "plots": {
            "positions": plots.error_by_position(report.positions, runtimes, lengths),
            "kl": plots.kl_histogram(report.positions, runtimes),
            "agreement": plots.agreement(report.positions, runtimes),
        },
    }


def cost_rows(report: ParityReport, runtime: str) -> dict[str, Any]:
    """What the shipped path of one runtime costs, as simulated and as allowed, each a table of figures by COST."""
    entry = next(entry for entry in report.entries if (entry.gate, entry.runtime) == ("G3", runtime))
    simulated = report.positions.get((runtime, "simulated"))
    return {
        "runtime": runtime,
        "shipped": entry.figures or {},
        "simulated": cost_figures(simulated) if simulated else {},
        "bound": {check.figure: check.bound for check in entry.checks},
    }


def layer_rows(report: ParityReport, runtime: str) -> dict[str, Any]:
    """The layers of gate G3 with the largest error of a product, and all of them for whoever unfolds the table."""
    entry = next(entry for entry in report.entries if (entry.gate, entry.runtime) == ("G3", runtime))
    layers = (entry.figures or {}).get("layers", [])
    return {"runtime": runtime, "status": entry.status, "layers": layers}


def speed_row(report: ParityReport, runtime: str) -> dict[str, Any]:
    """Version, tokens/s and memory of the shipped path, bits per weight of what it runs."""
    runs = report.facts["runtimes"]
    prefill, decode = (runs.get(f"{runtime}/shipped/{mode}", {}) for mode in ("prefill", "decode"))
    artifact = next(a for a in report.facts["artifacts"] if runtime in a["runtimes"])
    memory = [run["peak_rss_bytes"] for run in (prefill, decode) if run.get("peak_rss_bytes")]
    return {
        "runtime": runtime,
        "version": prefill.get("version") or decode.get("version"),
        "artifact": artifact,
        "prefill": prefill.get("prefill_tokens_per_second"),
        "decode": decode.get("decode_tokens_per_second"),
        "memory": max(memory, default=None),
        "threads": prefill.get("threads"),
        "settings": prefill.get("settings", {}),
    }


def show(value: Any) -> str:
    """A figure with three significant digits; a dash where there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–"
    return number(value) if math.isfinite(value) else str(value)


def mib(value: Any) -> str:
    """Bytes as MiB."""
    return f"{value / 2**20:,.1f} MiB" if isinstance(value, int | float) else "–"
