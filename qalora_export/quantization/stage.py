"""The quantize stage: a model of any source in, a canonical checkpoint out, one decoder layer in memory at a time.

What a source holds in canonical form already (a GGUF file, a GPTQ checkpoint) is taken as it is, never quantized again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.output import claim_output
from qalora_export.data.calibration import calibration_windows
from qalora_export.errors import InputError
from qalora_export.grid import AFFINE16
from qalora_export.memory import peak_rss_bytes
from qalora_export.models.families import family_of
from qalora_export.models.skeleton import Activations, Skeleton
from qalora_export.progress import track
from qalora_export.quantization.embedding import quantize_embedding
from qalora_export.quantization.gguf_source import GgufModel
from qalora_export.quantization.gptq import gptq
from qalora_export.quantization.gptq_import import import_gptq
from qalora_export.quantization.hessian import Hessian, collect
from qalora_export.quantization.report import REPORT, ModuleReport, QuantizeReport, record, report_of
from qalora_export.quantization.rtn import round_to_nearest
from qalora_export.quantization.rules import Plan, resolve
from qalora_export.quantization.source import Source, gptq_config, open_source
from qalora_export.recipe import QuantizeSettings
from qalora_export.safety import StrPath, local_path, sha256_file

logger = logging.getLogger(__name__)


def quantize(
    model: StrPath,
    out: StrPath,
    settings: QuantizeSettings | None = None,
    *,
    force: bool = False,
    revision: str | None = None,
) -> QuantizeReport:
    """Quantize a model (fp16, bf16 or fp32, sharded or not) into the canonical checkpoint `out`.

    model: a local folder, a GGUF file, or the id of a model on the Hugging Face hub, there at `revision`. A folder in
    GPTQ format and a GGUF file are imported with their own codes, scales and offsets; only what has none is quantized.
    Without settings: 4 bits in groups of 32 by rounding to nearest, which needs no data. GPTQ loses less and takes
    QuantizeSettings(calibration="text.txt").

    CUDA is used when present. The same inputs and settings give the same bytes on the same machine. Raises InputError
    for everything the user can put right; nothing is left at `out` then.
    """
    out = local_path(out)
    if settings is None:
        settings = QuantizeSettings(method="rtn")
        logger.info("no settings: rounding to nearest; GPTQ, which loses less, takes calibration text")
    with (
        claim_output(out, force=force, inputs=(str(model), settings.calibration)),
        open_source(model, out, revision=revision, dequantize=settings.dequantize) as source,
    ):
        packed = gptq_config(source.folder)
        return (
            _quantize(source, out, settings, force=force)
            if packed is None
            else import_gptq(source, packed, out, settings, force=force)
        )


def _quantize(source: Source, out: Path, settings: QuantizeSettings, *, force: bool) -> QuantizeReport:
    began = time.perf_counter()
    folder = source.folder
    family_of(folder.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    skeleton = Skeleton(folder, device)
    skeleton.check_complete()
    planned = plan_modules(skeleton, settings)
    stored, plans = planned.stored, planned.plans
    notes = (*source.notes, *planned.notes)
    anew = set(plans) - stored
    method = " + ".join(["import-gguf"] * bool(stored) + [settings.method] * bool(anew))
    windows = calibration(folder, settings) if settings.method == "gptq" and anew else None
    with CanonicalWriter(
        out,
        folder.config,
        folder.companions(),
        kind="base",
        parents=[source.parent],
        settings=(_recorded(settings) if anew else {}) | {"method": method} | source.recorded,
        force=force,
    ) as writer:
        embeddings = {
            name: quantize_embedding(skeleton, name, plan, writer) for name, plan in planned.embeddings.items()
        }
        activations = None if windows is None else Activations(skeleton, windows)
        run = _Run(skeleton, plans, stored, settings, writer, activations)
        modules = (*embeddings.values(), *track(run.modules(), f"quantize ({method})", total=len(plans)))
        kept = run.write_rest(without=set(embeddings))
        tokens = 0 if windows is None else windows.size
        writer.add_json(REPORT, record(method, modules, kept=kept, calibration_tokens=tokens, notes=notes))
    return QuantizeReport(
        out,
        method,
        modules,
        kept,
        tokens,
        time.perf_counter() - began,
        peak_rss_bytes(),
        torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        notes,
    )


@dataclass(frozen=True, slots=True)
class Planned:
    """stored: modules that the source holds in canonical form. plans: how every module is quantized, those included, in
    the model's order. embeddings: how embeddings go into blocks, those that the source holds in a grid's included.
    """

    stored: set[str]
    plans: dict[str, Plan]
    embeddings: dict[str, Plan]
    notes: tuple[str, ...] = ()


def plan_modules(skeleton: Skeleton, settings: QuantizeSettings) -> Planned:
    """Raises InputError as `resolve` does, and for rules when nothing is left for them."""
    folder, linears = skeleton.folder, skeleton.linears()
    kept = folder.stored_modules() if isinstance(folder, GgufModel) else {}
    plans, tables, held = dict[str, Plan](), skeleton.embeddings(), dict[str, Plan]()
    if isinstance(folder, GgufModel):
        held = {name: plan for name in tables if (plan := folder.embedding_plan(name)) is not None}
        plans = {name: Plan(*kept[name], sym=False, grid=folder.grid_of(name)) for name in linears if name in kept}
    rest = {name: linear.in_features for name, linear in linears.items() if name not in plans}
    inside = skeleton.layer_name(0).removesuffix("0")
    if plans and not any(name.startswith(inside) for name in rest):
        if settings.rules or settings.preset:
            raise InputError(
                f"{'rules' if settings.rules else 'a preset'} cannot be applied to a model that is quantized already",
                where=folder.path,
                fix="remove them, or start from the unquantized model",
            )
        return Planned(set(plans), plans, held)
    free = {name: width for name, width in tables.items() if name not in held}
    resolved = resolve(settings, rest, inside=inside, tied=skeleton.tied, embeddings=free)
    every = plans | resolved.plans
    ordered = {name: every[name] for name in linears if name in every}
    return Planned(set(plans), ordered, held | resolved.embeddings, resolved.notes())


@dataclass
class _Run:
    skeleton: Skeleton
    plans: dict[str, Plan]
    stored: set[str]
    settings: QuantizeSettings
    writer: CanonicalWriter
    activations: Activations | None

    def modules(self) -> Iterator[ModuleReport]:
        """Quantize and write module after module; a layer's outputs after quantization feed the next layer."""
        count = self.skeleton.layer_count()
        outside = [name for name in self.plans if not name.startswith(f"{self.skeleton.prefix}layers.")]
        for index in range(count):
            yield from self._layer(index, propagate=index + 1 < count or bool(outside))
        if outside and self.activations is not None:
            with self.skeleton.materialized(f"{self.skeleton.prefix}norm") as norm:
                self.activations.run_plain(norm)
        for name in outside:
            yield from self._outside(name)

    def write_rest(self, *, without: set[str]) -> int:
        """Copy every tensor that is not quantized bit for bit; returns how many. without: embeddings in blocks."""
        quantized = {f"{name}.weight" for name in (*self.plans, *without)}
        rest = [name for name in self.skeleton.folder.names() if name not in quantized]
        for name in track(rest, "copy what is not quantized"):
            self.writer.add(name, np.asarray(self.skeleton.folder.tensor(name)))
        return len(rest)

    def _layer(self, index: int, *, propagate: bool) -> Iterator[ModuleReport]:
        name, activations = self.skeleton.layer_name(index), self.activations
        with self.skeleton.materialized(name) as layer:
            linears = {
                m: linear
                for m, linear in self.skeleton.linears().items()
                if m in self.plans and m.startswith(f"{name}.")
            }
            wanted = {m: linear for m, linear in linears.items() if m not in self.stored}
            hessians: dict[str, Hessian] = {}
            if activations is not None and wanted:
                hessians = collect(wanted, lambda: activations.run(layer, index, keep=False))
            for module, linear in linears.items():
                yield self._quantize(module, linear, hessians[module].value() if module in hessians else None)
            if activations is not None and propagate:
                activations.run(layer, index, keep=True)

    def _outside(self, name: str) -> Iterator[ModuleReport]:
        linear = self.skeleton.linears()[name]
        with self.skeleton.materialized(name):
            hessian = None
            if self.activations is not None:
                hessian = Hessian(linear.in_features, self.skeleton.device)
                for batch in self.activations.batches():
                    hessian.add(batch)
            yield self._quantize(name, linear, None if hessian is None else hessian.value())

    def _quantize(self, name: str, linear: nn.Linear, hessian: Tensor | None) -> ModuleReport:
        """Quantize, write, put the dequantized weight in place of the source's, report."""
        plan, weight, folder = self.plans[name], linear.weight.data, self.skeleton.folder
        where = f"{folder.path}: {name}.weight"
        if name in self.stored and isinstance(folder, GgufModel):
            matrix = folder.stored(name)
            plan = replace(plan, sym=matrix.is_symmetric)
        elif hessian is None:
            matrix = round_to_nearest(weight, plan, where=where, mse=self.settings.method == "mse")
        else:
            damp, block_size, sweeps = self.settings.damp, self.settings.block_size, self.settings.sweeps
            matrix = gptq(weight, hessian, plan, where=where, damp=damp, block_size=block_size, sweeps=sweeps)
        self.writer.add_quantized(name, matrix)
        result = torch.from_numpy(matrix.dequantize()).to(weight.device)
        report = report_of(name, plan, weight, result, hessian)
        weight.copy_(result)
        return report


