"""Short runs on the tiny model: their data, and how they are started."""

import json
from collections.abc import Callable
from pathlib import Path

from qalora_export.qalora.training.stage import TrainReport

ROOMS, THINGS = ("kitchen", "hall", "attic", "garden"), ("lights", "radio", "fan", "oven", "heater")


def write_commands(path: Path, begin: int, end: int) -> Path:
    """Spoken commands with JSON answers of different lengths."""
    rows = []
    for index in range(begin, end):
        room, thing = ROOMS[index % 4], THINGS[index % 5]
        answer = json.dumps({"room": room, "device": thing} | ({"level": index} if index % 3 else {}))
        rows.append({"prompt": f"turn on the {thing} in the {room}" + ", please" * (index % 2), "output": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


Runner = Callable[..., TrainReport]
PlainRun = Callable[..., tuple[TrainReport, Path]]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
