"""Where a model comes from: a path on this machine, or the id of a model on the Hugging Face hub.

What exists on this machine wins over a hub id of the same spelling. A hub model is taken from Hugging Face's cache
when it is there whole, else fetched into it by a process of its own (hub_download), the only one of ours that may
reach for the network; everything after that reads local files. HF_HUB_OFFLINE=1, set by the user, forbids that too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qalora_export.checkpoint.weight_files import INDEX_SUFFIX, SINGLE, main_file
from qalora_export.errors import InputError
from qalora_export.models.hub_process import download
from qalora_export.recipe import HUB_ID
from qalora_export.safety import StrPath, local_path, read_json

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
# Set by the command line beside its own HF_HUB_OFFLINE=1: being offline is our habit then, not the user's wish.
MAY_DOWNLOAD = "QALORA_MAY_DOWNLOAD"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True, slots=True)
class Located:
    """path: a folder or file. hub_id, commit: the hub model and its revision, or None. notes: what was chosen."""

    path: Path
    hub_id: str | None = None
    commit: str | None = None
    notes: tuple[str, ...] = ()


def locate(model: StrPath, revision: str | None = None) -> Located:
    """Find a model by path or hub id; `revision` (branch, tag or commit) is for hub models.

    Raises InputError when there is none, when it is neither cached nor reachable, and for a revision of a local path.
    """
    path = local_path(model)
    hub_like = HUB_ID.fullmatch(str(model)) is not None  # pathlib changes nothing about owner/name
    if path.exists():
        if revision is not None:
            raise InputError(
                "a revision was given for a model on this machine",
                where=path,
                why="only models on the hub have revisions; the local path of that name is taken first",
                fix="leave out --revision, or run the command in another folder",
            )
        return Located(path, notes=(f"took the local path {path}, not a hub model of that name",) if hub_like else ())
    if not hub_like:
        raise InputError(
            "model folder not found",
            where=path,
            fix="give the folder that holds config.json, a .gguf file, or a hub id such as HuggingFaceTB/SmolLM2-135M",
        )
    return _on_hub(str(model), revision)


def offline() -> bool:
    """Whether the user forbade network access."""
    return any(os.environ.get(name, "").upper() in TRUE for name in OFFLINE) and MAY_DOWNLOAD not in os.environ


def lacking(folder: Path) -> str | None:
    """The first file that a model in `folder` cannot do without and that is not there, or None."""
    if not (folder / "config.json").is_file():
        return "config.json"
    weights = main_file(folder)
    if weights is None:
        return SINGLE
    if weights.endswith(INDEX_SUFFIX):
        index = read_json(folder / weights)
        names = index.get("weight_map", {}).values() if isinstance(index, dict) else []
        if absent := sorted(name for name in set(names) if not (folder / str(name)).is_file()):
            return str(absent[0])
    return None if any((folder / name).is_file() for name in TOKENIZERS) else TOKENIZERS[0]


def _on_hub(hub_id: str, revision: str | None) -> Located:
    cached = _cached(hub_id, revision)
    missing = "config.json" if cached is None else lacking(cached)
    if missing is None and cached is not None:
        return _found(hub_id, cached, "from the cache")
    if offline():
        raise InputError(
            f"{hub_id} is no path on this machine, and the hub's cache does not hold {missing} of it",
            where=hub_id if revision is None else f"{hub_id} at revision {revision}",
            why="HF_HUB_OFFLINE=1 forbids a download",
            fix="check the spelling; or unset HF_HUB_OFFLINE and run the command again; or fetch the model on another "
            f"machine (hf download {hub_id}) and give its folder",
        )
    return _found(hub_id, download(hub_id, revision, without=OFFLINE), "from the hub")


def _found(hub_id: str, folder: Path, origin: str) -> Located:
    return Located(folder, hub_id, folder.name, (f"took {hub_id} at commit {folder.name} {origin}",))


def _cached(hub_id: str, revision: str | None) -> Path | None:
    """The snapshot folder in the cache, complete or not."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None
