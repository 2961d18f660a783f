"""`apply`: qalora_runtimes.patching with our errors, and within our rules of who may write where."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from qalora_runtimes.patching import Applied, apply_patch
from qalora_runtimes.protocol import ProtocolError

from qalora_export.checkpoint.manifest import sidecar_path
from qalora_export.checkpoint.output import claim_output
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety import (
    StrPath,
    atomic_directory,
    atomic_files,
    could_not_write,
    exclusive,
    local_path,
    regular_file,
    scratch_folder,
)


def apply(
    patch: StrPath, target: StrPath, out: StrPath | None = None, *, reverse: bool = False, force: bool = False
) -> Applied:
    """Turn the artifact `target` into the patch's other side, in place or, with `out`, beside it. Nothing is changed
    unless the target has the bytes that the patch is for and comes out as it promises.

    Raises InputError where it is not, UnsafeInputError for a damaged patch.
    """
    patch, target = regular_file(local_path(patch), "patch"), local_path(target)
    if out is None:
        with exclusive(target), could_not_write(target):
            return _applied(patch, target, None, reverse=reverse)
    goal = local_path(out)
    places = [goal] if target.is_dir() else [goal, sidecar_path(goal)]
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(claim_output(place, force=force, inputs=(patch, target)))
        scratch = stack.enter_context(scratch_folder(goal))
        stack.enter_context(could_not_write(goal))
        applied = _applied(patch, target, scratch / goal.name, reverse=reverse)
        made = [goal.with_name(path.name) for path in sorted(scratch.iterdir())]
        for place in made:  # an adapter too, of which only the patch knew
            stack.enter_context(claim_output(place, force=force, inputs=(patch, target)))
        if target.is_dir():
            with atomic_directory(goal, force=force) as temporary:
                (scratch / goal.name).replace(temporary)  # which is empty
        else:
            with atomic_files(made, force=force) as temporaries:
                for place, temporary in zip(made, temporaries, strict=True):
                    (scratch / place.name).replace(temporary)
    return replace(applied, target=goal)


def _applied(patch: Path, target: Path, out: Path | None, *, reverse: bool) -> Applied:
    try:
        return apply_patch(patch, target, reverse=reverse, out=out)
    except ProtocolError as error:
        kind = UnsafeInputError if str(error).startswith(str(patch)) else InputError
        raise kind("the patch was not applied", where=target, why=str(error)) from error
