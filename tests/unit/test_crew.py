"""What the first worker makes of what the others say: one account, and each loss once.

The others are sockets here, which say what a process would, or what no process of ours does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from streamer.agent.crew import MOST_HEARD, Crew, Member, Told, how_it_ended
from streamer.agent.crew_messages import (
    Done,
    End,
    Failed,
    FromWorker,
    Gone,
    LogFrom,
    Progress,
    Read,
    Ready,
    SinkProgress,
    gone,
    packed,
    reads_of,
    to_worker,
)
from streamer.agent.losses import Lost
from streamer.errors import PrivilegeError, SinkError, StreamerError, WorkerGone
from streamer.events.kinds import KINDS
from streamer.events.stream import ReaderCounts, SeqRange
from streamer.kernel.loader import Transport
from streamer.privilege.channel import MESSAGE_BYTES, Channel
from streamer.ring.reader import Source
from streamer.sinks.base import Sink
from streamer.sinks.memory import MemorySink

KIND = "file.open"


class Kernel:
    """What of the kernel's state a worker is told."""

    def __init__(self) -> None:
        null = os.open(os.devnull, os.O_RDONLY)
        self.ring_fds = {"critical": null, "bulk": null, "bulk.1": null}
        self.map_fds = dict.fromkeys(("counters", "kind_counters", "reader"), null)
        self.transport = Transport("ring", dict.fromkeys(self.ring_fds, 65536))
        self.cpus = 2
        self.null = null


class Buffer:
    """The ring buffer that it reads."""

    name, buffer, cpus = "bulk", "bulk.1", (1,)

    def __init__(self) -> None:
        self.went_on: list[tuple[int, int]] = []

    def go_on(self, cpu: int, seq: int) -> None:
        self.went_on.append((cpu, seq))


class Run:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.lost: list[Lost] = []
        self.given_up: list[tuple[Sink, Lost]] = []
        self.taken: list[Any] = []
        self.errors: list[StreamerError] = []
        self.unsettled: list[SeqRange] = []
        self.told: Counter[tuple[str, int]] = Counter()

    def lose(self, lost: list[Lost]) -> None:
        self.lost += lost

    def give_up(self, sink: Sink, lost: Lost) -> None:
        self.given_up.append((sink, lost))

    def take_over(
        self, sources: Sequence[Source], reason: str, unsettled: Sequence[SeqRange], told: Told
    ) -> None:
        self.taken += sources
        self.unsettled += unsettled
        self.told.update(told)

    def fail(self, error: StreamerError) -> None:
        self.errors.append(error)


