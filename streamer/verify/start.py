"""From which point on something is read: `--from`."""

from __future__ import annotations

import time
from datetime import datetime
from typing import NamedTuple

from streamer.errors import ConfigError

FORMS = "beginning, end, an OFFSET, a time such as 2026-11-29T10:00:00Z, or 10m for so long ago"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Start(NamedTuple):
    """The beginning, unless one of these is set."""

    end: bool = False
    offset: int | None = None
    time_ns: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it is the beginning."""
        return self == BEGINNING


BEGINNING = Start()


def parse_start(text: str) -> Start:
    """Where to begin. Raises ConfigError for what is no such place."""
    if text in ("beginning", "end"):
        return Start(end=text == "end")
    number, unit = text[:-1], text[-1:]
    if text.isascii() and text.isdecimal() and len(text) < 19:
        return Start(offset=int(text))
    if unit in _UNITS and number.isascii() and number.isdecimal() and len(number) < 10:
        return Start(time_ns=time.time_ns() - int(number) * _UNITS[unit] * 1_000_000_000)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--from: found {text!r}, allowed: {FORMS}") from None
    if moment.tzinfo is None:
        raise ConfigError(f"--from: found {text!r} without a zone, allowed: {FORMS}")
    return Start(time_ns=int(moment.timestamp() * 1000) * 1_000_000)
