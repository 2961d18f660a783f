"""`qalora-export compare` through its entry point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qalora_export.cli.compare import quick_methods
from qalora_export.cli.main import main

ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "three", "four", "five", "six")]
RECIPE = """
model = "{model}"
[quantize]
calibration = "data.jsonl"
calibration_samples = 2
sequence_length = 16
[train]
data = "data.jsonl"
validation = "data.jsonl"
rank = 4
max_steps = 2
batch_size = 4
[evaluate]
data = "data.jsonl"
max_new_tokens = 2
"""


@pytest.mark.slow
def test_a_first_look_is_a_table_of_every_method_at_four_bits(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(model=tiny_model))
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path / "recipe.toml"), "--quick", "--out", str(tmp_path / "out")])
    assert not ended.value.code
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["method"] for row in record["rows"]] == quick_methods()
    assert {row["bits"] for row in record["rows"]} == {None, 4}
    assert all(row["loss"] and row["score"] for row in record["rows"])
    shown = capsys.readouterr()
    assert f"{len(quick_methods())} cells measured now, 0 kept" in " ".join((shown.out + shown.err).split())
