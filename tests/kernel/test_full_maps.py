"""Maps that only much at once, or a smaller size, can fill: docs/limits.md has all of them.

Mostly in the test's own process, where it is seen with which size a map was made. Tables that an
agent fills as it is configured are in test_full_tables.py.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from streamer.config.settings import Kernel, Settings
from streamer.kernel import state
from streamer.kernel.flows import KIND as FLOW
from streamer.kernel.libbpf import run_program
from streamer.kernel.loader import Loader
from streamer.kernel.objects import CONTRACT, SENSORS
from streamer.kernel.tags import MapInfo
from tests.conftest import Require
from tests.golden.make import drained
from tests.kernel import flow_reading
from tests.kernel.agent import TCP_KINDS, kind_of
from tests.kernel.bpf_maps import maps_of
from tests.kernel.live import Live
from tests.kernel.pace import repetitions, seconds
from tests.kernel.packets import IPV4, UDP, ethernet, ipv4, udp
from tests.kernel.roles import Role, in_own_network, netns_inode
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import kernel_is, many_descriptors
from tests.kernel.test_net_dns_packets import MESSAGES, answer_behind_others
from tests.kernel.test_syscalls import Timing
from tests.kernel.test_tracepoint_net import deafen

pytestmark = pytest.mark.kernel

Patch = pytest.MonkeyPatch
FAULTS = [name.removeprefix("FAULT_") for name, _, _ in CONTRACT["enum fault"]]


def faults_of(kernel: state.KernelState) -> dict[str, int]:
    """Those that were counted."""
    counts = memoryview(kernel.faults).cast("Q")[: len(FAULTS)]
    return {name: count for name, count in zip(FAULTS, counts, strict=True) if count}


def give_room(patch: Patch, sensor: str, name: str, entries: int) -> None:
    """Have a map of a sensor made with so many entries."""
    info, options_of = SENSORS[sensor], state.options_of
    maps = [one for one in info.maps if one.name != name]
    of_test = info._replace(maps=(*maps, MapInfo(name, "table:room_of_test")))
    made = partial(Loader, sensors={**SENSORS, sensor: of_test})
    patch.setattr(state, "Loader", made)
    patch.setattr(
        state, "options_of", lambda kernel: {**options_of(kernel), "room_of_test": entries}
    )


# ---------------------------------------------------------------- flow_index

KEYS, FLOWS, TIMES = 64, 300, 3


def more_flows_than_keys() -> tuple[flow_reading.Counts, dict[str, int]]:
    """What is in which flow, and the faults."""
    kernel = state.load(Settings(kernel=Kernel(interfaces=("lo",))), {FLOW})
    try:
        kernel.attach()
        fd = kernel.program_fds["flow_egress"]
        for _ in range(TIMES):
            for port in range(FLOWS):
                run_program(fd, 1, ethernet(IPV4, ipv4(UDP, udp(1024 + port, 9))))
        kernel.detach()
        assert kernel.flows is not None
        while not kernel.flows.flush():
            pass
        counts = flow_reading.counts_of(case.event for case in drained(kernel, "bulk"))
        return counts, faults_of(kernel)
    finally:
        kernel.close()


def test_more_flows_than_the_index_has_room_for(monkeypatch: Patch) -> None:
    """Those that have a place are whole; each packet of the others is counted, and none gone."""
    options_of = state.options_of
    monkeypatch.setattr(
        state, "options_of", lambda kernel: {**options_of(kernel), "flow_index": KEYS}
    )
    counts, faults = Role("test", in_own_network, more_flows_than_keys).result()
    packets = [count for (_, _, what), count in counts.items() if what == "packets"]
    assert packets == [TIMES] * KEYS
    assert faults == {"FLOWS_FULL": (FLOWS - KEYS) * TIMES}


# ---------------------------------------------------------------- free_slots

SLOTS, ROUNDS = 64, 4


def flows_in_rounds() -> tuple[flow_reading.Counts, Counter[str], dict[str, int], list[int]]:
    """As many flows as there are slots, again and again. What is told, and why; faults; the room
    of the map of free slots."""
    kernel = state.load(Settings(kernel=Kernel(interfaces=("lo",), flows=SLOTS)), {FLOW})
    try:
        room = [one.entries for one in maps_of() if one.name == "free_slots"]
        kernel.attach()
        assert kernel.flows is not None
        fd = kernel.program_fds["flow_egress"]
        kernel.detach()
        for turn in range(ROUNDS):
            for port in range(SLOTS):
                frame = ethernet(IPV4, ipv4(UDP, udp(1024 + turn * SLOTS + port, 9)))
                run_program(fd, TIMES, frame)
            while not kernel.flows.flush():
                pass
        events = [case.event for case in drained(kernel, "bulk")]
        why = Counter(str(event["reason"]) for event in events)
        return flow_reading.counts_of(events), why, faults_of(kernel), room
    finally:
        kernel.close()


def test_slots_that_cannot_be_given_back(monkeypatch: Patch) -> None:
    """They are found again: no packet is missing. What makes way for others is counted as that."""
    give_room(monkeypatch, "tc_classifier", "free_slots", 1)
    counts, why, faults, room = Role("test", in_own_network, flows_in_rounds).result()
    assert room == [1]
    packets = [count for (_, _, what), count in counts.items() if what == "packets"]
    assert packets == [TIMES] * SLOTS * ROUNDS
    assert faults.get("FLOWS_EVICTED", 0) == why["evicted"]
    assert faults.keys() <= {"FLOWS_EVICTED"}


# ---------------------------------------------------------------- agent_peers

PEERS = 1024
CONNECTIONS = 1400
ANOTHERS = 5


def serve_all() -> Any:
    """Accept all that come, until the test lets it close them."""
    with many_descriptors(), socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        checkpoint(listener.getsockname()[1])
        accepted = [listener.accept()[0] for _ in range(CONNECTIONS + ANOTHERS)]
        checkpoint()
        for one in accepted:
            one.recv(1)
            one.close()
    return os.getpid()


def connect_some(port: int) -> list[int]:
    """As others do. Their ports."""
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(ANOTHERS)]
    ports = [int(one.getsockname()[1]) for one in clients]
    for one in clients:
        one.close()
    return ports


def test_more_connections_of_the_agents_own_than_are_remembered(scope: Scope) -> None:
    """At the other end those that were forgotten make events; and what others do makes all."""
    with (
        many_descriptors(),
        Live(scope, TCP_KINDS.split(",")) as live,
        scope.start(serve_all) as server,
    ):
        port = server.reached()
        server.proceed()
        own = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
        ours = [int(one.getsockname()[1]) for one in own]
        theirs = scope.act(connect_some, port)
        server.reached()
        for one in own:
            one.close()
        server.proceed()
        pid = server.result()
        live.check()
        events = [one for one in live.events if port in (one.local_port, one.remote_port)]
        faults = faults_of(live.state)
    found = Counter((kind_of(one), one.remote_port) for one in events if one.pid == pid)
    assert Counter({one: found[one] for one in found if one[1] in theirs}) == {
        (kind, port): 1 for kind in ("net.accept", "net.close") for port in theirs
    }
    of_ours = [one for one in found if one[1] in ours]
    assert {kind for kind, _ in of_ours} == {"net.close"}
    assert {found[one] for one in of_ours} == {1}
    assert CONNECTIONS - PEERS <= len(of_ours) < CONNECTIONS
    assert sum(one.pid != pid for one in events) == 2 * ANOTHERS
    assert "AGENT_PEERS_FULL" not in faults


# ---------------------------------------------------------------- exited

EXITS, THREADS, REMEMBERED = 300, 6, 16


def end_at_once() -> None:
    """A process whose threads end together with it."""
    barrier = threading.Barrier(THREADS)
    for _ in range(THREADS - 1):
        threading.Thread(target=lambda: (barrier.wait(), os._exit(3)), daemon=True).start()
    barrier.wait()
    os._exit(3)


def end_many() -> list[int]:
    """Processes of one thread and of several, all at once."""
    pids = []
    for number in range(EXITS):
        pid = os.fork()
        if not pid:
            end_at_once() if number % 10 == 0 else os._exit(3)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return pids


def test_more_exits_than_are_remembered(scope: Scope, monkeypatch: Patch) -> None:
    """Each is told, and none twice unless so many end between two threads of its process."""
    give_room(monkeypatch, "process", "exited", REMEMBERED)
    with Live(scope, {"process.exit"}) as live:
        held = {one.name: one.entries for one in live.maps()}
        pids = scope.act(end_many)
        live.check()
        found = Counter(one.pid for one in live.events)
        faults = faults_of(live.state)
    assert held["exited"] == REMEMBERED
    alone = [pid for number, pid in enumerate(pids) if number % 10]
    assert {found[pid] for pid in alone} == {1}
    assert {found[pid] for pid in pids} <= set(range(1, THREADS + 1))
    assert "EXITED_FULL" not in faults


# ---------------------------------------------------------------- failed_connects

FAILING, KNOWN = 64, 1
FIFO_PRIORITY = 10


def waiting() -> int:
    """Connections of this network namespace that wait for an answer to their SYN."""
    return Path("/proc/thread-self/net/tcp").read_text().count(" 02 ")


def fail_together() -> int:
    """Connects whose SYNs are dropped, until nobody listens: then all are refused at once.

    Nobody returns from connect() meanwhile: something more urgent has the CPU. How many failed.
    """
    cpu = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})
    listener = socket.create_server(("127.0.0.1", 0), backlog=FAILING)
    deafen(listener)
    refused = []

    def fail() -> None:
        with socket.socket() as client:
            refused.append(client.connect_ex(listener_at))

    listener_at = listener.getsockname()
    threads = [threading.Thread(target=fail) for _ in range(FAILING)]
    began = time.monotonic()
    for one in threads:
        one.start()
    deadline = began + seconds(10)
    while waiting() < FAILING:
        assert time.monotonic() < deadline, f"{waiting()} are waiting"
        time.sleep(0.001)
    listener.close()
    time.sleep(max(0, began + 0.9 - time.monotonic()))
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(FIFO_PRIORITY))
    try:
        while waiting():
            assert time.monotonic() < deadline, f"{waiting()} are still waiting"
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    for one in threads:
        one.join()
    return Counter(refused)[errno.ECONNREFUSED]


def test_more_connects_that_fail_than_are_remembered(scope: Scope, monkeypatch: Patch) -> None:
    """Each is told; those that were forgotten before they returned are told twice."""
    give_room(monkeypatch, "net", "failed_connects", KNOWN)
    with Live(scope, {"net.connect"}) as live:
        held = {one.name: one.entries for one in live.maps()}
        failed = scope.act(in_own_network, fail_together)
        live.check()
        found = Counter((one.errno, one.local_port) for one in live.events)
        faults = faults_of(live.state)
    assert held["failed_connects"] == KNOWN
    assert failed == len(found) == FAILING
    assert {error for error, _ in found} == {errno.ECONNREFUSED}
    assert {*found.values()} == {1, 2}
    # Where the machine is slow, some have returned before the CPU was taken.
    assert sum(times == 1 for times in found.values()) >= KNOWN
    assert "FAILED_FULL" not in faults


# ---------------------------------------------------------------- dns_unfollowed

FOLLOWED_NO_MORE = (b"first.test", b"second.test", b"third.test")


def lose_each() -> int:
    """Several connections to a server, with a query each, are not followed. The network's inode."""
    for name in FOLLOWED_NO_MORE:
        answer_behind_others([(name, MESSAGES)])
    return netns_inode()


