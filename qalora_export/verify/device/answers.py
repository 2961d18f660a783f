"""verify-parity --answers: a device's answers in place of the runtimes, for the gates as they are.

Answers are untrusted: sizes are checked before memory is taken, every part has the hash that the file declares, and an
answer counts only for the question that is asked now, of the very bytes that lie here (questions.Question.key). Numbers
that were changed together with their hash are judged as numbers are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora_runtimes.launch import MAX_VOCABULARY, RunnerResult, answer_in
from qalora_runtimes.packs import AnswersFile, PackedRequest
from qalora_runtimes.protocol import Job, ProtocolError, read_job
from qalora_runtimes.taps import StoredTaps, TapsResult

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.installed import code_version
from qalora_export.safety import HashedOnce, regular_file
from qalora_export.verify.device.questions import Question, run_question, taps_question

STATUSES = ("ok", "missing", "refused", "crashed")
NOT_PACKED = "it asks something that was not packed: the answers of a device are there once"
OTHER_VERSION = "it was packed by another version of qalora-export, which asked something else: pack again"
LONGEST = 4000  # characters of what a device says about a failure
SHORT = 80  # characters of a name
# By which runtimes choose kernels; every flag is in report.json.
TOLD = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve", "sme")


@dataclass
class DeviceAnswers:
    """Stands in for run_runner (`run`) and run_taps (`taps`). hashed: of the files of this run."""

    path: Path
    hashed: HashedOnce
    _file: AnswersFile = field(init=False)
    _requests: dict[str, PackedRequest] = field(init=False)

    def __post_init__(self) -> None:
        """Raises InputError where there is no file, UnsafeInputError for one that is no whole file of answers."""
        regular_file(self.path, fix="python -m qalora_runtimes FOLDER writes it on the device")
        try:
            self._file = AnswersFile(self.path)
            self._file.check()
        except ProtocolError as error:
            raise UnsafeInputError(
                "the answers cannot be used", where=self.path, why=str(error), fix="copy them from the device again"
            ) from error
        self._requests = {request.key: request for request in self._file.pack.requests}

    def require(self, now: Mapping[str, Any]) -> None:
        """Raise InputError unless the pack was made of this checkpoint, these artifacts and this probe set.

        now: questions.about, of what is verified.
        """
        packed = self._file.pack.about
        name = now["checkpoint"]["name"]
        if _of(packed, "checkpoint", "sha256") != now["checkpoint"]["sha256"]:
            raise self._other(f"another checkpoint than {name}", "pack this one, or name the one that was packed")
        for fmt, digest in now["artifacts"].items():
            if fmt in packed.get("artifacts", {}) and _of(packed, "artifacts", fmt) != digest:
                raise self._other(f"another {fmt} artifact than this", f"pass the --{fmt} that was packed")
        for setting, value in now["settings"].items():
            if (was := _of(packed, "settings", setting)) != value:
                flag = f"--{setting.replace('_', '-')}"
                raise self._other(f"{flag} {was!r}, this run has {value!r}", f"pass {flag} {was}")
        if packed.get("probe_sha256") != now["probe_sha256"]:
            raise self._other("other probes", "pass the --prompts that were packed, or pack again with this version")

        if packed.get("task_sha256") != now["task_sha256"]:
            raise self._other("another task or none", "pass the --evaluate, --scored and --max-new-tokens of the pack")

    def _other(self, what: str, fix: str) -> InputError:
        return InputError(f"the answers are to a pack of {what}", where=self.path, fix=fix)

    def described(self) -> dict[str, Any]:
        """Of the device, as it says itself: answers, pack, machine, packages; words: in one line."""
        table = self._file.table
        machine, packages = (table.get(name) for name in ("machine", "packages"))
        machine, packages = (found if isinstance(found, dict) else {} for found in (machine, packages))
        return {
            "answers": self.path.name,
            "pack": str(table["pack"]),
            "machine": machine,
            "packages": packages,
            "words": _words(machine, packages),
        }

    def run(
        self, runtime: str, *, model: Path, job: Path, workdir: Path, exact: bool, vocabulary: int, **more: Any
    ) -> RunnerResult:
        lora = more.get("lora")
        question = run_question(runtime, model=model, job=job, exact=exact, vocabulary=vocabulary, lora=lora)
        request, refusal = self._answered(question)
        if request is None:
            return RunnerResult(**refusal)
        try:
            files = self._file.extract(request, workdir)
        except ProtocolError as error:
            raise UnsafeInputError(
                "the answers changed while they were read", where=self.path, why=str(error)
            ) from error
        names = (files[name] for name in request.members)
        return answer_in(runtime, *names, read_job(job), vocabulary or MAX_VOCABULARY, "")

    def taps(self, runtime: str, *, model: Path, job: Job, names: Any, workdir: Path, **more: Any) -> TapsResult:
        options: dict[str, Any] = {name: more[name] for name in ("lora", "data", "exact") if name in more}
        passes = [names] if all(isinstance(name, str) for name in names) else names
        question = taps_question(runtime, model=model, job=job, names=passes, workdir=workdir, **options)
        request, refusal = self._answered(question)
        if request is None:
            return TapsResult(refusal["status"], refusal["message"])
        try:
            (taps,) = self._file.extract(request, workdir).values()
            return TapsResult("ok", "", StoredTaps(taps, [name for some in passes for name in some]))
        except ProtocolError as error:
            return TapsResult("crashed", f"{runtime} gave no usable values: {error}")

    def _answered(self, question: Question) -> tuple[PackedRequest | None, dict[str, Any]]:
        """The request that was answered; or none, and the fields of a result that says why."""
        key = question.key(self.hashed)
        request, outcome = self._requests.get(key), self._file.outcome(key)
        if request is None:
            message = f"{question.runtime} was not packed: name it with --runtime, or leave it"
            if question.runtime in {packed.runtime for packed in self._requests.values()}:
                same = self._file.pack.about.get("code") == code_version()
                message = NOT_PACKED if same else OTHER_VERSION
            return None, {"status": "missing", "message": message}
        if outcome is None and request.unless is not None:  # it was to be run only where that one crashed
            whole = self._file.outcome(request.unless)
            outcome = whole if whole is not None and whole.get("status") != "ok" else None
        if outcome is None:
            return None, {"status": "missing", "message": "it was not run on the device"}
        status, said = outcome.get("status"), {name: outcome.get(name) for name in ("message", "signal_name", "log")}
        if status not in STATUSES:
            return None, {"status": "crashed", "message": f"the answers say {str(status)[:60]!r} of it"}
        words = {name: value[:LONGEST] for name, value in said.items() if isinstance(value, str)}
        words["message"] = f"on the device: {words.get('message', '')}"
        return (request, {}) if status == "ok" else (None, {"status": status, **words})


def _words(machine: Mapping[str, Any], packages: Mapping[str, Any]) -> str:
    flags = machine.get("flags")
    told = [flag for flag in TOLD if isinstance(flags, list) and flag in flags]
    kind = " with ".join(
        [str(machine.get("architecture", "unknown processor"))[:SHORT], *([" ".join(told)] if told else [])]
    )
    versions = (f"{str(name)[:SHORT]} {str(version)[:SHORT]}" for name, version in packages.items())
    return f"{str(machine.get('model', ''))[:SHORT]} ({kind}); {', '.join(versions)}"


def _of(table: Mapping[str, Any], *path: str) -> Any:
    found: Any = table
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
