"""Fetch one model from the Hugging Face hub into its cache: python -m qalora_export.models.hub_download ID [REVISION].

Only safetensors weights and the files that go along with a model (config, tokenizer, chat template) are fetched: never
pickles, never code. Lines on stdout are JSON: what will be fetched, {"bytes": …, "blobs": folder it grows in}, and last
{"folder": …} or {"error": …, "fix": …}.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.model_folder import COMPANIONS
from qalora_export.checkpoint.weight_files import AUTOGPTQ_CONFIG, INDEX, INDEX_SUFFIX, SINGLE, SUFFIX, main_file, stems

SMALL = ("config.json", f"*{INDEX_SUFFIX}", AUTOGPTQ_CONFIG, *COMPANIONS)
SHARD = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")  # also a pattern of the hub that matches nothing but itself


def fetch(hub_id: str, revision: str | None) -> Path:
    """The snapshot folder, weights included. Raises ValueError for other weights than safetensors, else hub errors."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(SMALL)))
    wanted: dict[str, Any] = {"revision": folder.name, "allow_patterns": weights(folder)}  # the same commit
    sizes = [file.file_size for file in snapshot_download(hub_id, dry_run=True, **wanted) if file.will_download]
    announce({"bytes": sum(sizes), "blobs": str(folder.parent.parent / "blobs")})
    snapshot_download(hub_id, **wanted)
    if main_file(folder) is None:
        raise ValueError(f"it has neither {SINGLE} nor {INDEX}")
    return folder


def weights(folder: Path) -> list[str]:
    """Names of the weight files: those of the index, or what the one file of a small model may be called."""
    name = main_file(folder)
    if name is None or not name.endswith(INDEX_SUFFIX):
        return [f"{stem}{SUFFIX}" for stem in stems(folder)]
    index: Any = json.loads((folder / name).read_text(encoding="utf-8"))
    names = sorted(set(index["weight_map"].values()))
    if strange := [name for name in names if not SHARD.fullmatch(str(name))]:
        raise ValueError(f"its index names a file that is not a safetensors file of this folder: {strange[0]!r}")
    return names


def explained(error: Exception) -> dict[str, str]:
    """An error of the hub in our words."""
    from huggingface_hub import errors

    text = str(error).strip().partition("\n")[0]
    if isinstance(error, errors.GatedRepoError):
        return {"error": "its owner asks for consent", "fix": "accept its terms on the hub, then set HF_TOKEN"}
    if isinstance(error, errors.RevisionNotFoundError):
        return {"error": "it has no such revision", "fix": "check the branch, tag or commit"}
    if isinstance(error, errors.RepositoryNotFoundError):
        return {"error": "there is no such model", "fix": "check the spelling; a private model needs HF_TOKEN"}
    if isinstance(error, (ValueError, KeyError, TypeError, AttributeError)):
        return {"error": text, "fix": "use a revision or a conversion with safetensors weights"}
    return {"error": text, "fix": "check the network, or fetch it on another machine and give its folder"}


def announce(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main(hub_id: str, revision: str) -> int:
    try:
        answer = {"folder": str(fetch(hub_id, revision or None))}
    except Exception as error:  # whatever it is, the caller must learn of it
        answer = explained(error)
    announce(answer)
    return 0 if "folder" in answer else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
