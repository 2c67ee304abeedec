"""What the programs sample at each level of pressure, on the running kernel."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from streamer.config.settings import LEVELS, Settings, SheddingSection
from streamer.events.kinds import KINDS
from tests.kernel.agent import ROOT, is_stray, kind_of
from tests.kernel.live import Live
from tests.kernel.pace import repetitions
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

CONNECTIONS = repetitions(600, 200)
PAIRS = ("net.connect", "net.accept", "net.close")


def connect_many(count: int) -> None:
    """Connections on loopback, one after the other, closed by the client first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(count):
            client = socket.create_connection(server.getsockname())
            there, _ = server.accept()
            client.close()
            there.close()


def everything() -> None:
    """Something of each kind that is easily had."""
    open_missing("/no/", 5)
    connect_many(5)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        udp.sendto(b"x", udp.getsockname())
    time.sleep(0.2)  # a slow call


def at_rates(**rates: tuple[int, ...]) -> Settings:
    chosen = {kind.replace("_", "."): one for kind, one in rates.items()}
    return Settings(shedding=SheddingSection(enabled=True, rates=chosen))


def ends(event: Any) -> frozenset[int]:
    return frozenset((event.local_port, event.remote_port))


def owned(events: Iterable[Any]) -> list[Any]:
    """Without the ends of others' connections from before, which no filter keeps back."""
    return [event for event in events if not is_stray(event)]


def test_a_connection_is_taken_as_a_whole_or_not_at_all(scope: Scope) -> None:
    """Both of its ends, and the beginning and the end of each."""
    with Live(scope, PAIRS, at_rates()) as live:
        live.state.level = 1
        scope.act(connect_many, CONNECTIONS)
        events = owned(live.read())
        taken = {kind: Counter(ends(e) for e in events if kind_of(e) == kind) for kind in PAIRS}
        assert taken["net.connect"] == taken["net.accept"]
        assert taken["net.close"] == {pair: 2 * n for pair, n in taken["net.connect"].items()}
        assert {event.weight for event in events} == {2}
        fair = CONNECTIONS / 2
        assert abs(taken["net.connect"].total() - fair) < 6 * (fair / 2) ** 0.5
        live.check()


def begin_many(count: int) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=count) as server:
        pairs = []
        for _ in range(count):
            pairs.append((socket.create_connection(server.getsockname()), server.accept()[0]))
        checkpoint()
        for pair in pairs:
            for one in pair:
                one.close()


def test_what_ends_at_a_higher_level_has_begun_in_the_stream(scope: Scope) -> None:
    """Of each end that is told, the beginning was told; and back at 0 each end is told."""
    with Live(scope, PAIRS, at_rates()) as live:
        live.state.level = 1
        with scope.start(begin_many, CONNECTIONS // 2) as actor:
            actor.reached()
            begun = {ends(event) for event in live.read() if kind_of(event) == "net.connect"}
            live.state.level = 2
            actor.proceed()
            actor.result()
        ended = [event for event in owned(live.read()) if kind_of(event) == "net.close"]
        assert {event.weight for event in ended} == {8}
        assert {ends(event) for event in ended} < begun
        live.check()


def test_another_run_takes_other_connections(scope: Scope) -> None:
    """What is taken depends on a secret of the run: nobody can choose ports that never are."""
    with Live(scope, PAIRS, at_rates()) as live, Live(scope, PAIRS, at_rates()) as other:
        live.state.level = other.state.level = 1
        scope.act(connect_many, CONNECTIONS)
        one, two = ({ends(event) for event in each.read()} for each in (live, other))
        both, fair = len(one & two), CONNECTIONS / 4
        assert abs(both - fair) < 6 * (fair * 3 / 4) ** 0.5


EASY = (*PAIRS, "file.open", "net.listen", "net.bind", "net.udp", "syscall.slow")


def test_each_kind_of_the_bulk_ring_is_shed(scope: Scope) -> None:
    """At the lowest rate nothing of it comes, and all of it is counted."""
    most = 1 << 20
    rates = dict.fromkeys((kind.replace(".", "_") for kind in EASY), (1, 1, most))
    settings = at_rates(**rates)
    kernel = msgspec.structs.replace(
        settings.kernel, syscalls=("clock_nanosleep",), syscall_slow_ms=100, udp_seconds=1
    )
    with Live(scope, EASY, msgspec.structs.replace(settings, kernel=kernel)) as live:
        live.state.level = LEVELS
        scope.act(everything)
        assert live.read() == []
        shed = {kind: live.counts(kind).shed for kind in EASY}
        assert all(shed.values()), shed
        assert shed["file.open"] >= 5
        assert shed["net.connect"] == shed["net.accept"] == 5
        assert shed["net.close"] >= 10  # those of others that nobody owns, too
        live.state.level = 0
        scope.act(everything)
        assert {kind_of(event) for event in live.read()} == {*EASY}
        live.check()


def test_sampling_and_shedding_multiply(scope: Scope) -> None:
    settings = at_rates(file_open=(2, 4, 8))
    kernel = msgspec.structs.replace(settings.kernel, sample={"file.open": 5})
    with Live(scope, {"file.open"}, msgspec.structs.replace(settings, kernel=kernel)) as live:
        for level, rate in enumerate((5, 10, 20, 40)):
            live.state.level = level
            scope.act(open_missing, "/no/", 1000)
            events = live.read()
            assert {event.weight for event in events} == {rate}
            fair = 1000 / rate
            assert abs(len(events) - fair) < 6 * fair**0.5
        live.check()


def test_the_sources_sample_every_kind_of_the_bulk_ring() -> None:
    """Also those that a test cannot easily have: what reaches the ring was asked about before."""
    sources = "".join(path.read_text() for path in (ROOT / "bpf").glob("*.bpf.c"))
    for kind, info in KINDS.items():
        name = f"KIND_{kind.upper().replace('.', '_')}"
        asked = any(
            f"{name}{end}" in line and f"{call}(" in line
            for call in ("admits", "admits_net", "sample")
            for end in (")", ",")
            for line in sources.splitlines()
        )
        assert asked, f"{kind} of the ring {info.ring}"
