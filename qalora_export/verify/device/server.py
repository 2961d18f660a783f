"""verify-parity --server: a llama-server that runs somewhere, in place of llama.cpp here, as far as its API goes.

It gives log-probabilities of whole prompts and token by token, token ids, rendered conversations, answers with the
settings it was started with, and what its tokens show. It runs one file with one set of settings, whose kernels round,
and shows nothing inside: the exact path (G2), the proof of each layer (G3, G4) and a long sequence are "not run".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qalora_runtimes.launch import RunnerResult, run_runner
from qalora_runtimes.taps import TapsResult

from qalora_export.errors import InputError
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.safety import regular_file

RUNTIME = "llama.cpp"
EXACT = "a running llama-server has one set of settings, and its kernels round: the exact path is another one"
INSIDE = "a llama-server shows no values inside its graph"
ELSEWHERE = "--server asks a llama-server, which runs GGUF files: verify the others on the device with --pack"


@dataclass
class LlamaServer:
    """Stands in for run_runner (`run`) and run_taps (`taps`). key: file with the API key; else $LLAMA_API_KEY.

    Raises InputError for what is no address.
    """

    address: str
    key: Path | None = None
    _said: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.address)
            right = parts.scheme in ("http", "https") and parts.hostname and not parts.username
            _ = parts.port  # raises for what is no number
        except ValueError:
            right = False
        if not right:
            raise InputError(
                "that is no address of a server",
                where=f"--server {self.address}",
                why="http:// or https://, a host, perhaps a port; a key goes into --api-key-file",
            )
        if self.key is not None:
            regular_file(self.key, "API key file")

    def run(
        self, runtime: str, *, model: Path, exact: bool, lora: Path | None = None, threads: int, **more: Any
    ) -> RunnerResult:
        if runtime != RUNTIME or exact:
            return RunnerResult("missing", EXACT if runtime == RUNTIME else ELSEWHERE)
        key = () if self.key is None else ("--api-key-file", str(self.key))
        result = run_runner(runtime, model=None, options=("--server", self.address, *key), **more)
        if result.status != "ok":
            return result
        # The process that asked ran here; what answered is what the report must name.
        said = {name: value for name, value in result.fingerprint.items() if name not in ("machine", "threads")}
        self._require_file(said.get("model"), model)
        self._said = said
        return replace(result, fingerprint=said)

    def taps(self, runtime: str, **_: Any) -> TapsResult:
        return TapsResult("missing", INSIDE if runtime == RUNTIME else ELSEWHERE)

    def _require_file(self, running: object, model: Path) -> None:
        """Raise InputError unless the server's model has the sizes of this file, all that its API tells of it."""
        told = running if isinstance(running, Mapping) else {}
        tensors = GgufFile(model).tensors.values()
        mine = {
            "n_params": sum(tensor.info.elements for tensor in tensors),
            "size": sum(tensor.info.nbytes for tensor in tensors),
        }
        wrong = {name: told.get(name) for name, value in mine.items() if told.get(name) != value}
        if wrong:
            raise InputError(
                f"the server runs another model: {wrong}, this file has {mine}",
                where=self.address,
                fix=f"start llama-server with -m {model.name}",
            )

    def described(self) -> dict[str, Any]:
        """Of the server, for the report."""
        version = str(self._said.get("version", "of unknown version"))
        words = f"llama-server {version} at {self.address}, which does not tell its processor"
        return {"server": self.address, "machine": {}, "packages": {"llama-server": version}, "words": words}
