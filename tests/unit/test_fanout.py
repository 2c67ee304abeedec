"""One batch to every sink: who waits for whom, and what a full sink costs."""

from __future__ import annotations

import logging
import time
from collections import Counter

import msgspec
import pytest

from streamer.agent.fanout import MOST_HELD, Fanout, Policy, policy_of
from streamer.agent.losses import MOST_RANGES, Lost
from streamer.events.batch import Batch
from streamer.events.envelope import Envelope
from streamer.events.spans import OWN_RECORDS, Span, Spans
from streamer.events.stream import SeqRange, StreamLoss, StreamRecord
from streamer.sinks.base import Sink
from streamer.sinks.memory import MemorySink
from tests.unit.bounds import bounded_memory


class Event(msgspec.Struct, tag_field="event", tag="test.event", gc=False):
    text: str


class Open(msgspec.Struct, tag_field="event", tag="file.open", gc=False):
    text: str
    cpu: int = 1


class Exec(msgspec.Struct, tag_field="event", tag="process.exec", gc=False):
    text: str
    cpu: int = 1
    uid: int = 1000
    pidns: int = 0xEFFFFFFC


class Beat(StreamRecord, tag="stream.heartbeat"):
    pass


class Calls:
    """What the fanout asked of the reader and of the service."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self._envelope = Envelope("here")

    def fanout(self, *sinks: tuple[MemorySink, Policy]) -> Fanout:
        return Fanout(
            sinks,
            pause=lambda critical: self.made.append("pause all" if critical else "pause"),
            resume=lambda: self.made.append("resume"),
            closed=lambda: self.made.append("closed"),
            loss_record=self.loss_record,
        )

    def heartbeat(self) -> Beat:
        return self._envelope.record(Beat)

    def loss_record(self, lost: Lost, sink: Sink) -> StreamLoss:
        return self._envelope.record(
            StreamLoss,
            stage=lost.stage,
            count=lost.count,
            kinds=dict(lost.kinds),
            sink=sink.name,
            reason=lost.reason,
            ranges=list(lost.ranges),
        )


def batch(size: int = 1000) -> Batch:
    """One event of about so many bytes."""
    return Batch([Event("x" * size)])


async def opened(name: str, budget: int = 4000, *, hold: bool = False) -> MemorySink:
    sink = MemorySink(name, budget)
    sink.hold = hold
    await sink.start()
    return sink


def is_blocked(fanout: Fanout) -> bool:
    """As it is now: mypy takes a property that was false once to be false for good."""
    return fanout.blocked


def is_pending(fanout: Fanout) -> bool:
    """See `is_blocked`."""
    return fanout.pending


def assert_balanced(*sinks: MemorySink) -> None:
    for sink in sinks:
        account = sink.account
        assert account.pending >= 0
        assert account.received.total() == (
            account.delivered.total() + account.dropped.total() + account.pending
        )


@pytest.mark.parametrize(
    ("on_full", "sinks", "policy"),
    [
        ("auto", 1, "pause"),
        ("auto", 2, "drop"),
        ("pause", 1, "pause"),
        ("pause", 3, "pause"),
        ("drop", 1, "drop"),
        ("drop", 2, "drop"),
    ],
)
def test_policy(on_full: str, sinks: int, policy: str) -> None:
    assert policy_of(on_full, sinks) == policy


async def test_every_sink_gets_every_batch_in_order() -> None:
    one, two = await opened("one", 1 << 20), await opened("two", 1 << 20)
    fanout = Calls().fanout((one, "pause"), (two, "drop"))
    batches = [batch(n) for n in range(5)]
    for each in batches:
        fanout.submit(each)
    assert one.events == two.events == [each.events[0] for each in batches]
    assert_balanced(one, two)


async def test_a_full_sink_that_pauses_is_waited_for() -> None:
    """At the high mark, once; until it is below the low mark. It loses nothing.

    What is critical waits a quarter of the budget later.
    """
    calls, sink = Calls(), await opened("slow", hold=True)
    fanout = calls.fanout((sink, "pause"))
    for _ in range(3):
        fanout.submit(batch())
    assert calls.made == []
    assert not is_blocked(fanout)
    fanout.submit(batch())
    assert calls.made == ["pause"]
    assert is_blocked(fanout)
    fanout.submit(batch(100))  # what was on its way when the reader paused
    assert calls.made == ["pause"]
    fanout.submit(batch())
    assert calls.made == ["pause", "pause all"]
    sink.release()
    assert calls.made == ["pause", "pause all", "resume"]
    assert not is_blocked(fanout)
    assert (len(sink.events), sink.account.dropped.total()) == (6, 0)


async def test_reading_goes_on_only_when_no_sink_is_waited_for() -> None:
    calls = Calls()
    one, two = await opened("one", hold=True), await opened("two", hold=True)
    fanout = calls.fanout((one, "pause"), (two, "pause"))
    for _ in range(4):
        fanout.submit(batch())
    assert calls.made == ["pause", "pause"]
    one.release()
    assert calls.made == ["pause", "pause"]
    two.release()
    assert calls.made == ["pause", "pause", "resume"]


async def test_a_full_sink_that_drops_stalls_nobody() -> None:
    """It loses its own copies from the high mark to the low one, exactly counted."""
    calls = Calls()
    dead, alive = await opened("dead", hold=True), await opened("alive")
    fanout = calls.fanout((dead, "drop"), (alive, "drop"))
    for _ in range(10):
        fanout.submit(batch())
    assert calls.made == []
    assert not fanout.blocked
    assert len(alive.events) == 10
    assert dead.account.dropped == {"test.event": 6}
    dead.release()
    fanout.submit(batch())
    dead.release()
    events = [event for event in dead.events if isinstance(event, Event)]
    assert (len(events), dead.account.dropped.total()) == (5, 6)
    assert_balanced(dead, alive)


def losses(sink: MemorySink) -> list[StreamLoss]:
    return [event for event in sink.events if isinstance(event, StreamLoss)]


async def test_drops_are_told_once_there_is_room() -> None:
    """To the sink that lost them, in one record per reason, and once."""
    dead, alive = await opened("dead", hold=True), await opened("alive")
    fanout = Calls().fanout((dead, "drop"), (alive, "drop"))
    for n in range(7):
        fanout.submit(Batch([Open("x" * 1000)], spans={("bulk", 1): Span(n, n)}))
    fanout.publish_owed()
    dead.release()
    assert losses(dead) == []
    fanout.publish_owed()
    dead.release()
    fanout.publish_owed()
    dead.release()
    (loss,) = losses(dead)
    assert (loss.count, loss.kinds, loss.stage) == (3, {"file.open": 3}, "sink")
    assert "no room" in loss.reason
    assert loss.ranges == [SeqRange("bulk", 1, 4, 6, kinds={"file.open": 3})]
    assert dead.account.cells == {("bulk", 1, "file.open"): 3}
    assert alive.account.cells == {}
    assert losses(alive) == []


async def test_a_debt_is_paid_before_the_next_events() -> None:
    """Also where nobody asks for it: a sink may be full at every such moment."""
    sink = await opened("slow", hold=True)
    fanout = Calls().fanout((sink, "drop"))
    for _ in range(5):
        fanout.submit(batch())
    sink.release()
    fanout.submit(batch())
    sink.release()
    assert [type(event).__name__ for event in sink.events] == ["Event"] * 4 + [
        "StreamLoss",
        "Event",
    ]


async def test_what_a_full_sink_is_not_told_stays_owed() -> None:
    """Thousands of losses of the kernel become one record for each of its CPUs, all exact."""
    sink, other = await opened("full", hold=True), await opened("other")
    fanout = Calls().fanout((sink, "drop"), (other, "drop"))
    for _ in range(4):
        fanout.submit(batch())
    for second in range(1000):
        for cpu in (0, 1):
            seqs = (SeqRange("bulk", cpu, 10 * second, 10 * second + 4),)
            lost = Lost("kernel", "no room", 5, {"file.open": 5}, seqs, "bulk", cpu)
            fanout.lose([lost])
        fanout.publish_owed()
    assert len(losses(other)) == 2000
    assert sink.watermarks.held < sink.watermarks.high + 1000
    sink.release()
    fanout.publish_owed()
    sink.release()
    told = losses(sink)
    assert [loss.count for loss in told] == [5000, 5000]
    for loss in told:
        assert len(loss.ranges) <= MOST_RANGES
        assert (loss.ranges[0].seq_from, loss.ranges[-1].seq_to) == (0, 9994)
    assert sum(loss.count for loss in losses(other)) == 10_000


@pytest.mark.parametrize("policy", ["drop", "pause"])
async def test_of_heartbeats_one_waits_in_a_full_sink(policy: Policy) -> None:
    """It gets the next when it has delivered that one, however full it is; others get all."""
    sink, other = await opened("full", hold=True), await opened("other")
    calls = Calls()
    fanout = calls.fanout((sink, policy), (other, policy))
    for _ in range(4):
        fanout.submit(batch())
    beats = [calls.heartbeat() for _ in range(4)]
    for beat in beats[:3]:
        fanout.publish_newest(beat)
    assert sink.watermarks.full
    sink.release()
    for _ in range(4):
        fanout.submit(batch())
    assert sink.watermarks.full
    fanout.publish_newest(beats[3])
    sink.release()
    assert [one for one in sink.events if isinstance(one, Beat)] == [beats[0], beats[3]]
    assert [one for one in other.events if isinstance(one, Beat)] == beats


async def test_a_full_sink_is_told_what_it_is_owed_with_a_heartbeat() -> None:
    """Which says how far all is told."""
    sink, calls = await opened("full", hold=True), Calls()
    fanout = calls.fanout((sink, "drop"))
    for _ in range(5):
        fanout.submit(batch())
    fanout.lose([Lost("kernel", "no room", 2, {"file.open": 2})])
    fanout.publish_owed()
    fanout.publish_newest(calls.heartbeat())
    fanout.lose([Lost("kernel", "no room", 3, {"file.open": 3})])
    fanout.publish_newest(calls.heartbeat())
    sink.release()
    kinds = [type(one).__name__ for one in sink.events]
    assert kinds == ["Event"] * 4 + ["StreamLoss", "StreamLoss", "Beat"]
    assert sorted(loss.count for loss in losses(sink)) == [1, 2]


async def test_a_loss_record_that_was_lost_is_told_again() -> None:
    """It, and no other one: not before the next events, and each time later."""
    sink = await opened("one", 1 << 20, hold=True)
    fanout = Calls().fanout((sink, "pause"))
    fanout.lose([Lost("kernel", "no room", 5, {"file.open": 5})])
    for second in range(100):
        fanout.publish_owed()
        sink.discard("refused")
        for _ in range(10):
            fanout.submit(batch())
        assert sink.account.dropped["stream.loss"] <= 1 + second
        sink.release()
    assert 5 <= sink.account.dropped["stream.loss"] <= 8
    fanout.publish_owed(final=True)
    sink.release()
    (loss,) = losses(sink)
    assert (loss.count, loss.reason) == (5, "no room")
    assert fanout.untold(sink) == []


async def test_of_several_losses_the_one_that_was_dropped_is_told_again() -> None:
    """The others were delivered, before it and after it."""
    sink = await opened("one", 1 << 20, hold=True)
    fanout = Calls().fanout((sink, "pause"))
    for reason in ("first", "second", "third"):
        fanout.lose([Lost("kernel", reason, 1, {})])
        fanout.publish_owed()
    first, second, third = sink._held
    sink._held = [first, third]
    sink._dropped(second.kinds, len(second.lines("json")), "refused", second.spans)
    sink.release()
    assert [loss.reason for loss in losses(sink)] == ["first", "third"]
    assert [lost.reason for lost in fanout.untold(sink)] == ["second"]


async def test_after_a_refusal_all_is_as_before_once_it_takes_them_again() -> None:
    """A debt is paid before the next events, and a refusal of later is told again soon."""
    sink = await opened("one", 1 << 20, hold=True)
    fanout = Calls().fanout((sink, "pause"))
    for _ in range(2):
        fanout.lose([Lost("kernel", "no room", 5, {})])
        fanout.submit(batch())
        sink.discard("refused")
        for _ in range(3):
            fanout.publish_owed()
        sink.release()
        fanout.lose([Lost("kernel", "no more room", 1, {})])
        fanout.submit(batch())
        sink.release()
    assert [getattr(event, "reason", "event") for event in sink.events] == 2 * [
        "no room",
        "refused",
        "no more room",
        "event",
    ]


async def test_loss_records_are_no_numbers_of_events() -> None:
    """Where they are dropped with events: their own numbers are those of the run."""
    sink = await opened("one", hold=True)
    fanout = Calls().fanout((sink, "pause"))
    spans: Spans = {("bulk", 1): Span(4, 6), OWN_RECORDS: Span(7, 7)}
    fanout.sink_dropped(sink, {"file.open": 3, "stream.loss": 1}, "refused", spans)
    (lost,) = fanout.untold(sink)
    assert (lost.count, lost.ranges) == (3, (SeqRange("bulk", 1, 4, 6),))


async def test_a_loss_record_that_was_dropped_without_its_number_is_told_again() -> None:
    sink = await opened("one", hold=True)
    fanout = Calls().fanout((sink, "pause"))
    fanout.lose([Lost("kernel", "no room", 1, {})])
    fanout.publish_owed()
    sink._held = []
    sink._dropped({"stream.loss": 1}, 0, "refused")
    assert [lost.reason for lost in fanout.untold(sink)] == ["no room"]


async def test_what_a_sink_never_said_anything_about_is_known_in_the_end() -> None:
    """Neither delivered nor dropped: it hangs, or has a defect."""
    sink = await opened("one", hold=True)
    fanout = Calls().fanout((sink, "pause"))
    for reason in ("first", "second"):
        fanout.lose([Lost("kernel", reason, 1, {})])
        fanout.publish_owed()
    assert [lost.reason for lost in fanout.untold(sink)] == ["first", "second"]


async def test_the_last_losses_survive_the_backlog_that_is_dropped() -> None:
    """They were queued behind it."""
    sink = await opened("slow", 1 << 20, hold=True)
    fanout = Calls().fanout((sink, "pause"))
    for _ in range(3):
        fanout.submit(batch())
    fanout.lose([Lost("kernel", "no room", 7, {"file.open": 7})])
    fanout.publish_owed(final=True)
    fanout.discard("stopped")
    fanout.publish_owed(final=True)
    sink.release()
    assert {loss.reason: loss.count for loss in losses(sink)} == {"no room": 7, "stopped": 3}
    assert fanout.untold(sink) == []


async def test_a_sink_that_cannot_discard_costs_the_others_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(MemorySink):
        def discard(self, reason: str) -> None:
            raise OSError(reason)

    broken, sink = Broken("broken"), await opened("sink", hold=True)
    await broken.start()
    fanout = Calls().fanout((broken, "pause"), (sink, "pause"))
    fanout.submit(batch())
    fanout.discard("stopped")
    assert sink.account.dropped == {"test.event": 1}
    assert "broken could not drop what waits" in caplog.text


async def test_reasons_without_end_make_no_endless_line() -> None:
    sink = await opened("one", hold=True)
    fanout = Calls().fanout((sink, "pause"))
    fanout.ending = True
    with bounded_memory(300_000):
        for number in range(2000):
            fanout.sink_dropped(sink, {"test.event": 1}, f"{number} " + "x" * 1000, {})
    said = fanout.undelivered()
    assert len(said) < 40_000
    assert sum(int(part.split()[0].replace(",", "")) for part in said.split("; ")) == 2000


async def test_a_reason_that_comes_again_is_said_with_all_its_events() -> None:
    """Also when there were more reasons in between than are kept."""
    sink = await opened("one", hold=True)
    fanout = Calls().fanout((sink, "pause"))
    fanout.ending = True
    for number in range(200):
        fanout.sink_dropped(sink, {"test.event": 1}, f"{number}", {})
        fanout.sink_dropped(sink, {"test.event": 1}, "refused", {})
    assert "200 events to one: refused" in fanout.undelivered()


async def test_what_was_never_told_is_known_in_the_end() -> None:
    """Owed, or told and not delivered; and not what was delivered."""
    sink = await opened("one", hold=True)
    fanout = Calls().fanout((sink, "pause"))
    fanout.lose([Lost("kernel", "first", 1, {})])
    fanout.publish_owed()
    sink.release()
    fanout.lose([Lost("kernel", "second", 2, {})])
    fanout.publish_owed()
    sink.discard("stopped")
    fanout.lose([Lost("kernel", "third", 3, {})])
    assert {(lost.reason, lost.count) for lost in fanout.untold(sink)} == {
        ("second", 2),
        ("third", 3),
    }
    assert fanout.untold(sink) == []


async def test_critical_events_are_lost_last() -> None:
    """A full sink that drops still takes root's, until a quarter more is held."""
    sink = await opened("full", hold=True)
    fanout = Calls().fanout((sink, "drop"))
    for _ in range(4):
        fanout.submit(batch())
    for n in range(3):
        spans: Spans = {("bulk", 1): Span(n, n), ("critical", 1): Span(n, n)}
        fanout.submit(
            Batch([Event("x" * 1000), Exec("y" * 500, uid=0), Open("x" * 1000)], spans=spans)
        )
    assert sink.account.dropped == {"test.event": 3, "file.open": 3, "process.exec": 1}
    assert sink.account.cells == {("bulk", 1, "file.open"): 3, ("critical", 1, "process.exec"): 1}
    sink.release()
    assert [type(event) for event in sink.events] == [Event] * 4 + [Exec] * 2


