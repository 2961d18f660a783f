"""Language models to the edge without losing a bit: quantize, train QA-LoRA, merge, export, prove.

    import qalora_export as q

    q.quantize("model", "base.qalora", q.QuantizeSettings(calibration="text.txt"))
    q.train("base.qalora", "adapter", q.TrainSettings(data="train.jsonl"))
    q.merge("base.qalora", "adapter", "merged.qalora")
    q.export_gguf("merged.qalora", "model.gguf")
    report = q.verify_parity("merged.qalora", "report", gguf="model.gguf")

Every path is a str or a PathLike. Every stage returns a frozen report, raises a QaloraError for what the user can put
right, prints nothing, and tells of its progress through `logging` (a line a minute at level INFO).

Importing this package makes `AutoModelForCausalLM.from_pretrained` understand canonical checkpoints
(`quant_method = "qalora"`). Everything named here is imported when it is first used, torch with it, so `import
qalora_export` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qalora_export.qalora.registration import register_with_transformers
from qalora_export.version import __version__

if TYPE_CHECKING:
    from qalora_export.comparison.stage import ComparisonReport, compare
    from qalora_export.errors import InputError, ParityError, QaloraError, RuntimeUnavailableError, UnsafeInputError
    from qalora_export.evaluation import EvaluateReport
    from qalora_export.formats.export_report import ExportReport
    from qalora_export.formats.gguf.export import export_gguf
    from qalora_export.formats.onnx.export import export_onnx
    from qalora_export.formats.patch.apply import apply
    from qalora_export.formats.patch.export import PatchReport, export_patch
    from qalora_export.inspection.view import View
    from qalora_export.inspection.view import open_view as load
    from qalora_export.models.loading import load_model, load_tokenizer
    from qalora_export.pipeline import RunReport, run
    from qalora_export.qalora.merge import MergeReport, merge
    from qalora_export.qalora.training.stage import TrainReport, train
    from qalora_export.quantization.report import QuantizeReport
    from qalora_export.quantization.stage import quantize
    from qalora_export.recipe import (
        CompareSettings,
        EvaluateSettings,
        ExportSettings,
        GgufSettings,
        OnnxSettings,
        QuantizeRule,
        QuantizeSettings,
        Recipe,
        TrainSettings,
        VerifySettings,
    )
    from qalora_export.recipe_file import load_recipe
    from qalora_export.scores.stage import PerplexityReport, evaluate, perplexity
    from qalora_export.verify.device.pack import PackReport, pack_verification
    from qalora_export.verify.foreign.report import Diagnosis
    from qalora_export.verify.foreign.stage import diagnose
    from qalora_export.verify.report.parity_report import ParityReport
    from qalora_export.verify.stage import verify_parity

__all__ = [  # noqa: RUF022  (in the order of the line, then what it takes and raises)
    "quantize",
    "train",
    "merge",
    "export_gguf",
    "export_onnx",
    "export_patch",
    "apply",
    "verify_parity",
    "pack_verification",
    "diagnose",
    "evaluate",
    "perplexity",
    "compare",
    "run",
    "load",
    "load_model",
    "load_tokenizer",
    "load_recipe",
    "Recipe",
    "QuantizeSettings",
    "QuantizeRule",
    "TrainSettings",
    "EvaluateSettings",
    "CompareSettings",
    "ExportSettings",
    "GgufSettings",
    "OnnxSettings",
    "VerifySettings",
    "QuantizeReport",
    "TrainReport",
    "MergeReport",
    "ExportReport",
    "PatchReport",
    "ParityReport",
    "PackReport",
    "Diagnosis",
    "EvaluateReport",
    "PerplexityReport",
    "ComparisonReport",
    "RunReport",
    "View",
    "QaloraError",
    "InputError",
    "UnsafeInputError",
    "ParityError",
    "RuntimeUnavailableError",
    "__version__",
]

# Where a public name is defined ("module:name" where it has another name there); settings are in recipe, exceptions in
# errors. No name here is also a module or subpackage of ours: importing one of those sets it as an attribute of this
# package and would shadow the function.
_HOME = {
    "quantize": "quantization.stage",
    "train": "qalora.training.stage",
    "merge": "qalora.merge",
    "export_gguf": "formats.gguf.export",
    "export_onnx": "formats.onnx.export",
    "export_patch": "formats.patch.export",
    "apply": "formats.patch.apply",
    "verify_parity": "verify.stage",
    "pack_verification": "verify.device.pack",
    "diagnose": "verify.foreign.stage",
    "evaluate": "scores.stage",
    "perplexity": "scores.stage",
    "compare": "comparison.stage",
    "run": "pipeline",
    "load": "inspection.view:open_view",
    "load_model": "models.loading",
    "load_tokenizer": "models.loading",
    "load_recipe": "recipe_file",
    "QuantizeReport": "quantization.report",
    "TrainReport": "qalora.training.stage",
    "MergeReport": "qalora.merge",
    "ExportReport": "formats.export_report",
    "PatchReport": "formats.patch.export",
    "PackReport": "verify.device.pack",
    "ParityReport": "verify.report.parity_report",
    "Diagnosis": "verify.foreign.report",
    "EvaluateReport": "evaluation",
    "PerplexityReport": "scores.stage",
    "ComparisonReport": "comparison.stage",
    "RunReport": "pipeline",
    "View": "inspection.view",
}

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME.get(name) or ("errors" if name.endswith("Error") else "recipe")
    module, _, other_name = home.partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), other_name or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
