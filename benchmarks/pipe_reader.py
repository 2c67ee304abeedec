"""Reads NDJSON from standard input as it comes, and says how old the events are.

At the end of its input it prints a `Latencies` as JSON. An event's age is the time since boot
when the read that brought its end returned, less the event's `boot_ns`. Of many events at once
it looks at some.
"""

from __future__ import annotations

import os
import re
import time

import msgspec

_BOOT_NS = re.compile(rb'"event":"(?:file|net)[^}]*?"boot_ns":(\d+)')
_EVERY = 32
_SETTLE_NS = 500_000_000


class Latencies(msgspec.Struct, frozen=True):
    """Ages of events in milliseconds, and how many were looked at."""

    p50: float
    p99: float
    worst: float
    samples: int


def sampled(data: bytes) -> list[int]:
    """The `boot_ns` of some of the lines: of all when there are few."""
    lines = data.split(b"\n")
    step = _EVERY if len(lines) > _EVERY else 1
    found = (_BOOT_NS.search(line) for line in lines[::step])
    return [int(match[1]) for match in found if match]


def percentiles(ages_ns: list[int]) -> Latencies:
    """What is told of the ages."""
    ages = sorted(ages_ns)
    if not ages:
        return Latencies(0.0, 0.0, 0.0, 0)

    def at(share: float) -> float:
        return ages[min(len(ages) - 1, int(share * len(ages)))] / 1e6

    return Latencies(at(0.5), at(0.99), ages[-1] / 1e6, len(ages))


def main() -> None:
    """Read to the end."""
    first, ages, rest = 0, list[int](), b""
    while data := os.read(0, 1 << 20):
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        whole, newline, rest_after = data.rpartition(b"\n")
        if not newline:
            rest += data
            continue
        for boot_ns in sampled(rest + whole):
            first = first or boot_ns
            if boot_ns - first > _SETTLE_NS:  # the first events find everything cold
                ages.append(now - boot_ns)
        rest = rest_after
    print(msgspec.json.encode(percentiles(ages)).decode())


if __name__ == "__main__":
    main()
