"""Whose a connection is, also when somebody uses up all the room for saying so."""

from __future__ import annotations

import copy
import ctypes
import errno
import os
import select
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest

from tests.bpf_variant import Variant
from tests.conftest import Require
from tests.kernel.agent import Agent, Recording
from tests.kernel.roles import Role, in_own_network, netns_inode
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import kernel_is, kernel_knows
from tests.kernel.test_net import (
    INBOUND,
    NET,
    OUTBOUND,
    Closed,
    End,
    Seen,
    Transfer,
    assert_seen,
    closed_in,
    end_in,
    end_of,
    listening,
    receive,
    serve,
    use,
)
from tests.kernel.unprivileged import (
    CLONE_NEWNET,
    UID,
    become,
    more_descriptors,
    own_namespaces,
)

pytestmark = pytest.mark.kernel

ROOM = 1024  # the least that can be configured
HELD = 1200
CONFIG = f"[kernel]\nconnections = {ROOM}\n"
TRANSFERS = [Transfer(n, 2 * n, ending) for n in (0, 1000) for ending in ("first", "last", "half")]
RESETS = struct.pack("ii", 1, 0)  # SO_LINGER: a close that resets


class Story(NamedTuple):
    """What happened in one network namespace."""

    netns: int
    seen: list[Seen]


def tell(function: Callable[..., list[Seen]]) -> Story:
    story = Story(netns_inode(), function())
    checkpoint()
    return story


