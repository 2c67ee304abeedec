"""Looks at a run for those who ask: `streamer status`, `streamer top`, Prometheus.

Made of what the heartbeat is made of, when somebody asks, and of nothing that is counted by event.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence

from streamer import __version__
from streamer.agent.crew import Crew
from streamer.agent.fanout import Fanout
from streamer.agent.reports import Reporter
from streamer.agent.shedding import Shedding
from streamer.events.envelope import Envelope
from streamer.kernel.state import KernelState, KindStatus
from streamer.operation.look import (
    VERSION,
    KindLook,
    Latency,
    Look,
    LossLook,
    Phase,
    RingLook,
    SinkLook,
    TableLook,
)
from streamer.ring.reader import RingReader, Source
from streamer.sinks.base import Sink
from streamer.sinks.latency import BOUNDS

RATE_SECONDS = 10
"""Over how long rates are taken."""


class Looks:
    """Puts looks together."""

    def __init__(
        self,
        envelope: Envelope,
        kernel: KernelState,
        reader: RingReader,
        reporter: Reporter,
        fanout: Fanout,
        read: Counter[str],
        shedding: Shedding,
        crew: Crew,
        sources: Sequence[Source],
    ) -> None:
        """`read` counts what was read, per kind, and `sources` are all there are: those that
        further workers (`crew`) read, too.
        """
        self._envelope = envelope
        self._kernel = kernel
        self._reader = reader
        self._reporter = reporter
        self._fanout = fanout
        self._read = read
        self._shedding = shedding
        self._crew, self._sources = crew, sources
        self._history = deque([(time.monotonic(), Counter[str]())], RATE_SECONDS + 1)

    def tick(self) -> None:
        """Every second: note how much was read."""
        self._history.append((time.monotonic(), self._read.copy()))

    def look(self, phase: Phase, coverage: Mapping[str, KindStatus]) -> Look:
        """How things are now."""
        reporter = self._reporter
        counts, marks = reporter.counts_and_marks(self._read)
        return Look(
            version=VERSION,
            agent=__version__,
            pid=os.getpid(),
            host=self._envelope.host,
            run_id=self._envelope.run_id,
            phase=phase,
            not_ready=list(self._not_ready(phase)),
            uptime_seconds=round(reporter.uptime, 3),
            rates=self._rates(),
            counts=counts,
            losses=[LossLook(*where, count) for where, count in self._fanout.lost.counts.items()],
            rings=self._rings(),
            marks=marks,
            paused=self._reader.paused or self._crew.paused,
            reader=reporter.reader_counts(),
            sinks={sink.name: self._sink(sink) for sink in self._fanout.sinks},
            faults=reporter.faults(),
            missed=reporter.missed_by_program,
            tables=self._tables(),
            coverage={kind: KindLook(one.status, one.reason) for kind, one in coverage.items()},
            programs=reporter.programs(),
            shedding=self._shedding.look(),
            workers=[os.getpid(), *(member.pid for member in self._crew.members)],
        )

    def _not_ready(self, phase: Phase) -> Iterator[str]:
        if phase != "streaming":
            yield f"the agent is {phase}"
        for sink in self._fanout.sinks:
            if sink.status != "up":
                why = self._fanout.why_down(sink)
                yield f"{sink.name} is {sink.status}{why and f': {why}'}"
        yield from self._crew.not_ready()

    def _rates(self) -> dict[str, float]:
        (then, before), now = self._history[0], time.monotonic()
        seconds = max(now - then, 0.001)
        return {
            kind: round((count - before[kind]) / seconds, 1) for kind, count in self._read.items()
        }

    def _rings(self) -> dict[str, RingLook]:
        found = {}
        for ring, size in self._kernel.ring_bytes.items():
            buffers = [one for one in self._sources if one.name == ring]
            used, read = (sum(map(of, buffers)) for of in (_used_bytes, _read_bytes))
            found[ring] = RingLook(size, used, read)
        return found

    def _sink(self, sink: Sink) -> SinkLook:
        account, others = sink.account, self._crew.of_sink(sink)
        budget, lags = sink.watermarks.high, (one.lag_seconds for one in others)
        return SinkLook(
            status=sink.status,
            received=dict(account.received),
            delivered=dict(account.delivered),
            dropped=dict(account.dropped),
            delivered_bytes=sink.delivered_bytes,
            pending=account.pending,
            spooled=sink.spooled,
            spool_filled=round(sink.spool_filled, 4),
            held_bytes=max(sink.watermarks.held, 0) + sum(one.held for one in others),
            budget_bytes=budget * (1 + len(others)),
            lag_seconds=round(max([sink.latency.lag_seconds, *lags]), 6),
            latency=Latency(BOUNDS, tuple(sink.latency.counts), sink.latency.sum_seconds),
        )

    def _tables(self) -> dict[str, TableLook]:
        flows = self._kernel.flows
        if flows is None:
            return {}
        return {"flows": TableLook(flows.live, self._kernel.kernel_settings.flows)}


def _used_bytes(source: Source) -> int:
    return source.used_bytes


def _read_bytes(source: Source) -> int:
    return source.read_bytes
