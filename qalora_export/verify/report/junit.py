"""junit.xml: one test case per gate and runtime. "not run" is an error, never a skip: CI counts a skip as green."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from qalora_export.verify.gates.registry import all_gates
from qalora_export.verify.report.parity_report import JUNIT, ParityReport, explain
from qalora_export.verify.rule import Entry

# How each status is written; None: nothing is added, which is what JUnit calls passed.
ELEMENTS = {"pass": None, "fail": "failure", "not run": "error"}


def write_junit(report: ParityReport, folder: Path) -> None:
    """One <testsuite> per runtime."""
    root = ElementTree.Element("testsuites", _counts(report.entries) | {"name": "verify-parity"})
    for runtime in dict.fromkeys(entry.runtime for entry in report.entries):
        entries = [entry for entry in report.entries if entry.runtime == runtime]
        suite = ElementTree.SubElement(root, "testsuite", _counts(entries) | {"name": runtime})
        for entry in entries:
            _add(suite, entry)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode", xml_declaration=False)
    (folder / JUNIT).write_text(f'<?xml version="1.0" encoding="UTF-8"?>\n{_printable(text)}\n', encoding="utf-8")


def _add(suite: ElementTree.Element, entry: Entry) -> None:
    name = f"{entry.gate} {all_gates()[entry.gate].title}"
    case = ElementTree.SubElement(suite, "testcase", {"classname": f"verify-parity.{entry.runtime}", "name": name})
    element = ELEMENTS[entry.status]
    if element is not None:
        child = ElementTree.SubElement(case, element, {"type": entry.status, "message": _printable(explain(entry))})
        child.text = _printable("\n".join(entry.where))
    ElementTree.SubElement(case, "system-out").text = _printable(entry.detail)


def _counts(entries: list[Entry]) -> dict[str, str]:
    statuses = [entry.status for entry in entries]
    return {
        "tests": str(len(statuses)),
        "failures": str(statuses.count("fail")),
        "errors": str(statuses.count("not run")),
        "skipped": "0",
    }


def _printable(text: str) -> str:
    """XML 1.0 forbids most control characters even when escaped; findings quote texts that hold them."""
    return "".join(
        c if c in "\t\n\r" or (ord(c) >= 0x20 and ord(c) not in (0xFFFE, 0xFFFF)) else "\ufffd" for c in text
    )
