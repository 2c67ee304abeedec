"""How much slower than a processor the machine is that the tests run on: see tools/kernels.sh."""

from __future__ import annotations

import os

SLOWNESS = float(os.environ.get("STREAMER_TEST_SLOWNESS", "1"))
"""1 on a processor, about 10 where one is emulated: time limits are multiplied by it."""


def seconds(limit: float) -> float:
    """A time limit that is `limit` on a processor."""
    return limit * SLOWNESS


def repetitions(full: int, least: int) -> int:
    """How often to do a thing that is done `full` times on a processor: `least` at least."""
    return max(least, round(full / SLOWNESS))
