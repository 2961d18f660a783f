"""report.html, junit.xml and the table: complete, escaped, self-contained, and honest about what was not run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from qalora_export.checkpoint.provenance import Link
from qalora_export.cli.parity_table import print_report
from qalora_export.verify.gates.registry import all_gates
from qalora_export.verify.metrics import position_metrics
from qalora_export.verify.report import html, junit
from qalora_export.verify.report import parity_report as report
from qalora_export.verify.report.parity_report import ParityReport
from qalora_export.verify.rule import Entry

RUNTIMES = ("llama.cpp", "onnxruntime")
EVIL = "<script>alert(1)</script>\x01"


def metrics(seed: int, *, bad: bool = False):
    random = np.random.default_rng(seed)
    a = np.log(random.dirichlet(np.ones(12), 40)).astype(np.float32)
    b = (a + random.normal(0, 1e-3, a.shape)).astype(np.float32)
    if bad:
        b[3, 3] = np.nan
    return position_metrics(a, b, np.append(np.zeros(39, np.int32), -1).astype(np.int32))


def entry(gate: str, runtime: str, status: str) -> Entry:
    if status == "not run":
        return all_gates()[gate].not_run(runtime, f"crashed: {EVIL}")
    limits = all_gates()[gate].limits
    figures = dict.fromkeys((limit.figure for limit in limits), 0.0 if status == "pass" else 7.0)
    figures |= {limit.raw: 3.0 if limit.figure == "nmse_scaled_max" else 0.0 for limit in limits if limit.raw}
    limits = limits or list(all_gates()["G5"].limits)
    return all_gates()[gate].judge(
        runtime, figures, detail=f"detail of {gate}", where=[f"tensor {EVIL}"], limits=limits
    )


def made(statuses: dict[tuple[str, str], str] | None = None, *, bad: bool = False) -> ParityReport:
    statuses = statuses or {}
    entries = [entry(g, r, statuses.get((g, r), "pass")) for r in RUNTIMES for g in all_gates()]
    facts = {
        "not_checked": ["<the original> is not here"],
        "task": "the first 32 of 300 questions of <test>.jsonl",
        "checkpoint": {
            "name": EVIL,
            "kind": "merged",
            "manifest_sha256": "ab",
            "parameters": 1000,
            "quantized_parameters": 900,
        },
        "artifacts": [
            {
                "name": "model.gguf",
                "runtimes": list(RUNTIMES),
                "bytes": 2**21,
                "bits_per_weight": 4.5,
                "context": {"positions": 256, "note": "the context is 256 positions, not the model's 1024: because"},
                "sha256": "cd",
                "files": {},
            }
        ],
        "probe": {
            "sequences": 2,
            "positions": 40,
            "sha256": "ef",
            "seed": 0,
            "prompts": None,
            "texts": 3,
            "conversations": 1,
            "names": ["a", "b"],
            "lengths": [15, 25],
        },
        "reference": {},
        "settings": {},
        "command": "qalora-export verify-parity x",
        "runtimes": {
            "llama.cpp/shipped/prefill": {
                "version": "1",
                "prefill_tokens_per_second": 1234.5,
                "peak_rss_bytes": 2**20,
                "threads": 2,
                "settings": {"kv": "f16"},
            }
        },
        "environment": {"qalora-export": "0", "python": "3", "platform": "p", "cpu": {}, "packages": {"torch": "2"}},
    }
    links = [
        Link("model.gguf", "checkpoint", EVIL, "a" * 64, "verified"),
        Link("m", "base", "b", "", "not found", "away"),
    ]
    positions = {(r, p): metrics(i, bad=bad) for i, r in enumerate(RUNTIMES) for p in ("exact", "shipped", "simulated")}
    return ParityReport(Path("out"), entries, links, facts, positions)


class Links(HTMLParser):
    """Every address and tag of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]


