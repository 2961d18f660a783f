"""One flipped nibble in a checkpoint, where no reader could see it, is refused by every stage that reads it."""

from __future__ import annotations

import pytest

from tests.survival.place import (
    BASE,
    EVALUATE,
    GGUF,
    MERGE,
    ONNX,
    PARITY,
    TRAIN,
    VERIFY,
    Place,
    flip,
    run,
)

INSPECT = ("inspect", "base.qalora", "--check")
STAGES = (TRAIN, MERGE, EVALUATE, GGUF, ONNX, (*VERIFY, "--gguf", "model.gguf"), (*VERIFY, "--onnx", "onnx"), INSPECT)


@pytest.mark.parametrize("command", STAGES, ids=lambda command: " ".join(command[:2] + command[-2:-1]))
def test_every_stage_refuses_it(command: tuple[str, ...], place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    size = (place / BASE).stat().st_size
    place.edit(BASE, flip(size * 3 // 4, 0x0F))
    code = run(*command)
    said = " ".join("".join(capsys.readouterr()).split())
    assert code == (PARITY if command is INSPECT else 2), said
    assert "manifest" in said and "model.safetensors" in said, said
    assert not (place / "new").exists()
