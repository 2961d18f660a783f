"""Recognising llama.cpp's parameter structs: the installed wheel's is known, a shifted one is refused."""

from __future__ import annotations

import _ctypes
import ctypes
from pathlib import Path

import pytest
import xllamacpp
from qalora_runtimes.llama_cpp.c_api import Library, UnknownLayoutError
from qalora_runtimes.llama_cpp.layouts import CONTEXT_LAYOUTS, MODEL_LAYOUTS, Batch, recognise, struct_of

SIZES = {Batch: 56}  # bytes on every 64-bit ABI


class Defaults:
    """A *_default_params function: memory filled by `layout`, read through whatever restype is set."""

    def __init__(self, layout) -> None:
        self.restype = None
        self._memory = ctypes.create_string_buffer(b"\xa5" * 512, 512)
        values = struct_of(layout).from_buffer(self._memory)
        for name, _, value in layout:
            setattr(values, name, value)

    def __call__(self):
        return self.restype.from_buffer(self._memory)


@pytest.mark.parametrize("layouts", [CONTEXT_LAYOUTS, MODEL_LAYOUTS], ids=["context", "model"])
def test_each_known_layout_is_recognised_as_itself(layouts):
    for layout in layouts:
        struct = recognise(Defaults(layout), layouts)
        assert struct is not None
        assert [name for name, _ in struct._fields_] == [name for name, _, _ in layout]


@pytest.mark.parametrize("layouts", [CONTEXT_LAYOUTS, MODEL_LAYOUTS], ids=["context", "model"])
def test_a_field_too_many_or_a_changed_default_is_not_recognised(layouts):
    for at in range(len(layouts[0])):
        name, kind, value = layouts[0][at]
        grown = (*layouts[0][:at], ("novelty", ctypes.c_int64, 77), *layouts[0][at:])
        changed = (*layouts[0][:at], (name, kind, 5 if value != 5 else 6), *layouts[0][at + 1 :])
        assert recognise(Defaults(grown), layouts) is None, name
        assert recognise(Defaults(changed), layouts) is None, name


def test_the_batch_has_its_size_in_c():
    assert {struct: ctypes.sizeof(struct) for struct in SIZES} == SIZES


def test_the_installed_wheel_is_known():
    Library(Path(xllamacpp.xllamacpp.__file__))


def test_a_library_without_the_api_is_refused():
    with pytest.raises(UnknownLayoutError, match="does not offer"):
        Library(Path(_ctypes.__file__))
    with pytest.raises(UnknownLayoutError, match="does not offer"):
        Library(Path("/nowhere/libllama.so"))