class Run:
    """Stories that happen one after another while an agent looks on, and what it recorded."""

    recording: Recording

    def __init__(self, directory: Path, scope: Scope, **more: Any) -> None:
        """`directory` is the agent's, `more` goes to it."""
        self.agent = Agent(directory, *scope.options, events=NET, **more)
        self.stories: dict[str, Story] = {}
        self._scope = scope
        self._networks = ExitStack()

    def act(
        self,
        function: Callable[..., list[Seen]],
        network: Callable[..., Story] = in_own_network,
        name: str = "",
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Let the function act in a network of its own, until all is told. `meanwhile` is called
        at its checkpoint.
        """
        before = self.agent.output.read_bytes().count(CLOSE)
        with self._scope.start(network, tell, function) as actor:
            if meanwhile is not None:
                actor.reached()
                meanwhile()
                actor.proceed()
            actor.reached()
            self.hold_network(actor.pid)
            actor.proceed()
            story: Story = actor.result()
        self.agent.wait_for(CLOSE, before + sum(len(one.closed) for one in story.seen))
        self.stories[name or function.__name__] = story

    def hold_network(self, pid: int) -> None:
        """To the end, no other network namespace gets the number of that one."""
        network_fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        self._networks.callback(os.close, network_fd)

    def assert_true(self, name: str) -> None:
        """It happened as it is recorded, and each time the right process did it."""
        story = self.stories[name]
        assert_seen(within(self.recording, story), *story.seen)

    def __enter__(self) -> Self:
        self.agent.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._networks:
            try:
                if exc[0] is None:
                    self.recording = self.agent.stop()
            finally:
                self.agent.kill()


CLOSE = b'{"event":"net.close"'


def within(recording: Recording, story: Story) -> Recording:
    """Only what happened in that network namespace."""
    made = copy.copy(recording)
    made.events = [event for event in recording.events if event.netns == story.netns]
    made.all = [*made.events, recording.manifest]
    return made


# ---------------------------------------------------------------- the flood


def hold_connections() -> None:
    """As a user without any privilege: have so many accepted connections, until told."""
    more_descriptors(2 * HELD)
    become(UID)
    own_namespaces(CLONE_NEWNET)
    with listening("127.0.0.1", backlog=HELD) as listener:
        other, mine = socket.socketpair()
        accepting = os.fork()
        if accepting == 0:
            accept_and_hold(listener, other)
        held = [socket.create_connection(listener.getsockname()) for _ in range(HELD)]
        assert mine.recv(1) == b"!"
        checkpoint()
        mine.send(b"!")
        assert os.waitpid(accepting, 0) == (accepting, 0)
        for one in held:
            one.close()


def accept_and_hold(listener: socket.socket, partner: socket.socket) -> None:
    try:
        held = [listener.accept() for _ in range(HELD)]
        partner.send(b"!")
        partner.recv(1)
        os._exit(len(held) - HELD)
    finally:
        os._exit(1)


@contextmanager
def flooded(cgroups: Path, run: Run) -> Iterator[None]:
    """While some user has used up the table of connections."""
    with Scope(cgroups) as scope, scope.start(hold_connections) as actor:
        actor.reached()
        run.hold_network(actor.pid)
        yield
        actor.proceed()
        actor.result()


# ---------------------------------------------------------------- what others do meanwhile


def connect_and_serve() -> list[Seen]:
    """Orderly connections: accepted by another process than the one that listens, and by it."""
    with listening("127.0.0.1") as listener:
        roles = [Role("acceptor", serve, listener, TRANSFERS)]
        roles += [Role("client", use, listener.getsockname(), TRANSFERS)]
        found = [role.result() for role in roles]
        client = Role("client", use, listener.getsockname(), TRANSFERS)
        return [*found, serve(listener, TRANSFERS), client.result()]


def reset_by_peer(listener: socket.socket, partner: socket.socket) -> Seen:
    """Accept; then the client resets, which is told in an interrupt."""
    seen = Seen([], [], [])
    connection, _ = listener.accept()
    end = end_of(connection)
    seen.taken.append((end, connection.fileno()))
    receive(connection, 10)
    partner.send(b"!")
    with pytest.raises(ConnectionResetError):
        connection.recv(1)
    connection.close()
    seen.closed.append(Closed(end, INBOUND, 0, 10, errno.ECONNRESET))
    return seen


def reset_it(target: tuple[str, int], partner: socket.socket) -> Seen:
    client = socket.create_connection(target)
    end = end_of(client)
    client.sendall(b"a" * 10)
    assert partner.recv(1) == b"!"
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
    client.close()
    return Seen([(end, 0)], [], [Closed(end, OUTBOUND, 10, 0, 0)])


def reset_what_the_listener_accepted() -> list[Seen]:
    ours, theirs = socket.socketpair()
    with listening("127.0.0.1") as listener:
        client = Role("client", reset_it, listener.getsockname(), theirs)
        return [reset_by_peer(listener, ours), client.result()]


def reset_what_another_accepted() -> list[Seen]:
    ours, theirs = socket.socketpair()
    with listening("127.0.0.1") as listener:
        acceptor = Role("acceptor", reset_by_peer, listener, ours)
        client = Role("client", reset_it, listener.getsockname(), theirs)
        return [acceptor.result(), client.result()]


def outlast() -> list[Seen]:
    """Another accepts here while the table is full; once it is not, the one who listens does."""
    ours, theirs = socket.socketpair()
    with listening("127.0.0.1") as listener:
        another = Role("acceptor", serve, listener, TRANSFERS[:1])
        found = [use(listener.getsockname(), TRANSFERS[:1]), another.result()]
        checkpoint()
        client = Role("client", reset_it, listener.getsockname(), theirs)
        return [*found, reset_by_peer(listener, ours), client.result()]


def accept_and_reset(listener: socket.socket) -> Seen:
    connection, _ = listener.accept()
    end = end_of(connection)
    taken = [(end, connection.fileno())]
    receive(connection, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
    connection.close()
    return Seen([], taken, [Closed(end, INBOUND, 0, 1, 0)])


def be_reset(target: tuple[str, int]) -> Seen:
    client = socket.create_connection(target)
    end = end_of(client)
    client.sendall(b"a")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    client.close()
    return Seen([(end, 0)], [], [Closed(end, OUTBOUND, 1, 0, errno.ECONNRESET)])


def another_accepts_and_resets() -> list[Seen]:
    with listening("127.0.0.1") as listener:
        acceptor = Role("acceptor", accept_and_reset, listener)
        client = Role("client", be_reset, listener.getsockname())
        return [acceptor.result(), client.result()]


def refuse() -> list[Seen]:
    """A refusal is told in an interrupt too."""
    with socket.socket() as target, socket.socket() as client:
        target.bind(("127.0.0.1", 0))
        client.bind(("127.0.0.1", 0))
        end = end_of(client, target.getsockname())
        assert client.connect_ex(target.getsockname()) == errno.ECONNREFUSED
    return [Seen([(end, errno.ECONNREFUSED)], [], [])]


def listen_beside(port: int, partner: socket.socket) -> None:
    """As a user without privilege, at the same port of another address."""
    become(UID)
    with socket.create_server(("127.0.0.2", port)):
        partner.send(b"!")
        partner.recv(1)


def share_a_port() -> list[Seen]:
    """A connection that nobody accepts, where a user listens beside."""
    ours, theirs = socket.socketpair()
    with listening("127.0.0.1") as listener:
        beside = Role("beside", listen_beside, listener.getsockname()[1], theirs)
        assert ours.recv(1) == b"!"
        client = socket.create_connection(listener.getsockname())
        end = end_of(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
        client.close()
        ours.send(b"!")
        beside.result()
    inbound = Closed(end._replace(local=end.remote, remote=end.local), INBOUND, 0, 0, 104)
    return [Seen([(end, 0)], [], [Closed(end, OUTBOUND, 0, 0, 0), inbound])]


ROOM_IN_SOCKETS = Path("/proc/sys/net/core/optmem_max")


def without_room(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it as a user without privilege, whose sockets have no room for what is kept there."""
    become(UID)
    own_namespaces(CLONE_NEWNET)
    if ROOM_IN_SOCKETS.exists():  # from 6.8 on: each network namespace has its own
        ROOM_IN_SOCKETS.write_text("1")
    return function(*arguments)


# ---------------------------------------------------------------- kept with the socket

KNOWN = (
    connect_and_serve,
    reset_what_the_listener_accepted,
    another_accepts_and_resets,
    refuse,
    share_a_port,
)
ALONE = KNOWN[:-1]


@pytest.fixture(scope="module")
def flooded_run(cgroups: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Everything, while the table of connections is full."""
    directory = tmp_path_factory.mktemp("flooded")
    with (
        Scope(cgroups) as scope,
        Run(directory, scope, config=CONFIG) as run,
        ExitStack() as flood,
    ):
        flood.enter_context(flooded(cgroups, run))
        for function in (*KNOWN, reset_what_another_accepted):
            run.act(function)
        run.act(connect_and_serve, without_room, "without_room")
        run.act(outlast, meanwhile=flood.close)
    return run


@pytest.fixture
def with_storage(flooded_run: Run, require_kernel: Require) -> Run:
    """The run, on a kernel where owners are kept with their sockets."""
    typed = flooded_run.recording.ways["sock_state"].startswith("tp_btf/")
    require_kernel(
        typed, "before 5.11 the kernel keeps nothing with a socket for a tracing program"
    )
    return flooded_run


def test_a_full_table_is_reported(flooded_run: Run) -> None:
    assert flooded_run.recording.heartbeat.faults["connections_full"] >= HELD - ROOM


@pytest.mark.parametrize("function", KNOWN)
def test_a_full_table_takes_nobodys_name(with_storage: Run, function: Any) -> None:
    """Owners are kept with their sockets; who closes, and who accepts, is the current task."""
    with_storage.assert_true(function.__name__)


def test_who_cannot_be_known_is_not_guessed(with_storage: Run) -> None:
    """Accepted by another than who listens, which could not be kept, and reset in an interrupt:
    it is nobody's, and neither the listener's nor that of whom the interrupt hit.
    """
    story = with_storage.stories["reset_what_another_accepted"]
    recording = within(with_storage.recording, story)
    acceptor, client = story.seen
    nobody = [nobodys(one) for one in acceptor.closed]
    unknown = [e for e in recording.events if not e.owner_known]
    assert [closed_in(event) for event in unknown] == nobody
    assert_nobodys(unknown)
    recording.all = [event for event in recording.all if event not in unknown]
    assert_seen(recording, acceptor._replace(closed=[]), client)


def test_a_flood_that_is_over_has_no_effect(with_storage: Run) -> None:
    """On a socket of which the owner of some connections could not be kept."""
    with_storage.assert_true("outlast")


def nobodys(one: Closed) -> Closed:
    return one._replace(end=without_owner(one.end))


def without_owner(end: End) -> End:
    return end._replace(pid=0, comm="")


def assert_nobodys(events: Sequence[Any]) -> None:
    """Nothing is said of an owner. Such events pass every filter by owner: here by cgroup."""
    for event in events:
        assert (event.owner_known, event.start_boot_ns, event.cgroup_id) == (False, 0, 0)
        assert (event.pid, event.tid, event.ppid, event.uid, event.gid) == (0, 0, 0, 0, 0)
        assert (event.comm, event.pidns, event.ns_pid) == ("", 0, 0)


def test_who_leaves_no_room_is_unknown_and_told(flooded_run: Run, require_kernel: Require) -> None:
    """A user can refuse the room in his sockets, and use up the table. His accepts have his name,
    as the current task is known; of the rest no owner is told, and nothing is left out.
    """
    require_kernel(kernel_is(6, 8), "before 6.8 the room in sockets is the host's alone to set")
    assert_only_accepts_known(flooded_run, "without_room")


def assert_only_accepts_known(run: Run, name: str) -> None:
    """Of the rest, owners of as many as had room after all, while others closed theirs."""
    story = run.stories[name]
    recording = within(run.recording, story)
    connects, accepts = recording.of("net.connect"), recording.of("net.accept")
    closes = recording.of("net.close")
    tried = [made for one in story.seen for made in one.tried]
    taken = [made for one in story.seen for made in one.taken]
    closed = [one._replace(direction="any") for seen in story.seen for one in seen.closed]
    assert sorted((end_in(e), e.fd) for e in accepts) == sorted(taken)
    assert all(event.owner_known for event in accepts)
    unknown = [event for event in (*connects, *closes) if not event.owner_known]
    assert unknown
    assert_nobodys(unknown)
    found = [((end_in(e), e.errno), e.owner_known) for e in connects]
    assert_true_or_unknown(found, tried, lambda one: (without_owner(one[0]), one[1]))
    ended = [(closed_in(e)._replace(direction="any"), e.owner_known) for e in closes]
    assert_true_or_unknown(ended, closed, nobodys)


def assert_true_or_unknown(
    found: list[tuple[Any, bool]], happened: list[Any], without: Callable[[Any], Any]
) -> None:
    """Each thing that happened was found once, and where an owner was found it is the true one."""
    assert sorted(without(one) for one, _ in found) == sorted(map(without, happened))
    assert Counter(one for one, known in found if known) <= Counter(happened)


# ---------------------------------------------------------------- kept in the table


@pytest.fixture(scope="module")
def calm_run(cgroups: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("calm")
    with Scope(cgroups) as scope, Run(directory, scope) as run:
        for function in (*ALONE, reset_what_another_accepted):
            run.act(function, without_room)
        run.act(connect_what_is_no_socket)
    return run


@pytest.mark.parametrize("function", [*ALONE, reset_what_another_accepted])
def test_a_socket_without_room_hides_nobody(calm_run: Run, function: Any) -> None:
    """net.core.optmem_max is a user's own in a network namespace of his: the table has room."""
    calm_run.assert_true(function.__name__)


def test_sockets_without_room_are_reported(calm_run: Run, require_kernel: Require) -> None:
    require_kernel(kernel_is(6, 8), "before 6.8 the room in sockets is the host's alone to set")
    faults = calm_run.recording.heartbeat.faults
    assert faults["socket_storage"] > 0
    assert "connections_full" not in faults


NO_STORAGE = ("bpf_sk_storage_get(&sockets,", "bpf_sk_storage_get(&connections,")


@pytest.fixture(scope="module")
def run_without_storage(cgroups: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """As on kernels before 5.11: the programs that use the sockets' storage do not load."""
    directory = tmp_path_factory.mktemp("untyped")
    variant = Variant(directory / "variant", {"net.bpf.c": NO_STORAGE}, only=("core", "net"))
    prefix = variant.with_streamer()
    with (
        Scope(cgroups) as scope,
        Run(directory / "agent", scope, config=CONFIG, prefix=prefix) as run,
    ):
        for function in (*ALONE, reset_what_another_accepted):
            run.act(function)
        with flooded(cgroups, run):
            run.act(connect_and_serve, name="flooded")
        run.act(connect_and_serve, name="afterwards")
    run.agent.output.unlink()  # unknown owners among others on this machine are not left out
    return run


def test_without_storage_the_table_has_all(run_without_storage: Run) -> None:
    ways = run_without_storage.recording.ways
    hooks = ["sock_state"]
    if kernel_knows("bpf_prog_inc_misses_counter"):  # before 5.12 none is left out
        hooks.append("sock_state_twin")
    assert {ways.get(hook) for hook in hooks} == {"raw_tp/inet_sock_set_state"}
    for function in (*ALONE, reset_what_another_accepted):
        run_without_storage.assert_true(function.__name__)


def test_without_storage_a_full_table_leaves_owners_unknown(run_without_storage: Run) -> None:
    """And says so; and no filter leaves them out."""
    assert run_without_storage.recording.heartbeat.faults["connections_full"] >= HELD - ROOM
    assert_only_accepts_known(run_without_storage, "flooded")


def test_without_storage_the_table_is_emptied_again(run_without_storage: Run) -> None:
    run_without_storage.assert_true("afterwards")


# ---------------------------------------------------------------- no socket


def connect_what_is_no_socket() -> list[Seen]:
    """Every sort of descriptor that connect() refuses, and sockets that are not TCP's."""
    reader, writer = os.pipe()
    named = f"/tmp/streamer-test-{os.getpid()}"
    with (
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as netlink,
        select.epoll() as epoll,
    ):
        unix.bind(named)
        path = os.open(named, os.O_PATH)
        os.unlink(named)
        others = [os.open(p, os.O_RDONLY) for p in ("/proc/self/maps", "/dev/null", "/tmp")]
        for fd in (reader, writer, os.memfd_create("no socket"), epoll.fileno(), *others):
            assert connect_error(fd) == errno.ENOTSOCK
        for fd in (path, 999, -1):
            assert connect_error(fd) == errno.EBADF
        for fd in (unix.fileno(), netlink.fileno()):
            assert connect_error(fd) in (errno.EINVAL, errno.EAFNOSUPPORT)
    connect_look_alikes()
    return [Seen([], [], [])]


LOOK_ALIKES = 2000


def connect_look_alikes() -> None:
    """Event counters. Taken for a struct socket, each has as its struct sock memory around it, and
    the counters as its family and protocol: AF_INET and TCP.
    """
    more_descriptors(2 * LOOK_ALIKES)
    fds = [os.eventfd(0) for _ in range(LOOK_ALIKES)]
    for fd in fds:
        os.eventfd_write(fd, socket.IPPROTO_TCP << 32 | socket.AF_INET)
    for fd in fds:
        assert connect_error(fd) == errno.ENOTSOCK


_libc = ctypes.CDLL(None, use_errno=True)


def connect_error(fd: int) -> int:
    address = struct.pack("=H", socket.AF_INET) + struct.pack(">H4s8x", 1, bytes([127, 0, 0, 1]))
    assert _libc.connect(fd, address, len(address)) == -1
    return ctypes.get_errno()


def test_connects_of_what_is_no_socket(calm_run: Run) -> None:
    """They are no event, whatever lies in memory where a socket would have its address."""
    story = calm_run.stories["connect_what_is_no_socket"]
    others = {one.netns for one in calm_run.stories.values()} - {story.netns}
    assert {event.netns for event in calm_run.recording.events} == others