def calibration(folder: ModelFolder, settings: QuantizeSettings) -> NDArray[np.int64]:
    """The calibration windows of these settings, as data.calibration makes them. InputError without a text."""
    from qalora_export.models.loading import load_tokenizer

    if settings.calibration is None:
        raise InputError(
            "GPTQ needs calibration text",
            where="quantize.calibration",
            fix="give --calibration FILE (plain text or JSONL), or use --method rtn",
        )
    limit = folder.context or settings.sequence_length
    return calibration_windows(
        Path(settings.calibration),
        load_tokenizer(folder.path),
        seed=settings.seed,
        samples=settings.calibration_samples,
        length=min(settings.sequence_length, limit),
    )


def _recorded(settings: QuantizeSettings) -> dict[str, Any]:
    """The settings as the manifest keeps them: the calibration text by name and hash, never by path; a grid only where
    it is not the usual one, a preset only where there is one.
    """
    recorded = settings.model_dump(mode="json", exclude={"preset"} if settings.preset is None else None)
    for entry in (recorded, *recorded["rules"]):
        if entry["grid"] in (None, AFFINE16.name):
            del entry["grid"]
    if settings.method == "gptq" and settings.calibration is not None:
        path = Path(settings.calibration)
        recorded["calibration"] = {"name": path.name, "sha256": sha256_file(path)}
    else:
        recorded["calibration"] = None
    return recorded
