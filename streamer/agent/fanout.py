"""Hands every batch to every sink, and decides when reading must wait for them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from streamer.agent.losses import (
    MOST_REASONS,
    OTHER_REASONS,
    LossLog,
    LossTotals,
    Lost,
    Owed,
)
from streamer.events.batch import Batch, Event
from streamer.events.kinds import KINDS
from streamer.events.spans import OWN_RECORDS, Span, Spans
from streamer.events.stream import StreamLoss, StreamRecord
from streamer.sinks.base import Listener, Sink, SinkAccount, Status

Policy = Literal["pause", "drop"]
_log = logging.getLogger("streamer")

_CRITICAL = frozenset(kind for kind, info in KINDS.items() if info.ring == "critical")
_NEWEST = 1 << 63
_MOST_GIVEN_UP = 100
MOST_HELD = 20_000
"""Events that are held back for a sink whose predecessor still delivers."""
_AWAY = "the configuration had no such sink at that time"
_REMIND_SECONDS, _REMIND_MOST_SECONDS = 60.0, 3600.0
_CRITICAL_SHARE = 5 / 4
"""Of its budget, what a sink may hold before critical events wait, or are lost, as well."""
_OTHERS_SHARE = 9 / 8
"""The same of one that drops, before those are lost that are not root's."""
_MOST_BYTES = 256 << 10
"""No event takes as much, whatever is in its names and arguments: escaped, a byte takes six."""
_COUNTED = 4
"""How many times the length of its JSON a sink counts an event, at the most: one with a spool."""
_INITIAL_PIDNS = 0xEFFFFFFC
"""The inode of the initial pid namespace, PROC_PID_INIT_INO."""


def policy_of(on_full: str, sinks: int) -> Policy:
    """What a full sink does, given its `on_full` and how many sinks there are."""
    if on_full == "auto":
        return "pause" if sinks == 1 else "drop"
    return "pause" if on_full == "pause" else "drop"


class _Trouble:
    """That a sink is down, since when, and when that is to be said again."""

    def __init__(self, reason: str, now: float) -> None:
        self.reason = reason
        self._since = now
        self._wait = _REMIND_SECONDS

    def due(self, now: float) -> int:
        """For how many minutes it is down, if that is to be said; ever less often, else 0."""
        elapsed = now - self._since
        if elapsed < self._wait:
            return 0
        while self._wait <= elapsed:
            self._wait += min(self._wait, _REMIND_MOST_SECONDS)
        return round(elapsed / 60)


