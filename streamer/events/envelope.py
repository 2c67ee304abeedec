"""Who and when: what the published form adds to a record."""

from __future__ import annotations

import hashlib
import os
import time
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from msgspec import UNSET

from streamer.events.clock import clock_offset_ns, rfc3339
from streamer.events.kinds import SCHEMA_VERSION
from streamer.events.stream import StreamRecord
from streamer.events.timing import Timing

_Record = TypeVar("_Record", bound=StreamRecord)


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

    def __init__(
        self,
        host: str | None = None,
        *,
        rfc3339_time: bool = False,
        timing: Timing | None = None,
        hidden_names: tuple[str, ...] = (),
        run: str | None = None,
    ) -> None:
        """`host` is the name as configured. With `rfc3339_time` records say their time in words.

        `timing` is how coarse times and durations are; None: as they are. What is in front of
        `hidden_names` is not told of DNS names. `run` is the id of the run that this process has a
        part in; a new one unless given.
        """
        self.host = host_name(host)
        self.rfc3339_time = rfc3339_time
        self.timing = timing
        self.hidden_names = hidden_names
        self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self.run_id = run or run_id(self.boot_id, time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        self._numbers = count(1)

    def constants(self, ring: str) -> dict[str, Any]:
        """What every event of a ring has in common, for its decoder."""
        return {
            "schema": SCHEMA_VERSION,
            "host": self.host,
            "boot_id": self.boot_id,
            "ring": ring,
            "time": UNSET,
            "replayed": UNSET,
        }

    def id_prefix(self, ring: str) -> str:
        """How the id of every event of a ring begins; CPU and sequence number follow."""
        return f"{self.run_id}-{ring}"

    def record(self, cls: type[_Record], **fields: Any) -> _Record:
        """A record of the stream itself, of now; of a process by its exact `start_boot_ns`."""
        boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        if self.timing is not None:
            boot_ns = self.timing.moment(boot_ns)
            if "start_boot_ns" in fields:
                fields["start_boot_ns"] = self.timing.start(fields["start_boot_ns"])
        time_ns = boot_ns + clock_offset_ns()
        seq = next(self._numbers)
        return cls(
            schema=SCHEMA_VERSION,
            id=f"{self.run_id}-stream-{seq}",
            time_ns=time_ns,
            boot_ns=boot_ns,
            host=self.host,
            boot_id=self.boot_id,
            run_id=self.run_id,
            seq=seq,
            time=rfc3339(time_ns) if self.rfc3339_time else UNSET,
            **fields,
        )
