"""Data files for tests: one JSON object per line; a string is written as it stands."""

import json
from pathlib import Path


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
