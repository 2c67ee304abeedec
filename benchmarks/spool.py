"""What a spool costs a Kafka sink: `python -m benchmarks.spool [DIRECTORY]`, as root.

Opens and closed connections, decoded already, through a sink to a real broker as fast as it
goes: without a spool, with one that is not needed, and with everything on disk before it is sent.
The modes take turns, all in one run; the median of several. Further, an outage: everything to disk,
and all of it out again. Prints the tables of docs/spool.md.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import uvloop

from benchmarks.load import COMMS, KINDS, PATHS
from benchmarks.report import as_markdown
from streamer.config.settings import KafkaSink as Settings
from streamer.config.settings import SpoolSection
from streamer.events.batch import Batch
from streamer.events.catalogue import PUBLISHED
from streamer.events.stream import PreviousRun
from streamer.sinks.base import Sink
from streamer.sinks.kafka.sink import KafkaSink
from streamer.sinks.memory import MemorySink
from streamer.spool.sink import Mode
from streamer.spool.spool import SHARE, Spool
from tests.brokers import KafkaBroker
from tests.golden.cases import load

EVENTS = 200_000
DRAIN = 512
TURNS = 5
PAUSE = 0.002
"""Seconds between two looks: uvloop has timers of a millisecond, and less would be none."""
WARM_TURNS = 2
BUDGET = 32 << 20
MODES: tuple[Mode | None, ...] = (None, "spill", "wal")
NAMES = {None: "off", "spill": "spill, not needed", "wal": "wal"}
NOTE = PreviousRun("0123456789abcdef", "boot", "0", 1, "killed", [])


class Turn(NamedTuple):
    """Events in a second, and CPU time per event in ns, of this process."""

    rate: float
    cpu_ns: float


def made_events() -> list[list[Any]]:
    """Opens and closed connections in turn, no two alike, as the reader gives them."""
    structs = {kind: info.struct for kind, info in PUBLISHED.items()}
    samples = {case.event["event"]: case.event for case in load()}
    chance, now = random.Random(7), time.time_ns()
    events: list[Any] = []
    for number in range(EVENTS):
        kind = KINDS[number % len(KINDS)]
        event: Any = msgspec.convert(samples[kind], structs[kind])
        event.id, event.seq = f"{NOTE.run_id}-bulk-0-{number}", number + 1
        event.time_ns, event.boot_ns = now, number * 1009
        event.pid, event.comm = chance.randrange(1 << 16), chance.choice(COMMS)[:15]
        if kind == "file.open":
            event.path = chance.choice(PATHS).format(chance.randrange(10_000))
        events.append(event)
    return [events[start : start + DRAIN] for start in range(0, EVENTS, DRAIN)]


def opened(directory: Path) -> Spool:
    """A spool in a directory."""
    settings = SpoolSection(directory=str(directory), max_bytes=1 << 32)
    spool = Spool.open(settings, lambda: None)
    assert spool is not None
    assert spool.use()
    return spool


async def push(sink: Sink, inner: Sink, events: list[list[Any]]) -> Turn:
    """All events through the sink, as fast as `inner`, the one behind a spool, takes them."""
    await sink.start()
    most = inner.watermarks.high // 2
    begun, cpu = time.monotonic(), time.process_time_ns()
    for one in events:
        while sink.watermarks.full or inner.watermarks.held > most:  # noqa: ASYNC110
            await asyncio.sleep(PAUSE)
        sink.submit(Batch(one))
        await asyncio.sleep(0)
    while sink.account.pending:  # noqa: ASYNC110
        await asyncio.sleep(PAUSE)
    seconds, cpu = time.monotonic() - begun, time.process_time_ns() - cpu
    assert not sink.account.dropped
    await sink.stop(1)
    count = sink.account.delivered.total()
    return Turn(count / seconds, cpu / count)


async def take_turn(
    mode: Mode | None, address: str, topic: str, directory: Path, events: list[list[Any]]
) -> Turn:
    """One mode, with a topic and a spool of its own."""
    settings = Settings(bootstrap=(address,), topic=topic, budget_bytes=BUDGET // SHARE)
    inner = KafkaSink(settings, host="bench-host")
    if mode is None:
        return await push(inner, inner, events)
    spool = opened(directory)
    sink = spool.in_front_of(inner, mode, BUDGET)
    spool.begin(NOTE)
    turn = await push(sink, inner, events)
    await spool.close()
    return turn


async def outage(directory: Path, events: list[list[Any]]) -> tuple[float, float, float]:
    """Events/s to disk and out again, and bytes on disk per event, with a sink in memory."""
    spool = opened(directory)
    inner = MemorySink("memory:", BUDGET // SHARE)
    sink = spool.in_front_of(inner, "spill", BUDGET)
    spool.begin(NOTE)
    inner.hold = True
    await sink.start()
    begun = time.monotonic()
    for one in events:
        while sink.watermarks.full:  # noqa: ASYNC110
            await asyncio.sleep(PAUSE)
        sink.submit(Batch(one))
        await asyncio.sleep(0)
    while sink._writing:  # noqa: ASYNC110
        await asyncio.sleep(PAUSE)
    written, stored = time.monotonic() - begun, sink.spooled
    size = sum(path.stat().st_size for path in directory.iterdir())  # noqa: ASYNC240
    begun = time.monotonic()
    inner.hold = False
    inner.release()
    while sink.account.pending:  # noqa: ASYNC110
        await asyncio.sleep(PAUSE)
    read = time.monotonic() - begun
    await sink.stop(1)
    await spool.close()
    return stored / written, stored / read, size / stored


def measure(directory: Path, place: Path) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The rows of both tables; spools are below `place`."""
    events = made_events()
    found: dict[Mode | None, list[Turn]] = {mode: [] for mode in MODES}
    with KafkaBroker(directory / "kafka") as broker:
        for turn in range(-WARM_TURNS, TURNS):
            for mode in MODES:
                name = f"spool-{mode}-{turn}"
                one = uvloop.run(take_turn(mode, broker.address, name, place / name, events))
                if turn >= 0:
                    found[mode].append(one)
    rows: list[tuple[str, ...]] = [("spool", "events/s", "CPU, ns per event")]
    for mode, turns in found.items():
        rate, cpu = (statistics.median(column) for column in zip(*turns, strict=True))
        rows.append((NAMES[mode], f"{rate:,.0f}", f"{cpu:,.0f}"))
    outages = [uvloop.run(outage(place / f"outage-{n}", events)) for n in range(TURNS)]
    to_disk, out, size = (statistics.median(column) for column in zip(*outages, strict=True))
    other: list[tuple[str, ...]] = [
        ("to disk, events/s", "out again, events/s", "bytes on disk per event"),
        (f"{to_disk:,.0f}", f"{out:,.0f}", f"{size:,.1f}"),
    ]
    return rows, other


def main() -> None:
    """Measure and print."""
    where = sys.argv[1] if len(sys.argv) > 1 else None
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        tempfile.TemporaryDirectory(prefix="spool-", dir=where) as place,
    ):
        for table in measure(Path(directory), Path(place)):
            print(as_markdown(table))


if __name__ == "__main__":
    main()