class Fanout(Listener):
    """All sinks of a service. A full sink either pauses the reading or loses its own copy."""

    def __init__(
        self,
        sinks: Sequence[tuple[Sink, Policy]],
        *,
        pause: Callable[[bool], None],
        resume: Callable[[], None],
        closed: Callable[[], None],
        loss_record: Callable[[Lost, Sink], StreamLoss],
    ) -> None:
        """`pause` and `resume` act on the reader; `closed` is called when no sink is left.

        Without its argument true, `pause` leaves what is critical to be read.

        `loss_record` makes a loss that a sink is to be told into a record for it.
        """
        self.sinks = [sink for sink, _ in sinks]
        self.leaving: list[Sink] = []
        """Those that get nothing more, and still deliver what they have."""
        self.gone: dict[str, SinkAccount] = {}
        """What became of those that have left, by name."""
        self.never_told: list[tuple[str, Lost]] = []
        """What they were to be told, and were not; by name."""
        self.ending = False
        self.stopping = False
        self.failures: list[str] = []
        self.log = LossLog()
        self.lost = LossTotals()
        self.deserted = False
        """Whether every sink had failed or closed before they were stopped."""
        self._policies = dict(sinks)
        self._pause = pause
        self._resume = resume
        self._closed = closed
        self._broken: set[Sink] = set()
        self._loss_record = loss_record
        self._owed = {sink: Owed() for sink in self.sinks}
        self._trouble: dict[Sink, _Trouble] = {}
        self._anew: set[Sink] = set()
        self._given_up: Counter[str] = Counter()
        self._held: dict[Sink, list[Batch]] = {}
        self._away: dict[str, Owed] = {}
        for sink in self.sinks:
            sink.listener = self

    # ------------------------------------------------------------ other sinks

    def change(self, sinks: Sequence[tuple[Sink, Policy]]) -> list[Sink]:
        """Have these sinks from now on. Those that are not among them any more, which `leave` next.

        A new one is in the place of one that leaves and has its name, or had it: it goes on with
        that one's account, and is told what was not given to either. What it gets is held back
        until `begin` if the other one still delivers, so that nothing overtakes.
        """
        kept = dict(sinks)
        left = [sink for sink in self.sinks if sink not in kept]
        new = [sink for sink in kept if sink not in self._policies]
        self.sinks, self._policies = list(kept), kept
        self.leaving += left
        names = {sink.name for sink in self.leaving}
        for sink in new:
            sink.listener = self
            self._owed[sink] = self._away.pop(sink.name) if sink.name in self._away else Owed()
            if sink.name in names:
                self._held[sink] = []
            elif sink.name in self.gone:
                _go_on(sink.account, self.gone.pop(sink.name))
        for sink in left:
            if sink.name not in {one.name for one in new}:
                self._away[sink.name] = Owed()
        if not self.blocked:
            self._resume()
        return left

    def left(self, sink: Sink) -> None:
        """A sink that leaves has stopped. Who has its name now is told what it was not told."""
        self.leaving.remove(sink)
        untold = self._owed.pop(sink).untold(_under_way(sink))
        heir = next((one for one in self.sinks if one.name == sink.name), None)
        if heir is not None:
            _go_on(heir.account, sink.account)
        else:
            self.gone[sink.name] = sink.account
            if not self.ended_as_it_should(sink):
                self.never_told += ((sink.name, one) for one in untold)
        owed = self._owed[heir] if heir is not None else self._away.get(sink.name)
        if owed is not None:
            for one in untold:
                owed.add(one)
        self._trouble.pop(sink, None)

    def begin(self, sink: Sink) -> None:
        """Give a new sink, which is started, what was held back for it."""
        for batch in self._held.pop(sink, ()):
            self._give(sink, batch)
        self.sink_room(sink)

    def broke(self, sink: Sink, reason: str) -> None:
        """A sink cannot be started: it gets nothing, and what was held back for it is lost."""
        self._broken.add(sink)
        self.begin(sink)
        self._fail(sink, reason)

    def _holds(self, sink: Sink) -> bool:
        """Whether as much is held back for it as may be: of long events, its budget as JSON."""
        held = self._held.get(sink)
        if not held:
            return False
        length = sum(len(batch.lines("json")) for batch in held)
        return length >= sink.watermarks.high or sum(map(len, held)) >= MOST_HELD

    # ------------------------------------------------------------ what comes

    def submit(self, batch: Batch) -> None:
        """Give the batch to every sink that is open; one that may drop and is full loses it.

        What is critical is lost last, and waits last: for that a sink has a quarter of its budget
        more. Where it drops, half of that is for root alone, outside of containers: no processes of
        a user's own fill it, however many and long, only such as root runs on his request.
        """
        for owed in self._away.values():
            owed.add(Lost.of_sink(_events(batch.kinds), _AWAY, batch.counted()))
        for sink in self.sinks:
            full = sink.watermarks.full or self._holds(sink)
            if self._policies[sink] == "drop" and full and self.is_open(sink):
                self._squeeze(sink, batch)
            else:
                if not self._owed[sink].refused:  # else with the next second: not for each batch
                    self._publish_owed(sink)
                self._fill(sink, batch)
                if self._blocks(sink) and (_is_over(sink) or self._holds(sink)):
                    self._pause(True)

    def _fill(self, sink: Sink, batch: Batch) -> None:
        """Give it to a sink that has room, and notice where that ends, if it may drop."""
        if self._policies[sink] != "drop" or not self.is_open(sink) or _fits(sink, batch):
            self._give(sink, batch)
            return
        given = 0
        for piece in batch.pieces(_piece(sink)):
            if sink.watermarks.full and self.is_open(sink):
                self._squeeze(sink, Batch(batch.events[given:], spans=batch.spans))
                return
            self._give(sink, piece)
            given += len(piece)

    def _squeeze(self, sink: Sink, batch: Batch) -> None:
        reason = f"no room, sink {sink.status}"
        if _is_over(sink) or sink in self._held:
            self._refuse(sink, batch.kinds, reason, batch.counted())
            return
        lost: list[Event] = []
        for piece in batch.only(_CRITICAL).pieces(_piece(sink)):
            given, left = piece.divided(_admits(sink))
            if given:
                self._give(sink, given)
            lost += left
        rest = {k: n for k, n in batch.kinds.items() if k not in _CRITICAL}
        spans = {place: span for place, span in batch.counted().items() if place[0] != "critical"}
        if lost:
            refused = Batch(lost, spans=batch.spans)
            rest |= refused.kinds
            spans |= refused.counted()
        self._refuse(sink, rest, reason, spans)

    def tell(self, sink: Sink, *records: StreamRecord) -> None:
        """Give records of the agent's own to one sink."""
        self._give(sink, Batch(list(records)))

    def publish(self, record: StreamRecord) -> None:
        """Give a record of the agent's own to every sink, also to one that is full."""
        for sink in self.sinks:
            self._give(sink, Batch([record]))

    def publish_anew(self, record: Callable[[], StreamRecord]) -> None:
        """Give a record to the sinks whose readers lack what was published at the start."""
        anew, self._anew = self._anew & {*self.sinks}, set()
        for sink in anew:
            self._give(sink, Batch([record()]))

    def publish_newest(self, record: StreamRecord) -> None:
        """Give one that has all that the ones of its kind before it had, such as a heartbeat.

        A full sink gets it when it has delivered those, so that none pile up behind a backlog. With
        it goes what the sink is owed: a heartbeat says how far all is told.
        """
        batch = Batch([record])
        for sink in self.sinks:
            if not sink.watermarks.full or not any(_pending(sink, kind) for kind in batch.kinds):
                if not self._owed[sink].refused:  # else ever less often, as each second
                    self._publish_owed(sink)
                self._give(sink, batch)

    def lose(self, lost: Iterable[Lost]) -> None:
        """Note losses that every sink has to be told, see `publish_owed`."""
        for one in lost:
            for owed in (*self._owed.values(), *self._away.values()):
                owed.add(one)

    def publish_owed(self, *, final: bool = False) -> None:
        """Every second: tell the sinks what they have not got, those with room, `final`ly all.

        What a full sink is not told stays owed, merged.
        """
        for sink in self.sinks:
            if final or (self._owed[sink].tick() and not sink.watermarks.full):
                self._publish_owed(sink)

    def _publish_owed(self, sink: Sink) -> None:
        if not self._owed[sink] or not self.is_open(sink):
            return
        lost = self._owed[sink].take()
        records = [self._loss_record(one, sink) for one in lost]
        self._owed[sink].told([one.seq for one in records], lost, _under_way(sink))
        # By these numbers the sink says which of them it gave up, if it has to.
        self._give(sink, Batch(records, spans={OWN_RECORDS: Span(records[0].seq, records[-1].seq)}))

    def checkpoint(
        self, complete: Mapping[tuple[str, int], int], taken: Mapping[tuple[str, int], int]
    ) -> None:
        """See `Sink`: told are those that are not owed anything."""
        for sink in self.sinks:
            if not self._owed[sink] and self.is_open(sink):
                sink.checkpoint(complete, taken)

    def untold(self, sink: Sink) -> list[Lost]:
        """What the sink was never told, or never delivered."""
        return self._owed[sink].untold(_under_way(sink))

    def discard(self, reason: str) -> None:
        """Let every sink drop what waits; each is then owed that loss."""
        for sink in self.sinks:
            trouble = self._trouble.get(sink)
            try:
                sink.discard(f"{reason}; down: {trouble.reason}" if trouble else reason)
            except Exception:  # a defect of this sink must not cost the others their account
                _log.exception("%s could not drop what waits", sink.name)

    def undelivered(self) -> str:
        """What the sinks gave up since the end began, and why; empty if nothing."""
        said = self._given_up.most_common(MOST_REASONS)
        if len(self._given_up) > len(said):
            said.append((OTHER_REASONS, self._given_up.total() - sum(n for _, n in said)))
        return "; ".join(f"{count:,} events to {what}" for what, count in said)

    @property
    def pending(self) -> bool:
        """Whether any open sink still has something to deliver."""
        return any(sink.waiting for sink in self.sinks if self.is_open(sink))

    def is_open(self, sink: Sink) -> bool:
        """Whether the sink still takes events."""
        return sink.status != "closed" and sink not in self._broken

    def ended_as_it_should(self, sink: Sink) -> bool:
        """Whether its reader went away, as the reader of a pipe may: nobody misses anything."""
        return sink.ends_quietly and sink.status == "closed" and sink not in self._broken

    def _give(self, sink: Sink, batch: Batch) -> None:
        if not self.is_open(sink):
            self._refuse(sink, batch.kinds, "closed", batch.counted())
            return
        if sink in self._held:
            self._held[sink].append(batch)
            return
        before = sink.account.received.copy()
        try:
            sink.submit(batch)
        except Exception as error:  # a defect of this sink must not cost the others their events
            _log.exception("%s failed and gets no more events", sink.name)
            self._broken.add(sink)
            taken = sink.account.received - before
            # Of a part nobody knows which it is.
            spans = batch.spans if taken else batch.counted()
            self._refuse(sink, Counter(batch.kinds) - taken, "failed", spans)
            self._fail(sink, f"{type(error).__name__}: {error}")

    def _refuse(self, sink: Sink, kinds: Mapping[str, int], reason: str, spans: Spans) -> None:
        sink.account.received.update(kinds)
        sink.account.dropped.update(kinds)
        self.sink_dropped(sink, kinds, reason, spans)

    def _fail(self, sink: Sink, reason: str) -> None:
        if not sink.ends_quietly or sink in self._broken:
            self.failures.append(f"{sink.name}: {reason}")
        if not any(map(self.is_open, self.sinks)):
            self.deserted = True
            self._closed()
        self.sink_room(sink)

    def pauses(self, sink: Sink) -> bool:
        """Whether reading waits for it when it is full."""
        return self._policies.get(sink) == "pause"

    @property
    def blocked(self) -> bool:
        """Whether reading has to wait for a full sink."""
        return any(map(self._blocks, self.sinks))

    def _blocks(self, sink: Sink) -> bool:
        full = (sink.watermarks.full or self._holds(sink)) and self.is_open(sink)
        return full and self.pauses(sink)

    @property
    def filled(self) -> float:
        """The share of its budget that the fullest sink holds."""
        return max(s.watermarks.held / s.watermarks.high for s in self.sinks)

    def sink_full(self, sink: Sink) -> None:
        """See `Listener`."""
        if self._blocks(sink):
            self._pause(False)

    def sink_room(self, sink: Sink) -> None:
        """See `Listener`."""
        if not self.blocked:
            self._resume()

    def sink_status(self, sink: Sink, status: Status, reason: str) -> None:
        """See `Listener`."""
        recovered = False
        if status == "down":
            known = self._trouble.setdefault(sink, _Trouble(reason, time.monotonic()))
            known.reason = reason  # which may be found later than that it is down
        elif status == "up":
            recovered = self._trouble.pop(sink, None) is not None
        if self.stopping or sink in self.leaving:
            return
        level = logging.DEBUG  # that one came up as expected, or its reader went away
        if status == "closed" and sink.ends_quietly:
            self.log.forget(sink.name)
        elif status in ("down", "closed"):
            level = logging.WARNING
        elif recovered:
            level = logging.INFO
        _log.log(level, "%s is %s%s", sink.name, status, f": {reason}" if reason else "")
        if status == "closed":
            self._fail(sink, reason)

    def why_down(self, sink: Sink) -> str:
        """Why a sink is down, in one line; empty if it is not."""
        trouble = self._trouble.get(sink)
        return " ".join(trouble.reason.split()) if trouble and sink.status == "down" else ""

    def still_down(self, now: float) -> list[str]:
        """What is to be logged at `now`, of the monotonic clock, of sinks that stay down."""
        found = []
        for sink, trouble in self._trouble.items():
            minutes = trouble.due(now)
            if minutes and sink.status == "down":
                wait = f"{sink.account.pending:,} events wait for it"
                found.append(f"{sink.name} is down for {minutes} min: {trouble.reason}; {wait}")
        return found

    def sink_anew(self, sink: Sink) -> None:
        """See `Listener`. With the next second, for the sink is just taking an answer in."""
        if sink in self.sinks:
            self._anew.add(sink)

    def sink_dropped(self, sink: Sink, kinds: Mapping[str, int], reason: str, spans: Spans) -> None:
        """See `Listener`."""
        # A lost loss record must not make another one, for ever; the heartbeat counts it.
        if kinds.get("stream.loss"):
            own = spans.get(OWN_RECORDS, Span(0, _NEWEST))
            if not _of_another_run(spans):  # which told it
                self._owed[sink].dropped(kinds["stream.loss"], own.first, own.last)
        events = _events(kinds)
        if events:
            self.note_dropped(sink, Lost.of_sink(events, reason, spans))

    def note_dropped(self, sink: Sink, lost: Lost) -> None:
        """A sink has lost events, here or in another worker: it is owed to be told."""
        self._owed[sink].add(lost)
        sink.account.drop_of(lost.cells())
        self.lost.add(lost, sink.name)
        if not self.ended_as_it_should(sink):
            self.log.add([lost], sink.name)
        if self.ending and not sink.ends_quietly:
            what = f"{sink.name}: {lost.reason}"
            if len(self._given_up) > _MOST_GIVEN_UP and what not in self._given_up:
                what = f"{sink.name}: {OTHER_REASONS}"
            self._given_up[what] += lost.count


