"""After the gates: a bisect for every runtime whose logits failed, into the report and in front of its findings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_export.errors import QaloraError
from qalora_export.progress import status
from qalora_export.verify.bisect.readers import THROUGH, LaunchTaps, reader_of
from qalora_export.verify.bisect.search import Bisection, Failure, bisect, explain, failure_of
from qalora_export.verify.reference.activations import ReferenceModel
from qalora_export.verify.report.parity_report import ParityReport
from qalora_export.verify.runtimes.records import ADAPTERS

if TYPE_CHECKING:
    from qalora_export.verify.stage import Session

OTHER_LOOP = "onnxruntime-genai"  # runs the graph that ONNX Runtime shows, in a loop of its own


def bisect_failures(session: Session, artifacts: dict[str, Path], report: ParityReport, launch: LaunchTaps) -> None:
    """Fill report.bisections and begin the findings of failed logits gates with what was found.

    A bisect that cannot be done is a note in the report: it never hides the failure that it was to explain.
    """
    model: ReferenceModel | None = None
    for runtime, artifact in artifacts.items():
        failure = failure_of(report.entries, report.positions, runtime, session.probes)
        if failure is None:
            continue
        with status(f"{runtime}: which part broke"):
            try:
                model = model or ReferenceModel(session.checkpoint.path, threads=session.settings.threads)
                found = _bisect(session, runtime, artifact, failure, model, launch)
            except QaloraError as error:
                found = Bisection(
                    runtime,
                    failure.gate,
                    failure.path,
                    failure.mode,
                    failure.sequence,
                    "",
                    note=f"{error.what} {error.why}".strip(),
                )
        report.bisections[runtime] = found
        report.entries = explain(report.entries, found)


def _bisect(
    session: Session, runtime: str, artifact: Path, failure: Failure, model: ReferenceModel, launch: LaunchTaps
) -> Bisection:
    adapter, config = ADAPTERS[runtime], session.checkpoint.config
    run: Any = session.exact[runtime] if failure.path == "exact" else adapter.shipped(artifact)
    read = reader_of(
        adapter.format,
        run,
        session.checkpoint,
        failure,
        session.workdir / f"{runtime}-bisect",
        threads=session.settings.threads,
        launch=launch,
    )
    found = bisect(runtime, failure, model, config["num_hidden_layers"], read, through=THROUGH[adapter.format])
    if runtime == OTHER_LOOP and found.first is None and not found.note:
        found = replace(
            found,
            note="ONNX Runtime computes this graph right: the fault lies in genai_config.json or in "
            "the generation loop",
        )
    return found
