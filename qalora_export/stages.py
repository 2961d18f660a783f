"""The stages of a recipe, in order: what each reads, its settings, what it writes, and the function that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_export.recipe import EvaluateSettings, Recipe, Settings, VerifySettings

VERIFY = "verify-parity"
STAGES = (  # every stage that a recipe may have
    "quantize",
    "train",
    "merge",
    "evaluate base",
    "evaluate merged",
    "export gguf",
    "export onnx",
    VERIFY,
)


class Verify(Settings):
    """What verify-parity's result depends on beside files."""

    verify: VerifySettings
    evaluate: EvaluateSettings | None


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: what it reads, its settings, what it writes, and how. beside: what it writes next to its output."""

    name: str
    inputs: tuple[Path, ...]
    settings: Settings | None
    output: Path
    action: Callable[[bool], Any]  # argument: replace what is there
    beside: tuple[Path, ...] = ()


def plan(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe in order, with paths under recipe.out."""
    from qalora_export.checkpoint.manifest import sidecar_path
    from qalora_export.formats.gguf.export import export_gguf
    from qalora_export.formats.gguf.split import adapter_path
    from qalora_export.formats.onnx.export import export_onnx
    from qalora_export.models.sources import locate
    from qalora_export.qalora.merge import merge
    from qalora_export.qalora.training.stage import train
    from qalora_export.quantization.stage import quantize
    from qalora_export.verify.stage import verify_parity

    out, source = Path(recipe.out), locate(recipe.model, recipe.revision)
    base, adapter, merged = out / "base.qalora", out / "adapter", out / "merged.qalora"
    gguf = out / "model.gguf" if recipe.export.gguf else None
    onnx = out / "onnx" if recipe.export.onnx else None
    q, t, v = recipe.quantize, recipe.train, recipe.verify
    stages = [
        Stage(
            "quantize",
            _files(source.path, q.calibration),
            q,
            base,
            lambda f: quantize(recipe.model, base, q, force=f, revision=source.commit),
        ),
        Stage("train", _files(base, t.data, t.validation), t, adapter, lambda f: train(base, adapter, t, force=f)),
        Stage("merge", (base, adapter), None, merged, lambda f: merge(base, adapter, merged, force=f)),
    ]
    scores, e = tuple[Path, ...](), recipe.evaluate
    if e is not None:
        scores = tuple(_score_file(model, out) for model in (base, merged))
        stages += [_score_stage("evaluate base", base, e, out), _score_stage("evaluate merged", merged, e, out)]
    if recipe.export.gguf is not None and gguf is not None:
        g = recipe.export.gguf
        beside = (sidecar_path(gguf), *([adapter_path(gguf)] if g.layout == "split" else []))
        stages.append(Stage("export gguf", (merged,), g, gguf, lambda f: export_gguf(merged, gguf, g, force=f), beside))
    if recipe.export.onnx is not None and onnx is not None:
        o = recipe.export.onnx
        stages.append(Stage("export onnx", (merged,), o, onnx, lambda f: export_onnx(merged, onnx, o, force=f)))
    artifacts = tuple(path for path in (gguf, onnx) if path is not None)
    if artifacts:
        report = out / "report"
        stages.append(
            Stage(
                VERIFY,
                (*_files(merged, v.prompts, None if e is None else e.data), base, *scores, *artifacts),
                Verify(verify=v, evaluate=e),
                report,
                lambda f: verify_parity(
                    merged, report, v, gguf=gguf, onnx=onnx, base=base, original=source.path, evaluate=e, force=f
                ),
            )
        )
    return stages


def _score_stage(name: str, model: Path, settings: EvaluateSettings, out: Path) -> Stage:
    from qalora_export.evaluation import evaluate

    target = _score_file(model, out)
    return Stage(
        name, _files(model, settings.data), settings, target, lambda f: evaluate(model, settings, target, force=f)
    )


def _files(*paths: Path | str | None) -> tuple[Path, ...]:
    return tuple(Path(path) for path in paths if path is not None)


def _score_file(model: Path, out: Path) -> Path:
    return out / f"score.{model.name.removesuffix('.qalora')}.json"
