"""Several command lines in one interpreter, which is started once: `python -m tests.cli.several inspect x , doctor`.

Each ends with a line `== CODE` on standard output.
"""

from __future__ import annotations

import sys
from itertools import groupby

from qalora_export.cli.main import main

COMMA = ","
ENDED = "== "


def joined(commands: list[list[str]]) -> list[str]:
    """The words to pass."""
    return [word for command in commands for word in (*command, COMMA)]


if __name__ == "__main__":
    for separates, words in groupby(sys.argv[1:], lambda word: word == COMMA):
        if not separates:
            try:
                main(list(words))
            except SystemExit as end:
                print(f"{ENDED}{end.code or 0}", flush=True)
