"""report.html: one self-contained page that convinces a stranger, or shows what is wrong and where."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qalora_export.verify.gates.registry import all_gates
from qalora_export.verify.report import plots
from qalora_export.verify.report.bisect_plot import data_uri, error_plot
from qalora_export.verify.report.parity_report import HTML, ParityReport, number

TEMPLATE = "report.html.j2"
HEADLINES = {
    "pass": "PASS: every gate of every runtime",
    "fail": "FAIL: the artifact does not compute the checkpoint's numbers",
    "not run": "NOT PROVEN: a requested runtime is missing or crashed",
}
MARKS = {"pass": "✓", "fail": "✗", "not run": "–"}
# Figures of the noise table: name in metrics.Summary, heading.
NOISE = {
    "kl_mean": "KL mean",
    "kl_p99": "KL p99",
    "kl_max": "KL max",
    "nmse_mean": "NMSE mean",
    "disagreements": "other first choices",
    "perplexity_shift": "shift, nats/token",
}


def write_html(report: ParityReport, folder: Path) -> None:
    """Render the page; everything from outside goes through autoescape."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("qalora_export.verify.report", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": show, "mib": mib}
    (folder / HTML).write_text(environment.get_template(TEMPLATE).render(**context(report)), encoding="utf-8")


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
        "noise": [noise_rows(report, runtime) for runtime in runtimes],
        "noise_names": NOISE,
        "bisections": [(found, data_uri(error_plot(found))) for found in report.bisections.values()],
        "speeds": [speed_row(report, runtime) for runtime in runtimes],
        "plots": {
            "positions": plots.error_by_position(report.positions, runtimes, lengths),
            "kl": plots.kl_histogram(report.positions, runtimes),
            "agreement": plots.agreement(report.positions, runtimes),
        },
    }


def noise_rows(report: ParityReport, runtime: str) -> dict[str, Any]:
    """Shipped path, floor, bound and base of one runtime, each a table of figures; absent parts are empty."""
    entry = next(entry for entry in report.entries if (entry.gate, entry.runtime) == ("G3", runtime))
    floor = report.facts["noise_floor"].get(runtime, {})
    figures = entry.figures or {}
    return {
        "runtime": runtime,
        "source": floor.get("source", "not measured"),
        "status": entry.status,
        "shipped": figures,
        "floor": floor.get("figures", {}),
        "base": floor.get("measured_on_base") or {},
        "bound": {check.figure: check.bound for check in entry.checks},
    }


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
