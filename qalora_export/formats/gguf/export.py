"""Write a canonical checkpoint as GGUF, read it back with an independent reader, keep it only if nothing differs."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.generation import generation_of
from qalora_export.checkpoint.manifest import files_of, intact_meanwhile, parent_of, sidecar_path, write_sidecar
from qalora_export.checkpoint.output import claim_output
from qalora_export.errors import ParityError
from qalora_export.formats.account import tools
from qalora_export.formats.contents import Comparison, FolderContents, compare
from qalora_export.formats.export_report import ExportReport
from qalora_export.formats.gguf.metadata import Entry, architecture, general, sampling
from qalora_export.formats.gguf.read import MODULES_KEY, read_back
from qalora_export.formats.gguf.split import adapter_entries, adapter_path, plan_remainders
from qalora_export.formats.gguf.tensor_table import TensorPlan, plan_model, prevailing_type
from qalora_export.formats.gguf.tokenizer.byte_level import TEXT_DIFFERENCES
from qalora_export.formats.gguf.tokenizer.fields import name_for_llama_cpp, tokenizer_entries
from qalora_export.formats.gguf.writer import write_gguf
from qalora_export.formats.streaming import synced
from qalora_export.models.families import family_of
from qalora_export.recipe import GgufSettings
from qalora_export.safety import StrPath, atomic_files, exclusive, local_path
from qalora_export.version import __version__


def gguf_tools() -> dict[str, str]:
    """Versions that the bytes of a file follow from."""
    return tools("gguf", "numpy")


def export_gguf(
    checkpoint: StrPath, out: StrPath, settings: GgufSettings | None = None, *, force: bool = False
) -> ExportReport:
    """Write `out` and `<out>.manifest.json`, which comes last.

    Layout "split" also writes `<stem>.lora.gguf`, unless every offset is −z·scale already and there is nothing to add.
    Raises InputError for what GGUF cannot hold exactly, ParityError when the file read back differs; in both cases
    nothing is left behind.
    """
    checkpoint, out, settings = local_path(checkpoint), local_path(out), settings or GgufSettings()
    with contextlib.ExitStack() as stack:
        stack.enter_context(claim_output(out, force=force, inputs=[checkpoint]))  # and so has a name
        stack.enter_context(claim_output(sidecar_path(out), force=force, inputs=[checkpoint]))
        if settings.layout == "split":
            stack.enter_context(claim_output(adapter_path(out), force=force, inputs=[checkpoint]))
        else:  # one that an earlier model left may have to go
            stack.enter_context(exclusive(adapter_path(out)))
        require_intact = stack.enter_context(intact_meanwhile(checkpoint, "the checkpoint"))
        return _export(checkpoint, out, settings, require_intact, force=force)


def _export(
    checkpoint: Path, out: Path, settings: GgufSettings, require_intact: Callable[[], None], *, force: bool
) -> ExportReport:
    model = _open(checkpoint)
    plans = plan_model(model, settings.layout)
    remainders = plan_remainders(model) if settings.layout == "split" else []
    entries = model_entries(model, plans, settings.layout, allow_text_differences=settings.allow_text_differences)
    arch = family_of(model.config).gguf_arch
    places = [*([adapter_path(out)] if remainders else []), out, sidecar_path(out)]
    with atomic_files(places, force=force) as (*adapters, unnamed, manifest):
        files = {out.name: unnamed}
        written = {out.name: write_gguf(unnamed, arch, entries, plans)}
        adapter = None
        if remainders:
            (adapter,) = adapters
            files[adapter_path(out).name] = adapter
            written[adapter_path(out).name] = write_gguf(
                adapter, arch, adapter_entries(model), remainders, description="write adapter"
            )
        with synced(files.values()):  # on their way to the disk while they are read back
            found = _checked(compare(FolderContents(model), read_back(unnamed, adapter), progress="read back"), out)
        require_intact()
        write_sidecar(
            manifest,
            files,
            {name: entry for file in written.values() for name, entry in file.tensors.items()},
            [parent_of(checkpoint, "checkpoint")],
            settings.model_dump(),
            digests={name: file.sha256 for name, file in written.items()},
            made_with=gguf_tools(),
        )
        if adapter is None and adapter_path(out).name in files_of(sidecar_path(out)):
            # The model that is being replaced had this adapter; it would be wrong over the new one.
            adapter_path(out).unlink(missing_ok=True)
    told = [f"{entry.value}: some texts get other ids" for entry in entries if entry.key == TEXT_DIFFERENCES]
    told += [str(bound)] if (bound := family_of(model.config).bound(model.config, "gguf")) else []
    return _report((*(out.with_name(name) for name in files), sidecar_path(out)), plans, found, told)


def provenance(model: CanonicalCheckpoint, layout: str) -> list[Entry]:
    """qalora.*: which checkpoint this file came from and how to read its blocks as canonical numbers."""
    modules = {name: list(entry) for name, entry in model.modules.items()}
    return [
        Entry("qalora.version", "string", __version__),
        Entry("qalora.layout", "string", layout),
        Entry("qalora.checkpoint.sha256", "string", parent_of(model.path, "checkpoint").sha256),
        Entry(MODULES_KEY, "string", json.dumps(modules, separators=(",", ":"))),
    ]


def model_entries(
    model: CanonicalCheckpoint,
    plans: list[TensorPlan],
    layout: str,
    *,
    allow_text_differences: bool = False,
    name: str | None = None,
) -> list[Entry]:
    """All metadata of the file but general.architecture, which is the writer's own. Errors as in tokenizer_entries.

    name: what it calls itself; by default as the checkpoint's folder is called.
    """
    name = name_for_llama_cpp(model.path.resolve().name if name is None else name, model.path)
    return [
        *general(name=name, file_type=prevailing_type(plans).file_type),
        *sampling(generation_of(model.path, model.config)),
        *architecture(family_of(model.config), model.config),
        *tokenizer_entries(model.path, model.config, allow_text_differences=allow_text_differences),
        *provenance(model, layout),
    ]


def _open(checkpoint: Path) -> CanonicalCheckpoint:
    model = CanonicalCheckpoint(checkpoint)
    family_of(model.config)
    return model


def _checked(found: Comparison, out: Path) -> Comparison:
    if found.total:
        raise ParityError(
            f"{found.total} values differ when the file is read back",
            where=out,
            why=found.describe(),
            fix="this is a defect of the exporter: please report it; nothing was written",
        )
    return found


def _report(
    files: tuple[Path, ...], plans: list[TensorPlan], found: Comparison, told: Iterable[str] = ()
) -> ExportReport:
    adapters = [path.name for path in files if path == adapter_path(files[0])]
    return ExportReport(
        files=files,
        types=dict(Counter(plan.kind.name for plan in plans)),
        bytes=sum(path.stat().st_size for path in files),
        compared=found.values,
        differing=found.total,
        notes=(*(f"load {files[0].name} together with the LoRA adapter {name}" for name in adapters), *told),
    )