def _events(kinds: Mapping[str, int]) -> dict[str, int]:
    """Without the records of the stream itself."""
    return {kind: n for kind, n in kinds.items() if not kind.startswith("stream.")}


def _go_on(account: SinkAccount, before: SinkAccount) -> None:
    """Add what was before, all of which is settled."""
    account.received.update(before.received)
    account.delivered.update(before.delivered)
    account.dropped.update(before.dropped)
    account.drop_of(before.cells)


def _is_over(sink: Sink) -> bool:
    """Whether it holds all that it may, also of what is critical."""
    return sink.watermarks.held >= _CRITICAL_SHARE * sink.watermarks.high


def _fits(sink: Sink, batch: Batch) -> bool:
    """Whether it is sure not to be full with it. What is encoded for this, most sinks write."""
    room = sink.watermarks.high - sink.watermarks.held
    return len(batch) * _MOST_BYTES < room or _COUNTED * len(batch.lines("json")) < room


def _piece(sink: Sink) -> int:
    """Of how many events it is asked together whether there is room.

    However long they are, they take half at most of what is root's: a user's arguments or paths
    are not to fill that at once.
    """
    return max(1, sink.watermarks.high // (16 * _MOST_BYTES))


def _admits(sink: Sink) -> Callable[[Any], bool]:
    """For which critical events a sink that is full, and drops, has room yet."""
    if _is_over(sink):
        return lambda event: False
    if sink.watermarks.held < _OTHERS_SHARE * sink.watermarks.high:
        return lambda event: True
    return lambda event: event.uid == 0 and event.pidns == _INITIAL_PIDNS


def _pending(sink: Sink, kind: str) -> int:
    """Records of the kind that it took and has neither delivered nor dropped."""
    account = sink.account
    return account.received[kind] - account.delivered[kind] - account.dropped[kind]


def _under_way(sink: Sink) -> int:
    """Pending loss records, without those that are kept on disk."""
    return _pending(sink, "stream.loss") - sink.kept.get("stream.loss", 0)


def _of_another_run(spans: Spans) -> bool:
    """Whether they are of events that another run read, and no others."""
    return bool(spans) and all(len(place) == 3 for place in spans)