def test_more_lost_connections_to_dns_servers_than_are_remembered(
    scope: Scope, monkeypatch: Patch
) -> None:
    """Each is counted; of those that were forgotten the query counts as not answered."""
    give_room(monkeypatch, "net_dns", "dns_unfollowed", 1)
    with Live(scope, {"net.dns"}, Settings(kernel=Kernel(dns_timeout_seconds=1))) as live:
        held = {one.name: one.entries for one in live.maps()}
        live.state.run_timed()
        netns = scope.act(in_own_network, lose_each)
        time.sleep(1.1)
        live.state.run_timed()
        live.check()
        events = [one for one in live.events if one.netns == netns]
        faults = faults_of(live.state)
    assert held["dns_unfollowed"] == 1
    assert sorted((one.query, one.state) for one in events) == [
        ("first.test", "unanswered"),
        ("second.test", "unanswered"),
        ("third.test", "unfollowed"),
    ]
    assert faults["DNS_UNFOLLOWED"] == len(FOLLOWED_NO_MORE)


# ---------------------------------------------------------------- what is kept with a task

TASKS = repetitions(3000, 1000)
IS_CHARGED = kernel_is(6, 18)
CHARGES = "before 6.18 what is kept with a task may take more memory than its cgroup has"


class Memory:
    """A memory cgroup, to which the kernel charges what maps take that are made within."""

    def __init__(self, place: Path, current: str, most: str, home: Path) -> None:
        self._place = place / f"streamer-test-{os.getpid()}"
        self._current, self._most = self._place / current, self._place / most
        self._home = home / "cgroup.procs"

    def enter(self) -> None:
        (self._place / "cgroup.procs").write_text(str(os.getpid()))

    def leave(self) -> None:
        self._home.write_text(str(os.getpid()))

    def is_used_up(self) -> None:
        """From now on there is no more than what was taken."""
        deadline = time.monotonic() + seconds(10)
        while True:
            try:
                self._most.write_text(self._current.read_text())
            except OSError:  # more was taken in between
                assert time.monotonic() < deadline
            else:
                return

    def __enter__(self) -> Self:
        self._place.mkdir()
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave()
        self._place.rmdir()


