"""What the first worker makes of what the others say: one account, and each loss once.

The others are sockets here, which say what a process would, or what no process of ours does.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from streamer.agent.crew import Crew, Member
from streamer.agent.crew_messages import (
    Done,
    End,
    Failed,
    FromWorker,
    Gone,
    Progress,
    Ready,
    SinkProgress,
    packed,
    to_worker,
)
from streamer.agent.losses import Lost
from streamer.errors import SinkError, StreamerError, WorkerGone
from streamer.events.stream import ReaderCounts, SeqRange
from streamer.kernel.loader import Transport
from streamer.privilege.channel import Channel
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

    def lose(self, lost: list[Lost]) -> None:
        self.lost += lost

    def give_up(self, sink: Sink, lost: Lost) -> None:
        self.given_up.append((sink, lost))

    def take_over(self, sources: Sequence[Source], reason: str) -> None:
        self.taken += sources

    def fail(self, error: StreamerError) -> None:
        self.errors.append(error)


class Setting:
    """A crew of one, whose process has ended with exit code 7 by the time that it is asked for."""

    def __init__(self) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            os._exit(7)
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


def progress(read: int, delivered: int, dropped: int = 0, settled: int = 0) -> Progress:
    sink = SinkProgress(
        {KIND: read}, {KIND: delivered}, {KIND: dropped} if dropped else {}, 10 * delivered, 7, 0.5,
        "up", 0.25, [0] * 15, 0.0,
    )  # fmt: skip
    reader = ReaderCounts(0, 0, 0, read, 0, 1)
    return Progress({KIND: read}, [("bulk", 1, read)], [("bulk", 1, settled)], [sink], reader, True)


async def test_what_it_does_is_added_once(setting: Setting) -> None:
    begin = await setting.begin()
    assert (begin.rings, begin.run_id) == (["bulk.1"], "aa" * 8)
    setting.say(progress(10, 4), progress(30, 20, 1, settled=12))
    await setting.heard()
    assert setting.read == {KIND: 130}
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
    assert setting.run.given_up == [(setting.sink, by_sink)]
    (error,) = setting.run.errors
    assert isinstance(error, SinkError)
    assert str(error) == "worker 1: no sink is left"


async def test_one_ends_in_order(setting: Setting) -> None:
    await setting.begin()
    setting.crew.end(4.5)
    received = setting.there.receive()
    assert received is not None
    assert to_worker(received[0]) == End(4.5)
    setting.say(progress(30, 30, settled=30), Done())
    await asyncio.wait_for(setting.crew.ended(asyncio.get_running_loop().time() + 30), 30)
    assert setting.run.errors == []
    assert setting.crew.settled == {("bulk", 1): 30}
    assert setting.run.taken == []


async def test_one_ends_in_the_middle(setting: Setting) -> None:
    """What it held is lost for its sink, and its ring is read where it was last known to be."""
    await setting.begin()
    setting.say(progress(30, 20, 1, settled=12))
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


@pytest.mark.parametrize(
    "wrong",
    [{"type": "Nothing"}, {**packed(progress(1, 1)), "sinks": []}, {**packed(Ready()), "type": 1}],
)
async def test_one_says_what_none_of_ours_does(setting: Setting, wrong: dict[str, Any]) -> None:
    await setting.begin()
    setting.there.send(wrong)
    await setting.heard()
    (error,) = setting.run.errors
    assert "worker 1 cannot be understood" in str(error)


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