def page(folder: Path, made_report: ParityReport) -> tuple[str, Links]:
    html.write_html(made_report, folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    parser = Links()
    parser.feed(text)
    return text, parser


@pytest.mark.pictures
def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    text, parser = page(tmp_path, made())
    assert parser.addresses
    assert all(address.startswith("data:image/png;base64,") for address in parser.addresses)
    assert not {"script", "link", "iframe", "object", "form"} & set(parser.tags)
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "url(" not in text and "@import" not in text
    assert "Not checked: &lt;the original&gt; is not here." in text


def test_the_page_has_a_row_for_every_gate_and_runtime(tmp_path: Path) -> None:
    text, _ = page(tmp_path, made())
    assert text.count(">✓ pass</span>") >= 2 * len(RUNTIMES) * len(all_gates())
    for part in (
        "PASS",
        "Provenance",
        "256 positions, not the model",
        "How to reproduce",
        "bits per weight",
        "1,234",
        "int8 simulated",
        "a" * 20,
        "away",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("status", "word", "code"), [("fail", "FAIL", 1), ("not run", "NOT PROVEN", 3), ("pass", "PASS", 0)]
)
def test_the_verdict_is_on_top(status: str, word: str, code: int, tmp_path: Path) -> None:
    text, _ = page(tmp_path, made({("G2", "llama.cpp"): status, ("G3", "llama.cpp"): status}))
    heading = re.search(r"<h1>(.*?)</h1>", text)
    assert heading is not None
    assert heading.group(1).startswith(word)
    assert f"Exit code {code}." in text


@pytest.mark.pictures
def test_runs_that_gave_nothing_still_make_a_page(tmp_path: Path) -> None:
    empty = made({(g, r): "not run" for g in all_gates() for r in RUNTIMES})
    empty.positions.clear()
    empty.facts["runtimes"] = {}
    text, _ = page(tmp_path, empty)
    assert "NOT PROVEN" in text


@pytest.mark.pictures
def test_nan_positions_are_drawn(tmp_path: Path) -> None:
    clean, _ = page(tmp_path, made())
    broken, _ = page(tmp_path, made(bad=True))
    assert clean != broken


@pytest.mark.pictures
def test_equal_reports_make_equal_pages(tmp_path: Path) -> None:
    assert page(tmp_path, made())[0] == page(tmp_path, made())[0]


def test_junit_counts_and_parses(tmp_path: Path) -> None:
    junit.write_junit(made({("G1", "llama.cpp"): "fail", ("G4", "onnxruntime"): "not run"}), tmp_path)
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    counts = [root.get(name) for name in ("tests", "failures", "errors", "skipped")]
    assert counts == [str(len(RUNTIMES) * len(all_gates())), "1", "1", "0"]
    assert [suite.get("name") for suite in root] == list(RUNTIMES)
    failure = root.find("./testsuite[@name='llama.cpp']/testcase[@name='G1 weights']/failure")
    assert failure is not None
    assert "7 > 0" in str(failure.get("message"))
    assert "tensor <script>" in str(failure.text)
    assert root.find("./testsuite[@name='onnxruntime']/testcase[@name='G4 decode']/error") is not None


def test_report_json_holds_what_json_cannot(tmp_path: Path) -> None:
    made_report = made(bad=True)
    made_report.facts["reference"] = {"x": np.float32(0.5), "y": float("inf"), "z": (np.int64(3),)}
    report.write_report(made_report, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["reference"] == {"x": 0.5, "y": "inf", "z": [3]}
    assert [(e["gate"], e["runtime"]) for e in written["gates"]] == [(g, r) for r in RUNTIMES for g in all_gates()]


def test_the_table_names_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(made({("G1", "llama.cpp"): "fail", ("G4", "onnxruntime"): "not run"}))
    shown = capsys.readouterr().err
    assert "verdict: fail" in shown
    assert "G1 llama.cpp: fail" in shown
    assert "tensor <script>" in shown
    assert "G4 onnxruntime: not run" in shown
    assert "256 positions, not" in shown


def test_a_scaled_figure_stands_beside_what_was_measured_with_its_rule(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = made()
    print_report(found)
    shown = capsys.readouterr().err
    assert "3, scaled 0 ≤ 1e-09" in shown
    assert "divided by what float32 rounding alone makes of it" in " ".join(shown.split())
    text, _ = page(tmp_path, found)
    assert "3, scaled 0" in text and "divided by what float32 rounding alone" in text
    written = next(entry for entry in found.as_json()["gates"] if entry["gate"] == "G2")
    assert (written["headline"], written["headline_raw"], written["raw"]) == (0, 3, 3)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.0, "12"), (1e-9, "1e-09"), (4589.7, "4,590"), (5353472.0, "5.35e+06"), (0.5, "0.5")],
)
def test_numbers(value: float, text: str) -> None:
    assert report.number(value) == text