@pytest.fixture
def memory(require: Require) -> Iterator[Memory]:
    """In the hierarchy of version 1 or 2, whichever has the controller."""
    command_line = Path("/proc/cmdline").read_text()
    for off in ("nokmem", "nobpf"):
        require(off not in command_line, f"cgroup.memory={off}: cgroups are charged for no map")
    own = dict(
        (line.split(":")[1], line.split(":", 2)[2])
        for line in Path("/proc/self/cgroup").read_text().splitlines()
    )
    found, control = None, None
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        root = Path(place)
        if kind == "cgroup" and "memory" in options.split(","):
            names = "memory.usage_in_bytes", "memory.limit_in_bytes"
            found = Memory(root, *names, root / own["memory"].lstrip("/"))
        elif kind == "cgroup2" and "memory" in (root / "cgroup.controllers").read_text().split():
            control = enabled(root / "cgroup.subtree_control", require)
            found = Memory(root, "memory.current", "memory.max", root / own[""].lstrip("/"))
    require(found, "there is no memory controller of cgroups")
    assert found is not None
    try:
        with found as made:
            yield made
    finally:
        if control is not None:
            control.write_text("-memory")


def enabled(control: Path, require: Require) -> Path | None:
    """Have cgroups below this one account for memory; where to take that back, if they did not."""
    if "memory" in control.read_text().split():
        return None
    try:
        control.write_text("+memory")
    except OSError as error:
        require(False, f"cgroups cannot be made to account for memory: {error}")
    return control


