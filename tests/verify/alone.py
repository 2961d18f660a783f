"""One gate on real runtimes without a whole run: a session on a short probe set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qalora_runtimes.launch import run_runner

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.models.loading import load_tokenizer
from qalora_export.recipe import VerifySettings
from qalora_export.verify.metrics import following_ids, position_metrics
from qalora_export.verify.probes.probe_set import make_probes
from qalora_export.verify.reference.ancestry import Ancestry
from qalora_export.verify.reference.local_run import LocalProofs
from qalora_export.verify.reference.logits import reference_logprobs, simulated_int8_logprobs
from qalora_export.verify.reference.merge_check import merge_check
from qalora_export.verify.reference.text import folder_answers
from qalora_export.verify.runtimes.record import all_runtimes
from qalora_export.verify.runtimes.runs import Runs
from qalora_export.verify.session import Session
from qalora_export.verify.target import Target

SEQUENCES, CHATS = (2, 8), 2


def session_of(checkpoint: Path, workdir: Path, *, prompts: Path | None = None) -> Session:
    """prompts: the user's own."""
    model = CanonicalCheckpoint(checkpoint)
    settings = VerifySettings(threads=1, prompts=None if prompts is None else str(prompts))
    whole = make_probes(load_tokenizer(checkpoint), model.config, settings)
    probes = replace(whole.some(SEQUENCES), texts=whole.texts[:4], chats=whole.chats[:CHATS])
    reference = reference_logprobs(checkpoint, probes, threads=1)
    int8 = simulated_int8_logprobs(checkpoint, probes, threads=1)
    return Session(
        checkpoint=model,
        settings=settings,
        probes=probes,
        reference=reference,
        simulation=position_metrics(reference.logprobs, int8, following_ids(probes.ids, probes.lengths)),
        lineage=(),
        expected_text=folder_answers(checkpoint, probes),
        chain=[],
        merge=merge_check(model),
        ancestry=Ancestry(),
        runs=Runs(probes, model.config["vocab_size"], workdir, 1, run_runner),
        local=LocalProofs(model, probes, 1, workdir, None),
        workdir=workdir,
    )


def target_of(session: Session, runtime: str, artifact: Path) -> Target:
    return Target(session, all_runtimes()[runtime], artifact)