async def test_the_last_of_the_room_is_roots() -> None:
    """Of a full sink that drops: outside of containers, and to the event."""
    sink = await opened("full", budget=12 << 20, hold=True)
    fanout = Calls().fanout((sink, "drop"))
    fanout.submit(batch(9 * sink.watermarks.high // 8 - 5000))
    flood = [Exec("y" * 20) for _ in range(100)]
    container = [Exec("y" * 20, uid=0, pidns=4026532000) for _ in range(100)]
    for number in range(3):
        root = [Exec(f"{number}", uid=0) for _ in range(2)]
        events = [*flood, root[0], *container, root[1]]
        spans: Spans = {("critical", 1): Span(300 * number + 1, 300 * number + 202)}
        fanout.submit(Batch(events, spans=spans))
    dropped = sink.account.dropped["process.exec"]
    assert sink.account.cells == {("critical", 1, "process.exec"): dropped}
    (lost,) = fanout.untold(sink)
    assert (lost.count, lost.kinds) == (dropped, {"process.exec": dropped})
    assert sink.watermarks.held < 5 / 4 * sink.watermarks.high
    sink.release()
    execs = [event for event in sink.events if isinstance(event, Exec)]
    assert len(execs) + dropped == 3 * 202
    assert [event.text for event in execs if not event.uid] == [*"001122"]
    assert 0 < dropped < 600


async def test_root_has_no_more_than_the_room_either() -> None:
    """To the event, as they can be long."""
    sink = await opened("full", 1 << 20, hold=True)
    fanout = Calls().fanout((sink, "drop"))
    fanout.submit(batch(1 << 20))
    fanout.submit(Batch([Exec("x" * 10_000, uid=0) for _ in range(100)]))
    assert 0 < sink.watermarks.held - 5 / 4 * sink.watermarks.high < 11_000
    assert 0 < sink.account.dropped["process.exec"] < 100


async def test_what_was_given_in_parts_and_is_dropped_later_has_its_numbers() -> None:
    """What fits before the high mark, and what is root's of a piece in which others are."""
    sink = await opened("fills up", 12 << 20, hold=True)
    fanout = Calls().fanout((sink, "drop"))
    fanout.submit(batch(sink.watermarks.high - 1000))
    spans: Spans = {("critical", 1): Span(1, 20)}
    fanout.submit(Batch([Exec("x" * 100, uid=0) for _ in range(20)], spans=spans))
    fanout.submit(Batch([Exec("x" * 1_600_000)], spans={("critical", 1): Span(21, 21)}))
    fanout.submit(Batch([Exec("x"), Exec("y", uid=0)], spans={("critical", 1): Span(22, 23)}))
    assert sink.account.dropped == {"process.exec": 1}
    sink.discard("refused")
    assert sink.account.cells == {("critical", 1, "process.exec"): 23}


async def test_no_more_is_held_back_than_may_be_not_even_of_root() -> None:
    """For one whose predecessor still delivers."""
    old, new = await opened("one", hold=True), await opened("one", 1 << 25)
    fanout = Calls().fanout((old, "drop"))
    fanout.submit(batch())
    fanout.change([(new, "drop")])
    fanout.submit(Batch([Exec("x", uid=0)] * MOST_HELD))
    fanout.submit(Batch([Exec("y", uid=0)] * 2))
    assert new.account.dropped == {"process.exec": 2}
    fanout.begin(new)
    assert new.account.delivered == {"process.exec": MOST_HELD}


@pytest.mark.parametrize(
    ("budget", "held"), [(1 << 20, 0.0), (1 << 20, 0.4), (1 << 20, 0.99), (12 << 20, 0.99)]
)
@pytest.mark.parametrize("event", [Open("\x01" * 3000), Exec("\x01" * 3000)])
async def test_one_drain_of_long_events_leaves_roots_room(
    event: msgspec.Struct, budget: int, held: float
) -> None:
    """Each byte of a user's may take six as JSON, and the sink is not full before."""
    sink = await opened("fills up", budget, hold=True)
    fanout = Calls().fanout((sink, "drop"))
    fanout.submit(batch(int(held * budget)))
    fanout.submit(Batch([event] * 200))
    assert sink.watermarks.full
    assert sink.watermarks.held < (9 / 8 + 1 / 16) * budget
    fanout.submit(Batch([Exec("root's", uid=0)]))
    assert sink.account.received.total() == 202
    sink.release()
    assert sink.events[-1] == Exec("root's", uid=0)


async def test_where_a_sink_fills_up_each_event_is_there_or_told() -> None:
    """In order: bulk up to the high mark, critical events beyond it, and never nothing."""
    sink = await opened("fills up", 40_000, hold=True)
    fanout = Calls().fanout((sink, "drop"))
    spans: Spans = {("bulk", 1): Span(1, 40), ("critical", 1): Span(1, 40)}
    events: list[Open | Exec] = [Open("x" * 1000), Exec("y" * 100)] * 40
    fanout.submit(Batch(events, spans=spans))
    fanout.submit(Batch([Open("x" * 1000)], spans={("bulk", 1): Span(41, 41)}))
    assert all(map(len, sink._held))
    taken, lost = len(sink._held), sink.account.dropped["file.open"]
    assert (sink.account.received, sink.account.dropped) == (
        {"file.open": 41, "process.exec": 40},
        {"file.open": lost},
    )
    assert sink.account.cells == {("bulk", 1, "file.open"): lost}
    (told,) = fanout.untold(sink)
    assert (told.count, told.kinds) == (lost, {"file.open": lost})
    sink.release()
    pairs = 41 - lost
    assert sink.events == [*events[: 2 * pairs], *events[1::2][pairs:]]
    assert 1 < lost < 10 < taken


async def test_what_fits_is_given_as_it_is() -> None:
    """So that sinks share what is encoded of it; also one that waits for room."""
    drops, waits = await opened("one", 40_000, hold=True), await opened("two", 1000, hold=True)
    fanout = Calls().fanout((drops, "drop"), (waits, "pause"))
    many = Batch([Exec("x") for _ in range(100)])
    fanout.submit(many)
    assert drops._held == waits._held == [many]


async def test_a_full_sink_that_has_closed_is_told_of_once_for_each_batch() -> None:
    sink = await opened("closed", 4000, hold=True)
    fanout = Calls().fanout((sink, "drop"))
    fanout.submit(Batch([Exec("x" * 1000) for _ in range(3)]))
    sink._set_status("closed", "gone")
    refused: list[Counter[str]] = []
    fanout.sink_dropped = lambda sink, kinds, reason, spans: refused.append(Counter(kinds))  # type: ignore[method-assign]
    fanout.submit(Batch([Exec("x" * 1000) for _ in range(3)]))
    assert refused == [{"process.exec": 3}]


@pytest.mark.parametrize("policy", ["drop", "pause"])
async def test_of_long_events_no_more_is_held_back_than_the_budget(policy: Policy) -> None:
    """Then reading waits, also for what is critical, or they are lost."""
    calls, budget = Calls(), 40 * len(batch().lines("json"))
    old, new = await opened("one", hold=True), await opened("one", budget)
    fanout = calls.fanout((old, policy))
    fanout.submit(batch())
    fanout.change([(new, policy)])
    calls.made.clear()
    for _ in range(39):
        fanout.submit(batch())
    assert calls.made == []
    fanout.submit(batch())
    assert calls.made == (["pause all"] if policy == "pause" else [])
    fanout.submit(batch())
    assert new.account.dropped.total() == (policy == "drop")
    fanout.begin(new)
    assert calls.made[-1] == "resume"
    assert new.account.received.total() == 41


async def test_reading_waits_for_one_for_which_many_are_held_back() -> None:
    calls = Calls()
    old, new = await opened("one", hold=True), await opened("one", 1 << 25)
    fanout = calls.fanout((old, "pause"))
    fanout.submit(batch())
    fanout.change([(new, "pause")])
    calls.made.clear()
    fanout.submit(Batch([Exec("x")] * (MOST_HELD - 1)))
    assert calls.made == []
    fanout.submit(Batch([Exec("x")]))
    assert calls.made == ["pause all"]


async def test_what_was_given_up_in_the_end_has_its_reason() -> None:
    """What was given up before is in the stream already."""
    sink, gone = await opened("slow", hold=True), await opened("gone", hold=True)
    gone.ends_quietly = True
    fanout = Calls().fanout((sink, "pause"), (gone, "pause"))
    fanout.submit(batch())
    fanout.discard("too old")
    sink._set_status("down", "refused")
    fanout.submit(batch())
    assert fanout.undelivered() == ""
    fanout.ending = True
    fanout.discard("stopped")
    assert fanout.undelivered() == "1 events to slow: stopped; down: refused"


async def test_trouble_that_is_over_is_no_reason() -> None:
    sink = await opened("slow", hold=True)
    fanout = Calls().fanout((sink, "pause"))
    sink._set_status("down", "refused")
    sink._set_status("up", "")
    fanout.ending = True
    fanout.submit(batch())
    fanout.discard("stopped")
    assert fanout.undelivered() == "1 events to slow: stopped"


async def test_a_reader_that_goes_away_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """Of a pipe: nothing is logged of it, and what others lost is."""
    pipe, other = await opened("pipe", hold=True), await opened("other", hold=True)
    pipe.ends_quietly = True
    fanout = Calls().fanout((pipe, "pause"), (other, "pause"))
    fanout.submit(batch())
    other.discard("refused")
    assert not fanout.ended_as_it_should(pipe)
    await pipe.stop(0)
    fanout.submit(batch())
    assert pipe.account.dropped == {"test.event": 2}
    assert (fanout.failures, fanout.ended_as_it_should(pipe)) == ([], True)
    assert fanout.log.lines(0.0) == ["1 events lost in other: refused"]
    assert [record.levelno for record in caplog.records if record.levelno > logging.DEBUG] == []
    await other.stop(0)
    assert (fanout.failures, fanout.ended_as_it_should(other)) == (["other: "], False)
    assert "other is closed" in caplog.text


class Fails(MemorySink):
    """Takes what comes, and from some time on nothing more."""

    failing = False

    def submit(self, batch: Batch) -> None:
        if self.failing:
            raise ValueError("a defect")
        super().submit(batch)


@pytest.mark.parametrize("quiet", [False, True])
async def test_a_sink_that_fails_is_a_failure_and_nobody_waits_for_it(quiet: bool) -> None:
    """Neither the reader nor the end; also of a sink that may end quietly."""
    calls, sink, other = Calls(), Fails("fails", 4000), await opened("other", hold=True)
    await sink.start()
    sink.hold, sink.ends_quietly = True, quiet
    fanout = calls.fanout((sink, "pause"), (other, "drop"))
    for _ in range(4):
        fanout.submit(batch())
    assert calls.made == ["pause"]
    other.release()
    assert is_pending(fanout)
    sink.failing = True
    fanout.submit(batch())
    assert calls.made[-1] == "resume"
    assert not is_blocked(fanout)
    assert sink.account.received == {"test.event": 5}
    assert sink.account.dropped == {"test.event": 1}
    assert fanout.failures == ["fails: ValueError: a defect"]
    other.release()
    assert sink.account.pending
    assert not is_pending(fanout)
    await sink.stop(0)
    assert not fanout.ended_as_it_should(sink)
    fanout.submit(batch())
    assert sink.account.received == sink.account.dropped == {"test.event": 6}


class TakesSome(MemorySink):
    """Fails at a batch when it has taken so many of it."""

    some = 0

    def submit(self, batch: Batch) -> None:
        if self.some:
            super().submit(Batch(batch.events[: self.some]))
        raise ValueError("a defect")


@pytest.mark.parametrize(("some", "cells"), [(0, {("bulk", 1, "file.open"): 3}), (1, {})])
async def test_where_that_was_read_at_which_a_sink_failed(
    some: int, cells: dict[tuple[str, int, str], int]
) -> None:
    """Which of them it had taken nobody knows."""
    sink = TakesSome("fails")
    await sink.start()
    sink.some = some
    fanout = Calls().fanout((sink, "pause"))
    opens: list[Open] = [Open("x") for _ in range(3)]
    fanout.submit(Batch(opens, spans={("bulk", 1): Span(1, 3)}))
    assert (sink.account.dropped.total(), sink.account.cells) == (3 - some, cells)
    fanout.submit(Batch(opens, spans={("bulk", 1): Span(4, 6)}))
    assert sink.account.cells == Counter(cells) + Counter({("bulk", 1, "file.open"): 3})


def opens(first: int) -> Batch:
    """Two, the second of which is on another CPU."""
    spans: Spans = {("bulk", 1): Span(first, first), ("bulk", 2): Span(first, first)}
    return Batch([Open("x"), Open("x", 2)], spans=spans)


@pytest.mark.parametrize("away", [False, True])
async def test_one_in_the_place_of_another_goes_on_with_its_account(away: bool) -> None:
    """Also where it was given up; what was read while there was none is owed with its kinds."""
    old, new, other = await opened("one", hold=True), await opened("one"), await opened("other")
    fanout = Calls().fanout((old, "pause"), (other, "pause"))
    fanout.submit(opens(1))
    old.discard("refused")
    if away:
        fanout.change([(other, "pause")])
        fanout.left(old)
        fanout.submit(opens(2))
    fanout.change([(other, "pause"), (new, "pause")])
    if not away:
        fanout.left(old)
    assert new.account.cells == {("bulk", 1, "file.open"): 1, ("bulk", 2, "file.open"): 1}
    assert [one.cells() for one in fanout.untold(new)] == (1 + away) * [new.account.cells]


async def test_a_closed_sink_is_no_reason_to_wait() -> None:
    """It blocks no more, gets nothing more, and what it does not get is counted."""
    calls = Calls()
    one, two = await opened("one", hold=True), await opened("two")
    fanout = calls.fanout((one, "pause"), (two, "pause"))
    for _ in range(4):
        fanout.submit(batch())
    assert calls.made == ["pause"]
    await one.stop(0)
    assert calls.made[-1] == "resume"
    fanout.submit(Batch([Open("x")], spans={("bulk", 1): Span(1, 1)}))
    assert one.account.dropped.total() == 5
    assert one.account.cells == {("bulk", 1, "file.open"): 1}
    assert len(two.events) == 5
    assert_balanced(one, two)


async def test_the_service_is_told_when_no_sink_is_left() -> None:
    calls = Calls()
    one, two = await opened("one"), await opened("two")
    fanout = calls.fanout((one, "pause"), (two, "pause"))
    await one.stop(0)
    assert ("closed" in calls.made, fanout.deserted) == (False, False)
    await two.stop(0)
    assert ("closed" in calls.made, fanout.deserted) == (True, True)


async def test_how_full_the_fullest_sink_is() -> None:
    calls = Calls()
    full, empty = await opened("full", 1 << 20, hold=True), await opened("empty")
    fanout = calls.fanout((full, "pause"), (empty, "pause"))
    assert fanout.filled == 0
    fanout.submit(batch(1 << 19))
    assert 0.5 <= fanout.filled < 0.51


async def test_trouble_is_logged_once_and_its_end(caplog: pytest.LogCaptureFixture) -> None:
    """And not that a sink came up as expected."""
    sink = MemorySink("broker")
    fanout = Calls().fanout((sink, "pause"))
    with caplog.at_level(logging.INFO, "streamer"):
        await sink.start()
        for status, reason in (("down", "refused"), ("up", ""), ("up", "")):
            sink._set_status(status, reason)  # type: ignore[arg-type]
    assert not fanout.blocked
    levels = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert levels == [("WARNING", "broker is down: refused"), ("INFO", "broker is up")]


async def test_that_a_sink_stays_down_is_said_ever_less_often() -> None:
    sink, other = MemorySink("broker"), MemorySink("other")
    fanout = Calls().fanout((sink, "pause"), (other, "pause"))
    await sink.start()
    sink.hold = True
    fanout.submit(Batch([Event("x"), Event("y")]))
    begun = time.monotonic()
    sink._set_status("down", "refused")
    said = [(t, line) for t in range(0, 36_000, 10) for line in fanout.still_down(begun + t + 0.5)]
    assert [t // 60 for t, _ in said[:9]] == [1, 2, 4, 8, 16, 32, 64, 124, 184]
    assert said[2][1] == "broker is down for 4 min: refused; 2 events wait for it"
    fanout.sink_status(sink, "down", "its disk is full")  # since when it is down stays the same
    later = fanout.still_down(begun + 36_250)
    assert later == ["broker is down for 604 min: its disk is full; 2 events wait for it"]
    sink._set_status("up")
    assert fanout.still_down(begun + 100_000) == []
    begun = time.monotonic()
    sink._set_status("down", "gone")
    assert fanout.still_down(begun + 30) == []
    assert fanout.still_down(begun + 70) == ["broker is down for 1 min: gone; 2 events wait for it"]