def open_at_once(path: str) -> None:
    """By many threads, of which each has opened nothing before."""

    def open_one() -> None:
        os.close(os.open(path, os.O_RDONLY))

    at_once(open_one)


def at_once(function: Callable[[], None]) -> None:
    """Call it in so many threads, which are all there until the last one has returned."""
    barrier = threading.Barrier(TASKS + 1)

    def call() -> None:
        barrier.wait()
        function()
        barrier.wait()

    threading.stack_size(1 << 16)
    threads = [threading.Thread(target=call) for _ in range(TASKS)]
    for one in threads:
        one.start()
    barrier.wait()
    barrier.wait()
    for one in threads:
        one.join()


@pytest.mark.every_kernel
def test_starts_of_opens_without_memory(
    scope: Scope, memory: Memory, tmp_path: Path, require_kernel: Require
) -> None:
    """Each open is told; without its latency where its start had no room, which is counted."""
    require_kernel(IS_CHARGED, CHARGES)
    path = tmp_path / "opened"
    path.touch()
    memory.enter()
    with Live(scope, {"file.open"}, Settings(kernel=Kernel(open_latency=True))) as live:
        memory.leave()
        memory.is_used_up()
        scope.act(open_at_once, str(path))
        live.check()
        opens = [one for one in live.events if one.path == str(path)]
        lost, faults = live.counts("file.open").lost, faults_of(live.state)
        missed = sum(live.state.missed().values())  # runs that the kernel left out
    without = sum(one.latency_ns == 0 for one in opens)
    assert lost == 0
    assert TASKS - missed <= len(opens) <= TASKS
    assert 0 < without < len(opens)
    # Faults are the whole machine's, and others open files, too. A run that was left out noted no
    # start either.
    assert faults["OPEN_STARTS_FULL"] >= without - missed


