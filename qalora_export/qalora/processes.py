"""Which of the processes that torchrun or accelerate started this is; alone when neither did."""

import os


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Rank 0 of all machines: the one that writes and talks."""
    return int(os.environ.get("RANK", "0")) == 0
