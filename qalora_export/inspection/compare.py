"""Value-by-value difference of two artifacts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qalora_export.grid import Differences, GroupAffine
from qalora_export.inspection.view import View, same_values
from qalora_export.progress import track


@dataclass
class Comparison:
    """only_left, only_right: names one side lacks. matrices, tensors: name -> what differs, where something does.

    compared: how many matrices and tensors both hold.
    """

    only_left: list[str]
    only_right: list[str]
    compared: int
    matrices: dict[str, Differences] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return not (self.only_left or self.only_right or self.matrices or self.tensors)


def compare(left: View, right: View) -> Comparison:
    """Compare everything both sides name. Codes as integers; scale, offset and other tensors as numbers."""
    names_l, names_r = {*left.modules, *left.others}, {*right.modules, *right.others}
    shared_modules = [name for name in left.modules if name in right.modules]
    shared_tensors = [name for name in left.others if name in right.others]
    result = Comparison(sorted(names_l - names_r), sorted(names_r - names_l), len(shared_modules) + len(shared_tensors))
    for name in track(shared_modules, "compare matrices"):
        found = _matrix_differences(left.group_affine(name), right.group_affine(name))
        if found.total:
            result.matrices[name] = found
    for name in shared_tensors:
        if count := same_values(left.tensor(name), right.tensor(name)):
            result.tensors[name] = count
    return result


def _matrix_differences(left: GroupAffine, right: GroupAffine) -> Differences:
    if left.shape != right.shape or left.scale.shape != right.scale.shape:
        return Differences(left.codes.size, left.scale.size, left.offset.size)
    return Differences(
        int(np.count_nonzero(left.codes != right.codes)),
        same_values(left.scale, right.scale),
        same_values(left.offset, right.offset),
    )
