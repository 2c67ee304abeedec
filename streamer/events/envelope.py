"""Who and when: what the published form adds to a record."""

from __future__ import annotations

import hashlib
import os
import time
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from streamer.events.kinds import SCHEMA_VERSION
from streamer.events.stream import StreamRecord

_Record = TypeVar("_Record", bound=StreamRecord)


def clock_offset_ns() -> int:
    """What to add to a time since boot to get the time since the epoch, in nanoseconds.

    It changes whenever the clock is set, so it is read again every second.
    """
    return time.clock_gettime_ns(time.CLOCK_REALTIME) - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def run_id(boot_id: str, boot_ns: int) -> str:
    """16 hexadecimal digits that tell this run of the agent from every other, on any host.

    Sequence numbers begin anew with each run, so an event's id needs more than the boot.
    """
    return hashlib.sha256(f"{boot_id}/{boot_ns}".encode()).hexdigest()[:16]


def host_name(configured: str | None) -> str:
    """The name to publish: as configured, else the kernel's nodename."""
    return configured or os.uname().nodename


class Envelope:
    """The identity of this run, and a maker of stream records."""

    def __init__(self, host: str | None = None) -> None:
        """`host` is the name as configured."""
        self.host = host_name(host)
        self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self.run_id = run_id(self.boot_id, time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        self._numbers = count(1)

    def constants(self, ring: str) -> dict[str, Any]:
        """What every event of a ring has in common, for its decoder."""
        return {
            "schema": SCHEMA_VERSION,
            "host": self.host,
            "boot_id": self.boot_id,
            "ring": ring,
        }

    def id_prefix(self, ring: str) -> str:
        """How the id of every event of a ring begins; CPU and sequence number follow."""
        return f"{self.run_id}-{ring}"

    def record(self, cls: type[_Record], **fields: Any) -> _Record:
        """A record of the stream itself, of now."""
        boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        seq = next(self._numbers)
        return cls(
            schema=SCHEMA_VERSION,
            id=f"{self.run_id}-stream-{seq}",
            time_ns=boot_ns + clock_offset_ns(),
            boot_ns=boot_ns,
            host=self.host,
            boot_id=self.boot_id,
            run_id=self.run_id,
            seq=seq,
            **fields,
        )
