"""The measured process: the streamer's own parts, reading rings that the benchmark fills.

`decoded` is the reader alone; the others are a whole `Service` with one sink, its heartbeats
and its accounting.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import sys
from collections.abc import Collection

import uvloop

from benchmarks.load import KINDS, Counters
from benchmarks.measure import Result, Shared, Stopwatch, Task, answer, say, task_of_argument
from streamer.agent.allocator import keep_freed_memory
from streamer.agent.service import Outcome, Service
from streamer.config.settings import AnySink, FileSink, KafkaSink, Limits, MqttSink, Rings, Settings
from streamer.config.settings import StdoutSink as StdoutSettings
from streamer.events.batch import Batch
from streamer.events.envelope import Envelope
from streamer.kernel.loader import Transport
from streamer.kernel.state import Identity, KernelState, KindStatus, ProgramStatus
from streamer.kernel.types import KernelTypes
from streamer.ring.reader import RingReader, RingSource
from streamer.sinks.base import Sink
from streamer.sinks.factory import make_sink
from streamer.sinks.stdout import StdoutSink

_POLL = 0.01


class InheritedKernel(KernelState):
    """The rings and counters of the load, which another process has loaded and runs."""

    def __init__(self, shared: Shared) -> None:
        self.cpus = shared.cpus
        self.identity = Identity((0, 0), 0)
        self.ring_fds = {name: fd for name, (fd, _) in shared.rings.items()}
        self.transport = Transport("ring", {name: size for name, (_, size) in shared.rings.items()})
        self.buffers = {}
        mapped = Counters(shared)
        self.counters, self.kind_counters = mapped.counters, mapped.kind_counters
        self.faults = mapped.faults
        self.reader_state = mmap.mmap(shared.reader_fd, mmap.PAGESIZE)
        self.pressure = mmap.mmap(-1, mmap.PAGESIZE)
        self._kinds, self._loaded, self._shedding = frozenset(), [], {}
        self.interfaces = {}
        self.types = KernelTypes()
        self.flows = None

    @property
    def statuses(self) -> list[ProgramStatus]:
        """Programs that the service knows of: none."""
        return []

    def missed(self) -> dict[str, int]:
        """They are never attached, so none of their runs is left out."""
        return {}

    def attach(self) -> None:
        """Nothing to attach."""

    def enable(self, kinds: Collection[str]) -> None:
        """The load decides what happens."""

    def run_timed(self) -> None:
        """Nothing has to be."""

    def follow_interfaces(self) -> bool:
        """There are none."""
        return False

    def coverage(self, kinds: Collection[str]) -> dict[str, KindStatus]:
        """All there."""
        return {kind: KindStatus("full") for kind in kinds}

    def detach(self) -> None:
        """Nothing to detach."""

    def close(self) -> None:
        """Nothing to release before the process ends."""


class Count:
    """Counts events, and calls back when so many are there."""

    def __init__(self) -> None:
        self.events = 0
        self._limit = 0
        self._reached = asyncio.Event()

    def add(self, batch: Batch) -> None:
        """Count a batch, and let it go."""
        self.events += len(batch)
        if self.events >= self._limit:
            self._reached.set()

    async def reach(self, limit: int) -> None:
        """Wait for so many events."""
        self._limit = limit
        if self.events < limit:
            self._reached.clear()
            await self._reached.wait()


async def decoded(task: Task) -> Result:
    """The rings drained to Structs, which are counted and let go."""
    count, rings, envelope = Count(), Rings(), Envelope()
    transport = Transport("ring", {name: size for name, (_, size) in task.shared.rings.items()})
    reader = RingReader(
        [
            RingSource(name, fd, transport, envelope, task.shared.cpus)
            for name, (fd, _) in task.shared.rings.items()
        ],
        mmap.mmap(task.shared.reader_fd, mmap.PAGESIZE),
        on_batch=count.add,
        on_error=_fail,
        poll_interval_ms=rings.poll_interval_ms,
        drain_records=rings.drain_records,
    )
    reader.start()
    say("ready")
    await count.reach(task.warm)
    watch = Stopwatch()
    say("warm")
    await count.reach(task.warm + task.events)
    result = watch.result(count.events - task.warm)
    reader.stop()
    return result


def _fail(error: Exception) -> None:
    print(f"the ring cannot be read: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def chosen_sink(task: Task) -> AnySink:
    """The settings of the sink that the path leads to: the defaults, but for addresses."""
    match task.path:
        case "ndjson":
            return FileSink(path=os.devnull)
        case "file":
            return FileSink(path=task.topic)
        case "kafka":
            return KafkaSink(bootstrap=(task.kafka,), topic=task.topic)
        case "mqtt":
            return MqttSink(host="127.0.0.1", port=task.mqtt_port, topic=task.topic + "/{category}")
        case _:
            return StdoutSettings()


def sink_of(task: Task, settings: AnySink) -> Sink:
    """The sink itself; that of standard output writes to `out_fd`."""
    if isinstance(settings, StdoutSettings):
        return StdoutSink(settings, fd=task.out_fd)
    return make_sink(settings, os.uname().nodename, None)


async def served(task: Task) -> Result:
    """A service from ring to sink, until all events were delivered."""
    chosen = chosen_sink(task)
    settings = Settings(sinks=(chosen,))
    sink = sink_of(task, chosen)
    service = Service(
        settings, frozenset(KINDS), Limits(status=False), [sink], InheritedKernel(task.shared)
    )
    running = asyncio.create_task(service.run())
    watch = Stopwatch()
    try:
        while sink.status != "up" or not sink.account.received:
            await _next(running)
        say("ready")
        if task.seconds:
            return await _timed(task, sink, running)
        await _delivered(sink, task.warm, running)
        watch.start()
        say("warm")
        await _delivered(sink, task.warm + task.events, running)
        return watch.result(delivered(sink) - task.warm)
    finally:
        service.stop()
        await running


async def _timed(task: Task, sink: Sink, running: asyncio.Task[Outcome]) -> Result:
    """What a service costs in a time that the benchmark fills as it likes."""
    await asyncio.sleep(1)
    watch, before = Stopwatch(), delivered(sink)
    say("warm")
    await asyncio.wait({running}, timeout=task.seconds)
    return watch.result(delivered(sink) - before)


async def _delivered(sink: Sink, events: int, running: asyncio.Task[Outcome]) -> None:
    while delivered(sink) < events:
        await _next(running)


async def _next(running: asyncio.Task[Outcome]) -> None:
    await asyncio.sleep(_POLL)
    if running.done():
        raise RuntimeError(f"the service ended: {running.result()}")


def delivered(sink: Sink) -> int:
    """Events that the sink has delivered, records of the stream itself not counted."""
    return sum(sink.account.delivered[kind] for kind in KINDS)


def main() -> None:
    """Measure the task of the command line."""
    task = task_of_argument()
    keep_freed_memory()  # as `streamer run` does
    answer(uvloop.run(decoded(task) if task.path == "decoded" else served(task)))


if __name__ == "__main__":
    main()
