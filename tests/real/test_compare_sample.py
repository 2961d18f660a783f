"""The comparison's passages are those of the package they are said to come from."""

from __future__ import annotations

import json
from pathlib import Path

from samples.compare import make_task, passages


def test_the_committed_passages_are_what_the_script_makes() -> None:
    made, folder = passages.make(), Path(make_task.__file__).parent
    for split, file in (("train", "train"), ("validation", "validation"), ("held_out", "text")):
        rows = [json.loads(line) for line in (folder / f"{file}.jsonl").read_text("utf-8").splitlines()]
        assert [row["text"] for row in rows if "text" in row] == made[split]
