"""`apply`: qalora_runtimes.patching with our errors, and within our rules of who may write where."""

from __future__ import annotations

from contextlib import ExitStack

from qalora_runtimes.patching import Applied, apply_patch
from qalora_runtimes.protocol import ProtocolError

from qalora_export.checkpoint.output import claim_output
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety import StrPath, could_not_write, exclusive, local_path, regular_file


def apply(
    patch: StrPath, target: StrPath, out: StrPath | None = None, *, reverse: bool = False, force: bool = False
) -> Applied:
    """Turn the artifact `target` into the patch's other side, in place or, with `out`, beside it. Nothing is changed
    unless the target has the bytes that the patch is for and comes out as it promises.

    Raises InputError where it is not, UnsafeInputError for a damaged patch.
    """
    patch, target = regular_file(local_path(patch), "patch"), local_path(target)
    goal = target if out is None else local_path(out)
    with ExitStack() as stack:
        if out is not None:
            stack.enter_context(claim_output(goal, force=force, inputs=(patch, target)))
        else:
            stack.enter_context(exclusive(target))
        stack.enter_context(could_not_write(goal))
        try:
            return apply_patch(patch, target, reverse=reverse, out=None if out is None else goal)
        except ProtocolError as error:
            kind = UnsafeInputError if str(error).startswith(str(patch)) else InputError
            raise kind("the patch was not applied", where=target, why=str(error)) from error