def ask_for_priorities() -> None:
    """By a call that nobody else makes: an agent that another test starts asks for its own."""

    def ask() -> None:
        os.sched_get_priority_max(os.SCHED_OTHER)

    at_once(ask)


@pytest.mark.every_kernel
def test_starts_of_system_calls_without_memory(
    scope: Scope, memory: Memory, require_kernel: Require
) -> None:
    """Each call is in the latencies, or counted as one that is not, or its run was left out."""
    require_kernel(IS_CHARGED, CHARGES)
    memory.enter()
    with Timing(scope, "sched_get_priority_max") as timing:
        memory.leave()
        memory.is_used_up()
        scope.act(ask_for_priorities)
        timed = timing.of_all()["sched_get_priority_max"].count
        full = faults_of(timing.state)["SYSCALL_STARTS_FULL"]
        missed = sum(timing.state.missed().values())  # runs that the kernel left out
    assert 0 < timed < TASKS
    assert TASKS - missed <= timed + full <= TASKS


EXECS = repetitions(2000, 600)


def execute_at_once() -> set[int]:
    """So many processes, none of which ends before the last one has executed a program. Pids."""
    read, write = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, read, 0)]
    pids = {os.posix_spawn("/bin/cat", ["cat"], {}, file_actions=actions) for _ in range(EXECS)}
    os.close(write)
    for pid in pids:
        assert os.waitpid(pid, 0) == (pid, 0)
    return pids


@pytest.mark.usefixtures("as_if_preempted")
def test_what_is_executed_without_memory(
    scope: Scope, memory: Memory, require_kernel: Require
) -> None:
    """Each exec is told; one of which nothing was kept says that it lacks the interpreter."""
    require_kernel(IS_CHARGED, CHARGES)
    memory.enter()
    with Live(scope, {"process.exec"}) as live:
        memory.leave()
        memory.is_used_up()
        pids = scope.act(execute_at_once)
        live.check()
        execs = live.events
    without = [one for one in execs if one.incomplete]
    assert {one.pid for one in execs} == pids
    assert len(execs) == EXECS
    assert 0 < len(without) < EXECS
    assert {(one.interp, one.truncated) for one in without} == {("", ("interp",))}
    assert {(one.filename, one.argc) for one in execs} == {("/bin/cat", 1)}
