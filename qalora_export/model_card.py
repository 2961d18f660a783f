"""README.md beside the artifacts of a run: what the model is, how to run it, what was proven, where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qalora_export.checkpoint.manifest import MANIFEST, has_manifest, read_manifest
from qalora_export.checkpoint.output import write_signed
from qalora_export.evaluation import read_score
from qalora_export.grid.named import AFFINE16
from qalora_export.recipe import Recipe
from qalora_export.safety import sha256_file
from qalora_export.verify.report.parity_report import read_report

CARD = "README.md"


def write_card(recipe: Recipe) -> Path | None:
    """Write the card of a finished run; it holds no times and no absolute paths.

    A README.md that is not ours stays, and the card gets another name (see write_signed). Returns its path.
    """
    return write_signed(Path(recipe.out) / CARD, card(recipe), comment=("<!-- ", " -->"))


def card(recipe: Recipe) -> str:
    """The card as Markdown, from the recipe and from what the stages wrote."""
    out, t = Path(recipe.out), recipe.train
    method, kept = ("QA-LoRA+", "code") if t.scales else ("QA-LoRA", "code or a scale")
    parts = [
        f"# {Path(recipe.model).name}, quantized for the edge",
        f"{_quantized(recipe)}, fine-tuned with {method} of rank {t.rank}, merged without changing a {kept}. "
        "Made by qalora-export.",
        _usage(out),
        _score(out),
        _parity(out),
        _provenance(out),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _quantized(recipe: Recipe) -> str:
    """How the base came to its codes: as it was imported, or by the settings of `quantize`; both for a mixed source."""
    q, base = recipe.quantize, Path(recipe.out) / "base.qalora"
    settings = read_manifest(base).get("settings") if has_manifest(base) else None
    method = str(settings.get("method", q.method)) if isinstance(settings, dict) else q.method
    grid = "" if q.grid == AFFINE16.name else f" on the grid {q.grid}"
    anew = f"quantized with {q.method.upper()} to {q.bits} bits in groups of {q.group_size}{grid}"
    if q.preset is not None:
        anew = f"quantized with {q.method.upper()} by the preset {q.preset}"
    kinds = method.split(" + ")
    made = ", in part ".join(f"taken as it was quantized ({k})" if k.startswith("import") else anew for k in kinds)
    return made[0].upper() + made[1:]


def _usage(out: Path) -> str:
    lines = ["## How to run it", ""]
    if (out / "model.gguf").is_file():
        adapter = " --lora model.lora.gguf" if (out / "model.lora.gguf").is_file() else ""
        lines.append(f"* llama.cpp: `llama-cli -m model.gguf{adapter}`")
    if (out / "onnx").is_dir():
        lines.append("* ONNX Runtime GenAI: `onnxruntime_genai.Model('onnx')`; ONNX Runtime: `onnx/onnx/model.onnx`")
        lines.append("* transformers.js: `await pipeline('text-generation', 'onnx')`")
    lines.append("* Transformers: `import qalora_export`, then `AutoModelForCausalLM.from_pretrained('merged.qalora')`")
    return "\n".join(lines)


def _score(out: Path) -> str:
    scores = {label: out / f"score.{label}.json" for label in ("base", "merged")}
    if not all(path.is_file() for path in scores.values()):
        return ""
    found = {label: read_score(path) for label, path in scores.items()}
    rows = "\n".join(f"| {label} | {score['exact']}/{score['total']} |" for label, score in found.items())
    return f"## Task score\n\n| model | exact match |\n|---|---|\n{rows}"


def _parity(out: Path) -> str:
    path = out / "report" / "report.json"
    if not path.is_file():
        return ""
    report = read_report(path)
    rows = "\n".join(_gate_row(entry) for entry in report["gates"])
    head = "| gate | runtime | status | measured | bound |\n|---|---|---|---|---|"
    return f"## Parity with PyTorch float32: {report['verdict']}\n\n{head}\n{rows}\n\nAll of it: report/report.html."


def _gate_row(entry: dict[str, Any]) -> str:
    measured, bound, raw = (_number(entry.get(key)) for key in ("measured", "bound", "raw"))
    if entry.get("raw") is not None and raw != measured:
        measured = f"{raw}, scaled {measured}"
    return f"| {entry['gate']} {entry['title']} | {entry['runtime']} | {entry['status']} | {measured} | {bound} |"


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value or "–")


def _provenance(out: Path) -> str:
    manifests = [out / name / MANIFEST for name in ("base.qalora", "adapter", "merged.qalora", "onnx")]
    manifests.append(out / f"model.gguf.{MANIFEST}")
    rows = [f"| {path.relative_to(out)} | `{sha256_file(path)}` |" for path in manifests if path.is_file()]
    intro = "## Provenance\n\nEach manifest names its files, tensors and parents by sha256."
    return "\n".join([intro, "", "| manifest | sha256 |", "|---|---|", *rows])
