"""Is the checkpoint what its ancestors make of it, in everything? Config, tokenizer and template from the original
model over the base to the merge, and the base's weights (source_weights); the merge itself is merge_check's.

What has to be compared and is not here is "unchecked": gate G0 has not run then, unless the settings accept it. What
cannot be compared by the nature of things is said in the verdict.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.kept import CONFIG, changed_on_the_way
from qalora_export.checkpoint.manifest import has_manifest, read_manifest
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.provenance import kind_of, parent_folder
from qalora_export.models.sources import Located
from qalora_export.quantization.source import open_folder
from qalora_export.safety import HashFile, inside, read_json, sha256_file
from qalora_export.verify.reference.merge_check import MergeCheck
from qalora_export.verify.reference.source_weights import changed_weights, packed_elsewhere
from qalora_export.version import __version__


@dataclass(frozen=True, slots=True)
class Ancestry:
    """changed: what a stage must keep and did not, one line each. compared: "child of parent" of each comparison.

    unchecked: what is not here and has to be compared. said: what else could not be compared.
    """

    changed: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    @property
    def gaps(self) -> tuple[str, ...]:
        """Everything that was not compared, for the verdict."""
        return (*self.unchecked, *self.said)

    def describe(self) -> str:
        if not self.compared:
            return "config, tokenizer and weights compared with no ancestor"
        return f"config, tokenizer and weights kept: {', '.join(self.compared)}"


def ancestry(
    checkpoint: Path,
    merge: MergeCheck,
    *,
    base: Path | None = None,
    original: Path | None = None,
    accepted: bool = False,
    hash_of: HashFile = sha256_file,
) -> Ancestry:
    """Compare every checkpoint of the line with its parent. merge: what merge_check found of the weights.

    base, original: stand for those that the manifests name. accepted: a merge whose parents are not here is none that
    has to be compared. Raises InputError for files that cannot be read.
    """
    if not has_manifest(checkpoint):
        return Ancestry(said=(f"{checkpoint.name} has no manifest: nothing says what it was made from",))
    merged = kind_of(checkpoint) == "merged"
    parent = base or parent_folder(checkpoint, "base", hash_of=hash_of) if merged else checkpoint
    missing = (merge.missing,) if merge.missing else ()
    unchecked: tuple[str, ...] = () if accepted else missing
    said: tuple[str, ...] = missing if accepted else ()
    pairs = [(parent, checkpoint)] if merged and parent is not None else []
    if parent is not None:
        source = original or (parent_folder(parent, "source", hash_of=hash_of) if has_manifest(parent) else None)
        if source is None:
            said += (f"the model that {parent.name} was made from is not here (--original gives it)",)
        else:
            pairs.insert(0, (source, parent))
    changed = []
    for source, child in pairs:
        with nullcontext(ModelFolder(source)) if source == parent else _as_taken(source) as folder:
            taken = folder.path
            lines = changed_on_the_way(taken, child, called=source.name)
            if source != parent:  # what merging leaves alone is merge_check's
                base_weights = CanonicalCheckpoint(child)
                changed += [f"{child.name} {line}" for line in changed_weights(folder, base_weights)]
                if count := packed_elsewhere(folder, base_weights):
                    said += (f"{count} matrices of {child.name}, which {source.name} holds in another packing",)
        if lines and taken != source and _versions(child) != _versions(taken):
            said += (f"what {child.name} took from {source.name}, which other versions made: {_versions(child)}",)
        else:
            changed += [f"{child.name} {line}" for line in lines]
    return Ancestry(tuple(changed), tuple(f"{child.name} of {source.name}" for source, child in pairs), unchecked, said)


@contextmanager
def _as_taken(source: Path) -> Iterator[ModelFolder]:
    """What quantizing reads: the files of a folder, or those made of a GGUF file or a multimodal model."""
    with (
        tempfile.TemporaryDirectory(prefix="qalora-parent-") as scratch,
        open_folder(Located(source), nullcontext(Path(scratch)), dequantize=True) as folder,
    ):
        yield folder


def _versions(folder: Path) -> str:
    """Whose defaults stand in files that a stage made: qalora-export's, and Transformers' where it completed them."""
    config = read_json(inside(folder, CONFIG))
    completed = config.get("transformers_version") if isinstance(config, dict) else None
    ours = read_manifest(folder).get("created_by") if has_manifest(folder) else f"qalora-export {__version__}"
    return f"{ours}, Transformers {completed}" if completed else str(ours)
