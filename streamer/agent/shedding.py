"""Has the programs sample while the sinks cannot keep up, and says so: `stream.shed`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence

from streamer.agent.crew import Crew
from streamer.agent.fanout import Fanout
from streamer.agent.pressure import LOOK_SECONDS, Cause, Pressure, SinkState, Thresholds, causes
from streamer.agent.reports import Reporter
from streamer.config.settings import SheddingSection
from streamer.events.clock import clock_offset_ns
from streamer.events.envelope import Envelope
from streamer.events.stream import PressureCause, StreamShed
from streamer.kernel.state import KernelState
from streamer.operation.look import SheddingLook
from streamer.ring.reader import Source

MOST_CAUSES = 3
"""Causes that are said in words."""

_log = logging.getLogger("streamer")


class Shedding:
    """Looks at sinks and rings, sets the level that the programs go by, and makes the records."""

    def __init__(
        self,
        settings: SheddingSection,
        envelope: Envelope,
        kernel: KernelState,
        sources: Sequence[Source],
        reporter: Reporter,
        fanout: Fanout,
        crew: Crew,
    ) -> None:
        """The level is 0, and stays 0 unless `settings` have it `enabled`.

        `sources` are all there are: those that further workers (`crew`) read, too.
        """
        self.enabled = settings.enabled
        self.pressure = Pressure()
        self._thresholds = Thresholds.of(settings)
        self._envelope, self._kernel, self._sources = envelope, kernel, sources
        self._reporter, self._fanout, self._crew = reporter, fanout, crew
        self._causes: list[Cause] = []
        self._since_boot_ns = 0
        self._counted: Mapping[str, int] = {}  # what was shed by the last record
        self._told = 0  # the level in it
        self._held: Mapping[str, int] | None = None  # the rates at the end
        self._over = False  # the level fell to 0, and nothing says so yet

    async def run(self) -> None:
        """Look again and again."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.step(time.monotonic())

    def step(self, now: float) -> None:
        """Look once; `now` in seconds."""
        # Not when the level fell: a program that had begun by then may have counted since.
        if self._over:
            self._publish(self._reason())
        self._causes = causes(self._thresholds, self._sinks(), self._rings())
        if not self.pressure.look(now, self._causes):
            return
        level, before = self.pressure.level, self._kernel.level
        if before == 0:
            self._counted = self._reporter.shed()
        self._kernel.level = level
        self._since_boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._over = level == 0
        if level:
            self._publish(self._reason())
        if before == 0:
            _log.warning("under pressure, events are sampled: %s", self._reason())
        elif level == 0:
            _log.info("the pressure is over, and nothing is sampled for it any more")

    def repeat(self) -> None:
        """With each heartbeat, as long as anything is shed."""
        if self.pressure.level:
            self._publish(self._reason())

    def hold(self) -> None:
        """The kinds are about to be switched off, and what was shed of them is still to be told."""
        self._held = self._kernel.rates_at(self.pressure.level)

    def end(self) -> None:
        """Nothing is counted any more: tell the rest."""
        if self.pressure.level or self._over:
            self._publish("the agent stops" if self.pressure.level else self._reason())

    def look(self) -> SheddingLook:
        """How it is now."""
        level = self.pressure.level
        return SheddingLook(
            enabled=self.enabled,
            level=level,
            reason=self._reason() if level else "",
            rates=dict(self._rates()),
        )

    def _rates(self) -> Mapping[str, int]:
        return self._kernel.rates_at(self.pressure.level) if self._held is None else self._held

    def _publish(self, reason: str) -> None:
        self._over = False
        self._fanout.publish(self._record(reason))

    def _record(self, reason: str) -> StreamShed:
        level, before, self._told = self.pressure.level, self._told, self.pressure.level
        counted, self._counted = self._counted, self._reporter.shed()
        rates = dict(self._rates())
        timing, since = self._envelope.timing, self._since_boot_ns
        since = since if timing is None else timing.moment(since)
        return self._envelope.record(
            StreamShed,
            level=level,
            before=before,
            since_ns=since + clock_offset_ns(),
            since_boot_ns=since,
            reason=reason,
            causes=[
                PressureCause(one.measure, one.where, round(one.value, 3), one.holds)
                for one in self._causes
            ],
            rates=rates,
            kinds={
                kind: left_out
                for kind in rates
                if (left_out := self._counted.get(kind, 0) - counted.get(kind, 0))
            },
        )

    def _reason(self) -> str:
        if self.pressure.level == 0:
            return "the pressure is over"
        said = [in_words(one) for one in self._causes[:MOST_CAUSES]]
        return "; ".join(said) or "nothing presses any more, and it falls"

    def _sinks(self) -> Iterable[SinkState]:
        fanout = self._fanout
        for sink in fanout.sinks:
            if fanout.is_open(sink):
                yield SinkState(
                    sink.name,
                    fanout.pauses(sink),
                    sink.watermarks.held / sink.watermarks.high,
                    sink.spool_filled,
                    sink.latency.lag_seconds,
                )
        for sink in fanout.sinks:
            for one in self._crew.of_sink(sink):
                if one.status != "closed":
                    yield SinkState(sink.name, fanout.pauses(sink), one.full, 0.0, one.lag_seconds)

    def _rings(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for one in self._sources:  # the fullest buffer is the first to overflow
            found[one.name] = max(found.get(one.name, 0.0), one.filled)
        return found


def in_words(cause: Cause) -> str:
    """Why, for people."""
    match cause.measure:
        case "budget":
            return f"{cause.where} holds {cause.value:.0%} of its budget"
        case "spool":
            return f"the spool of {cause.where} is {cause.value:.0%} full"
        case "lag":
            return f"a batch has been under way to {cause.where} for {cause.value:.1f} s"
        case "ring":
            return f"the ring {cause.where} is {cause.value:.0%} full"
