"""When an event was: in nanoseconds, and in words, which no reader rounds."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

_SECOND = 1_000_000_000


class Timed(Struct, kw_only=True, gc=False):
    """What has a time in words, where that is configured (`rfc3339_time`), and may be replayed."""

    time: (
        Annotated[
            str,
            Meta(
                pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z$",
                description="the same as `time_ns`, in RFC 3339; with `rfc3339_time`",
            ),
        ]
        | UnsetType
    ) = UNSET
    replayed: (
        Annotated[
            bool,
            Meta(description="true of what was in the spool before it was sent; else not there"),
        ]
        | UnsetType
    ) = UNSET


def clock_offset_ns() -> int:
    """What to add to a time since boot to get the time since the epoch, in nanoseconds.

    It changes whenever the clock is set, so it is read again every second.
    """
    return time.clock_gettime_ns(time.CLOCK_REALTIME) - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def rfc3339(time_ns: int) -> str:
    """A time since the epoch in UTC, with nine digits: `2026-11-28T22:31:50.000000001Z`."""
    seconds, rest = divmod(time_ns, _SECOND)
    return f"{_to_the_second(seconds)}.{rest:09d}Z"


@lru_cache(maxsize=4)
def _to_the_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