def wait_until_ended(pid: int) -> None:
    """And leave it to be reaped."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


class Setting:
    """A crew of one, whose process has ended with exit code 7 by the time that it is asked for."""

    def __init__(self) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        wait_until_ended(pid)  # until then it has the far end, too
        self.crew = Crew([Member(1, pid, Channel(near, 0))])
        self.member = self.crew.members[0]
        self.there = Channel(far, 10)
        self.run, self.kernel, self.buffer = Run(), Kernel(), Buffer()
        self.sink = MemorySink()
        self.read: Counter[str] = Counter({KIND: 100})

    def say(self, *messages: FromWorker) -> None:
        for message in messages:
            self.there.send(packed(message))

    async def begin(self) -> Any:
        self.crew.join(self.run, [self.sink], self.read)
        self.say(Ready())
        kernel: Any = self.kernel
        buffer: Any = self.buffer
        await self.crew.begin(kernel, "aa" * 8, [buffer])
        received = self.there.receive()
        assert received is not None
        for fd in received[1]:
            os.close(fd)
        return to_worker(received[0])

    async def heard(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    def close(self) -> None:
        self.there.close()
        self.crew.close()
        os.close(self.kernel.null)


@pytest.fixture
def setting() -> Iterator[Setting]:
    made = Setting()
    yield made
    made.close()


def progress(
    read: int, delivered: int, dropped: int = 0, settled: int = 0
) -> tuple[Read, Progress]:
    sink = SinkProgress(
        {KIND: read}, {KIND: delivered}, {KIND: dropped} if dropped else {}, 10 * delivered, 7, 0.5,
        "up", 0.25, [0] * 15, 0.0,
    )  # fmt: skip
    reader = ReaderCounts(0, 0, 0, read, 0, 1)
    far = Progress([("bulk", 1, read)], [("bulk", 1, settled)], [sink], reader, True)
    return Read([(1, KIND, read)]), far


async def test_what_it_does_is_added_once(setting: Setting) -> None:
    begin = await setting.begin()
    assert (begin.rings, begin.run_id) == (["bulk.1"], "aa" * 8)
    setting.say(*progress(10, 4), *progress(30, 20, 1, settled=12))
    await setting.heard()
    assert setting.read == {KIND: 130}
    assert (setting.crew.read_of(1), setting.crew.read_of(0)) == ({KIND: 30}, {})
    account = setting.sink.account
    assert (account.received, account.delivered, account.dropped) == (
        {KIND: 30}, {KIND: 20}, {KIND: 1},
    )  # fmt: skip
    assert setting.sink.delivered_bytes == 200
    crew = setting.crew
    assert (crew.passed, crew.settled) == ({("bulk", 1): 30}, {("bulk", 1): 12})
    assert (crew.held(setting.sink), crew.paused) == (7, True)
    own = ReaderCounts(0, 1, 0, 5, 0, 0)
    assert crew.reader_counts(own) == ReaderCounts(0, 1, 0, 35, 0, 1)
    assert setting.run.errors == []


async def test_each_loss_is_told_where_it_was(setting: Setting) -> None:
    await setting.begin()
    in_kernel = Lost("kernel", "no room", 3, {KIND: 3}, (SeqRange("bulk", 1, 4, 6),), "bulk", 1)
    by_sink = Lost("sink", "refused", 1, {KIND: 1}, (SeqRange("bulk", 1, 7, 7),))
    setting.say(Gone(in_kernel), Gone(by_sink, 0), Failed("SinkError", "no sink is left"))
    await setting.heard()
    assert setting.run.lost == [in_kernel]
    assert setting.run.given_up == [], "no account has it yet"
    setting.say(*progress(7, 2, 1))
    await setting.heard()
    assert setting.run.given_up == [(setting.sink, by_sink)]
    (error,) = setting.run.errors
    assert isinstance(error, SinkError)
    assert str(error) == "worker 1: no sink is left"


async def test_another_level_of_the_log(setting: Setting) -> None:
    await setting.begin()
    setting.crew.log_from("debug")
    received = setting.there.receive()
    assert received is not None
    assert to_worker(received[0]) == LogFrom("debug")


async def test_one_that_cannot_be_told_is_none_of_the_others_trouble(setting: Setting) -> None:
    await setting.begin()
    setting.there.close()
    setting.crew.log_from("debug")
    setting.crew.end(1)
    assert setting.run.errors == []


async def test_one_ends_in_order(setting: Setting) -> None:
    await setting.begin()
    setting.crew.end(4.5)
    received = setting.there.receive()
    assert received is not None
    assert to_worker(received[0]) == End(4.5)
    setting.say(*progress(30, 30, settled=30), Done())
    await asyncio.wait_for(setting.crew.ended(asyncio.get_running_loop().time() + 30), 30)
    assert setting.run.errors == []
    assert setting.crew.settled == {("bulk", 1): 30}
    assert setting.run.taken == []


async def test_one_ends_in_the_middle(setting: Setting) -> None:
    """What it held is lost for its sink, and its ring is read where it was last known to be."""
    await setting.begin()
    setting.say(*progress(30, 20, 1, settled=12))
    setting.there.close()
    await setting.heard()
    ((sink, lost),) = setting.run.given_up
    reason = "worker 1 ended with exit code 7, with what it held"
    assert (sink, lost) == (
        setting.sink, Lost("sink", reason, 9, {KIND: 9}, (SeqRange("bulk", 1, 13, 30),)),
    )  # fmt: skip
    assert setting.sink.account.pending == 0
    assert setting.buffer.went_on == [(1, 31)]
    assert setting.run.taken == [setting.buffer]
    (error,) = setting.run.errors
    assert isinstance(error, WorkerGone)
    assert (setting.crew.passed, setting.crew.settled) == ({}, {})
    assert setting.run.unsettled == [SeqRange("bulk", 1, 13, 30)]


async def test_one_ends_before_it_has_said_what_became_of_what_it_read(setting: Setting) -> None:
    """It counts as unread until it is known how much that was."""
    await setting.begin()
    setting.say(*progress(30, 20), Read([(1, KIND, 35)]))
    setting.there.close()
    await setting.heard()
    assert (setting.read, setting.crew.read_of(1)) == ({KIND: 130}, {KIND: 30})


def test_a_machine_with_many_cpus_says_what_was_read_in_several_messages() -> None:
    longest = max(KINDS, key=len)
    cells = [(cpu, longest, (1 << 53) - 1) for cpu in range(65536 - 2500, 65536)]
    reads = reads_of(cells)
    assert [cell for one in reads for cell in one.cells] == cells
    assert len(reads) == 3
    assert max(len(json.dumps(packed(one))) for one in reads) < MESSAGE_BYTES / 2
    assert reads_of([]) == []


def test_a_loss_of_many_cpus_fits_a_message() -> None:
    """Of many it is not said how many of each kind: a worker that cannot say a thing would end."""
    kinds = {kind: (1 << 53) - 1 for kind in sorted(KINDS, key=len)[-10:]}
    ranges = [SeqRange("critical", 60_000 + n, 1 << 52, 1 << 53, kinds=kinds) for n in range(101)]
    told = Lost("sink", "refused", 1, {}, tuple(ranges[:100]))
    assert gone(told, 0) == Gone(told, 0)
    more = gone(Lost("sink", "refused", 1, {}, tuple(ranges)))
    assert [one.kinds for one in more.lost.ranges] == [{}] * 101
    assert [one.cpu for one in more.lost.ranges] == [one.cpu for one in ranges]
    assert max(len(json.dumps(packed(one))) for one in (gone(told), more)) < MESSAGE_BYTES / 2


async def test_one_ends_before_it_has_said_all_of_a_loss(setting: Setting) -> None:
    """What its sink gave up is told with what it held, and not once more."""
    await setting.begin()
    setting.say(*progress(30, 20))
    in_kernel = Lost("kernel", "no room", 3, {KIND: 3}, (SeqRange("bulk", 1, 4, 6),), "bulk", 1)
    by_sink = Lost("sink", "refused", 10, {KIND: 10}, (SeqRange("bulk", 1, 7, 17),))
    setting.say(Gone(in_kernel), Gone(by_sink, 0))
    setting.there.close()
    await setting.heard()
    assert [(lost.count, lost.kinds) for _, lost in setting.run.given_up] == [(10, {KIND: 10})]
    assert setting.sink.account.dropped == {KIND: 10}
    assert (setting.run.lost, setting.run.told) == ([in_kernel], {("bulk", 1): 3})


def test_how_one_has_ended_where_nobody_is_told() -> None:
    """SIGCHLD is ignored, as whoever started the agent may have left it."""
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    os.waitpid(pid, 0)
    assert how_it_ended(pid) == "closed the connection"


def test_one_is_ended_by_a_signal_without_a_name() -> None:
    number = signal.SIGRTMIN + 1
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    os.kill(pid, number)
    assert how_it_ended(pid) == f"was ended by signal {number:d}"


@pytest.mark.parametrize("error", [PrivilegeError("refused"), AssertionError("a defect")])
async def test_one_cannot_begin(
    error: Exception, setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    """Why is said by the first worker, in the place of what came of it."""

    def serve(number: int, channel: Channel) -> int:
        raise error

    crew, run = Crew.start(1, serve), Run()
    wait_until_ended(crew.members[0].pid)
    crew.join(run, [setting.sink], setting.read)
    kernel: Any = setting.kernel
    buffer: Any = setting.buffer
    with caplog.at_level(logging.ERROR):
        await crew.begin(kernel, "aa" * 8, [buffer])
    crew.close()
    if isinstance(error, PrivilegeError):
        assert isinstance(run.errors[0], PrivilegeError)
        assert str(run.errors[0]) == "worker 1: refused"
    else:
        assert str(run.errors[0]).startswith("worker 1 ended with exit code 1")
        assert "AssertionError: a defect" in caplog.text


async def test_one_that_says_much_keeps_nobody_waiting(setting: Setting) -> None:
    await setting.begin()
    setting.say(*[Ready()] * (MOST_HEARD + 1))
    setting.crew._hear(setting.member)
    assert setting.member.channel.readable()
    setting.crew._hear(setting.member)
    assert not setting.member.channel.readable()


async def test_sinks_in_another_order(setting: Setting) -> None:
    """As a reload may have them: each keeps what is said of it."""
    await setting.begin()
    setting.say(*progress(10, 4))
    await setting.heard()
    assert [one.held for one in setting.crew.of_sink(setting.sink)] == [7]
    assert setting.crew.of_sink(MemorySink()) == []


def changed(message: FromWorker, *path: str | int, to: Any) -> dict[str, Any]:
    """A message in which one thing is another."""
    whole = packed(message)
    *before, last = path
    inner: Any = whole
    for step in before:
        inner = inner[step]
    inner[last] = to
    return whole


READ, GOOD = progress(5, 4, settled=3)
LOSS = Gone(Lost("sink", "refused", 1, {KIND: 1}, (SeqRange("bulk", 1, 7, 7),)), 0)
MORE, LESS = (packed(LOSS)["lost"]["ranges"][0] | {"kinds": {KIND: n}} for n in (2, -1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "Nothing"},
        {**packed(Ready()), "type": 1},
        packed(Done()),
        changed(GOOD, "sinks", to=[]),
        changed(GOOD, "sinks", 0, "latency", to=[0]),
        changed(GOOD, "sinks", 0, "latency", to=[0] * 16),
        changed(GOOD, "sinks", 0, "received", KIND, to=-1),
        changed(GOOD, "sinks", 0, "received", KIND, to=1),
        changed(GOOD, "sinks", 0, "delivered_bytes", to=1),
        changed(GOOD, "sinks", 0, "lag_seconds", to=float("inf")),
        changed(READ, "cells", 0, to=(1, KIND, 1)),
        changed(READ, "cells", 0, to=(1, KIND, 1 << 53)),
        changed(READ, "cells", 0, to=(1, KIND, 1 << 64)),
        changed(READ, "cells", 0, to=(1, "stream.loss", 5)),
        changed(READ, "cells", 0, to=(0, KIND, 5)),
        changed(READ, "cells", 0, to=(1, "process.exec", 5)),
        changed(GOOD, "passed", to=[("bulk", 0, 5)]),
        changed(GOOD, "settled", to=[("critical", 1, 5)]),
        changed(LOSS, "sink", to=1),
        changed(LOSS, "sink", to=-1),
        changed(LOSS, "sink", to=None),
        changed(LOSS, "lost", "stage", to="kernel"),
        changed(LOSS, "lost", "count", to=1 << 53),
        changed(LOSS, "lost", "count", to=0),
        changed(LOSS, "lost", "kinds", to={"any": 1}),
        changed(LOSS, "lost", "kinds", to={KIND: 2, "file.write": -1}),
        changed(LOSS, "lost", "reason", to="x" * 1000),
        changed(LOSS, "lost", "reason", to="\ud800"),
        changed(LOSS, "lost", "ranges", 0, "cpu", to=0),
        changed(LOSS, "lost", "ranges", 0, "run_id", to="bb" * 8),
        changed(LOSS, "lost", "ranges", 0, "kinds", to={KIND: 2}),
        changed(LOSS, "lost", "ranges", 0, "kinds", to={KIND: 1, "file.write": 1}),
        changed(LOSS, "lost", "ranges", 0, "kinds", to={"any": 0}),
        changed(LOSS, "lost", "ranges", 0, "seq_to", to=10**30),
        changed(LOSS, "lost", "ranges", 0, "kinds", to={KIND: -1}),
        changed(LOSS, "lost", "ranges", to=[MORE, LESS]),
        changed(LOSS, "lost", "ring", to="any"),
    ],
)
async def test_one_says_what_none_of_ours_does(setting: Setting, wrong: dict[str, Any]) -> None:
    await setting.begin()
    setting.say(*progress(5, 4))
    await setting.heard()
    assert setting.run.errors == []
    setting.there.send(wrong)
    await setting.heard()
    (error,) = setting.run.errors
    what = "ended by itself" if wrong == packed(Done()) else "cannot be understood"
    assert f"worker 1 {what}" in str(error)
    assert setting.read == {KIND: 105}
    assert setting.sink.account.pending == 0


async def test_one_does_not_end(setting: Setting) -> None:
    await setting.begin()
    setting.crew.end(0.01)
    await setting.crew.ended(0)
    assert "did not end in time" in str(setting.run.errors[0])
    assert setting.run.taken == [setting.buffer]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_ring_buffers_are_shared_out(workers: int) -> None:
    names = ("critical", *("bulk", "bulk.1", "bulk.2", "bulk.3"))
    channel: Any = None
    crew = Crew([Member(number, 0, channel) for number in range(1, workers)])
    assert crew.share(names) == {
        name: 0 if name == "critical" else number % workers
        for name, number in zip(names, (0, 0, 1, 2, 3), strict=True)
    }
