"""`net.dns`, against real servers and clients, and against one that answers as no server should.

Everything happens in network namespaces of its own. dig is the witness of what was answered.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.agent import Agent, Recording
from tests.kernel.dns import (
    PORT,
    Digged,
    ask,
    dig,
    dnsmasq,
    framed,
    in_pieces,
    over_tcp,
    query,
    question,
    read_framed,
    record,
    response,
    serve,
)
from tests.kernel.pace import seconds
from tests.kernel.roles import Role, enter_netns, in_own_network, netns_inode, two_namespaces
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.test_fairness import may_say_who_logged_in
from tests.kernel.test_tracepoint_net import deafen, nstat
from tests.kernel.unprivileged import become, own_namespaces

pytestmark = pytest.mark.kernel

NOBODY = 65534
CLONE_NEWNS = 0x20000
LOGINUID = Path("/proc/self/loginuid")
SO_DETACH_FILTER = 27
ONE_A = record(socket.inet_aton("192.0.2.1"))
SOON = "[kernel]\ndns_timeout_seconds = 1\n"


def recorded(
    directory: Path, scope: Scope, function: Any, *arguments: Any, config: str = "", wait: int = 0
) -> tuple[Any, Recording]:
    """What the function gave, in a network of its own, and the agent's recording of that network.

    A response that nobody asked for has no owner, so no filter keeps back those of other tests on
    this machine. What is counted (faults, `produced`) is of all of it still. `wait` for so many
    events before the agent is ended: those that come only in time.
    """
    with scope.start(in_own_network, when_told, function, arguments) as actor:
        netns = actor.reached()
        # As long as it is open, no other network gets its number.
        with (
            open(f"/proc/{actor.pid}/ns/net", "rb"),
            Agent(directory, *scope.options, events="net.dns", config=config) as agent,
        ):
            actor.proceed()
            result = actor.result()
            if wait:
                agent.wait_for(b'"netns":%d,' % netns, wait)
            recording = agent.stop()
    recording.all = [one for one in recording.all if getattr(one, "netns", netns) == netns]
    return result, recording


def when_told(function: Any, arguments: tuple[Any, ...]) -> Any:
    checkpoint(netns_inode())
    return function(*arguments)


def told(event: Any) -> tuple[str, str, str, str]:
    return event.query, event.query_type, event.state, event.response_code


# ---------------------------------------------------------------- a real server, real clients

ASKED = (
    ("a.test", "A"),
    ("h.test", "AAAA"),
    ("c.test", "A"),
    ("t.test", "TXT"),
    ("m.test", "MX"),
    ("_x._udp.test", "SRV"),
    ("9.2.0.192.in-addr.arpa", "PTR"),
    ("no.test", "A"),
    ("CaSe.TEST", "A"),
    ("example.org", "A"),
    (r"a\.b\032c\255.test", "A"),
    (".", "NS"),
)


def dig_all() -> tuple[int, dict[tuple[str, str], Digged]]:
    with dnsmasq():
        found = {}
        for at, (name, kind) in enumerate(ASKED):
            server = ("@127.0.0.1", "@::1")[at % 2]
            found[name, kind] = dig("-q", name, "-t", kind, server)
        return netns_inode(), found


def as_dig(name: str) -> str:
    """A name as dig writes it, with the dot at its end."""
    return name if name == "." else f"{name}."


def test_what_dig_asks_is_told_as_dig_is(tmp_path: Path, scope: Scope) -> None:
    """Each exchange is one event, with number, type, code and answers as dig has them."""
    (netns, digged), recording = recorded(tmp_path, scope, dig_all)
    events = {(event.query, event.query_type): event for event in recording.of("net.dns")}
    assert len(recording.of("net.dns")) == len(ASKED)
    assert events.keys() == digged.keys()
    for asked, witness in digged.items():
        event = events[asked]
        assert (event.dns_id, event.response_code) == (witness.number, witness.status), asked
        assert (event.state, event.queries, event.malformed) == ("answered", 1, "")
        assert (event.transport, event.remote_port, event.netns) == ("udp", PORT, netns)
        assert event.remote_addr in ("127.0.0.1", "::1")
        assert event.owner_known
        assert event.comm.startswith("isc-net")
        assert 0 < event.latency_ns < seconds(3) * 10**9
        has_names = ("CNAME", "MX", "SRV", "PTR")
        shown = [
            (as_dig(a.name), a.ttl, a.type, as_dig(a.data) if a.type in has_names else a.data)
            for a in event.answers
        ]
        assert shown == witness.answers
    assert {digged["no.test", "A"].status, digged["example.org", "A"].status} == {
        "NXDOMAIN",
        "REFUSED",
    }
    assert len(events["c.test", "A"].answers) == 3  # two names for one, and its address


RESOLVE = "import socket, sys; print(len(socket.getaddrinfo(sys.argv[1], None, 0, 1)))"


def resolve() -> tuple[int, int]:
    """As any program does: by the C library, and what its configuration says."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    own = Path("/tmp") / f"streamer-resolv-{os.getpid()}"
    own.write_text("nameserver 127.0.0.1\n")
    try:
        subprocess.run(["mount", "--bind", str(own), "/etc/resolv.conf"], check=True)
        with dnsmasq():
            command = [sys.executable, "-c", RESOLVE, "h.test"]
            client = subprocess.Popen(command, stdout=subprocess.PIPE)
            output, _ = client.communicate()
            return client.pid, int(output)
    finally:
        own.unlink()


def test_what_the_c_library_asks_is_its_process_s(tmp_path: Path, scope: Scope) -> None:
    """getaddrinfo() asks for both kinds of address at once, from one socket."""
    (pid, addresses), recording = recorded(tmp_path, scope, resolve)
    assert addresses == 2
    events = recording.of("net.dns")
    assert Counter(map(told, events)) == {
        ("h.test", "A", "answered", "NOERROR"): 1,
        ("h.test", "AAAA", "answered", "NOERROR"): 1,
    }
    assert {event.pid for event in events} == {pid}
    assert len({event.local_port for event in events}) == 1
    assert len({event.dns_id for event in events}) == 2


# ---------------------------------------------------------------- between namespaces


def answer_within(netns: str, address: str, count: int) -> None:
    enter_netns(netns)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind((address, PORT))
        server.settimeout(seconds(20))
        for _ in range(count):
            asked, peer = server.recvfrom(65535)
            server.sendto(response(asked, ONE_A, 1), peer)


def ask_within(netns: str, addresses: list[str]) -> int:
    enter_netns(netns)
    for number, address in enumerate(addresses):
        ask([query(number, question(b"far.test"))], answers=1, address=address)
    return netns_inode()


def test_each_network_namespace_is_seen_without_being_named(tmp_path: Path, scope: Scope) -> None:
    """As of two containers: the one asks, the other, of another cgroup, answers. One event each."""
    addresses = ["192.0.2.2", "2001:db8::2"]
    with two_namespaces() as (client, server):
        roles = [Role("server", answer_within, server, address, 1) for address in addresses]
        time.sleep(seconds(0.3))
        with Agent(tmp_path, *scope.options, events="net.dns") as agent:
            netns = scope.act(ask_within, client, addresses)
            for role in roles:
                role.result()
            recording = agent.stop()
    events = recording.of("net.dns")
    assert [event.remote_addr for event in events] == addresses
    assert [event.local_addr for event in events] == ["192.0.2.1", "2001:db8::1"]
    assert {event.netns for event in events} == {netns}
    assert [event.ip_version for event in events] == [4, 6]


# ---------------------------------------------------------------- no answer, and others' answers


def ask_in_vain() -> tuple[int, int]:
    """Three queries, of which two are sent again, to a port where nobody answers.

    The process, and the port that it asks from.
    """
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        deaf.bind(("127.0.0.1", PORT))
        for number, name in enumerate((b"one.test", b"two.test", b"three.test")):
            for _ in range(number * 2 or 1):
                client.sendto(query(number, question(name)), ("127.0.0.1", PORT))
        return os.getpid(), client.getsockname()[1]


def test_a_query_that_nobody_answers_is_told_in_time(tmp_path: Path, scope: Scope) -> None:
    """Once each, however often it was sent, and though its socket is closed by then."""
    (pid, port), recording = recorded(tmp_path, scope, ask_in_vain, config=SOON, wait=3)
    events = recording.of("net.dns")
    assert sorted((event.query, event.queries) for event in events) == [
        ("one.test", 1),
        ("three.test", 4),
        ("two.test", 2),
    ]
    for event in events:
        assert (event.state, event.response_code, event.answers) == ("unanswered", "", [])
        assert (event.pid, event.message_bytes, event.local_port) == (pid, 0, port)
        assert event.recursion_desired
        assert not event.recursion_available
        assert 10**9 <= event.latency_ns < seconds(8) * 10**9


FORGED = b"forged.test"


def forge() -> None:
    """One query; before its response come four that are none."""

    def answer(asked: bytes) -> list[bytes]:
        number = struct.unpack_from("!H", asked)[0]
        wrong_number = struct.pack("!H", number ^ 1) + response(asked, ONE_A, 1)[2:]
        wrong_question = response(query(number, question(b"other.test")), ONE_A, 1)
        wrong_type = response(query(number, question(FORGED, 28)), ONE_A, 1)
        good = response(asked[:12] + asked[12:].upper(), ONE_A, 1)
        return [wrong_number, wrong_question, wrong_type, good, good]

    with (
        serve(answer),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
    ):
        client.bind(("127.0.0.1", 0))
        client.settimeout(seconds(5))
        stranger.bind(("127.0.0.2", PORT))
        asked = query(77, question(FORGED))
        # From another address: it comes before the query is sent, and then with the rest.
        stranger.sendto(response(asked, ONE_A, 1), client.getsockname())
        client.sendto(asked, ("127.0.0.1", PORT))
        for _ in range(6):
            client.recvfrom(65535)


def test_only_the_response_to_the_query_answers_it(tmp_path: Path, scope: Scope) -> None:
    """By address, number and question, whatever the case of its letters; a second one does not."""
    _, recording = recorded(tmp_path, scope, forge)
    events = recording.of("net.dns")
    assert Counter(event.state for event in events) == {"answered": 1, "unsolicited": 5}
    (answered,) = [event for event in events if event.state == "answered"]
    assert (answered.query, answered.dns_id, answered.malformed) == ("FORGED.TEST", 77, "")
    unsolicited = [event for event in events if event.state == "unsolicited"]
    assert all((event.pid, event.queries, event.latency_ns) == (0, 0, 0) for event in unsolicited)
    assert not any(event.owner_known for event in unsolicited)
    assert sorted(event.remote_addr for event in unsolicited) == ["127.0.0.1"] * 4 + ["127.0.0.2"]


def ask_behind_a_peer() -> None:
    """From a socket that is connected to a port which has nothing to do with DNS."""
    with (
        serve(lambda asked: []),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.connect(("127.0.0.2", 9))
        client.sendto(query(1, question(b"hidden.test")), ("127.0.0.1", PORT))


def test_a_peer_of_the_socket_hides_no_query(tmp_path: Path, scope: Scope) -> None:
    """A connected socket, too, can send to anybody: it is told whom the packet went to."""
    _, recording = recorded(tmp_path, scope, ask_behind_a_peer, config=SOON, wait=1)
    (event,) = recording.of("net.dns")
    assert told(event) == ("hidden.test", "A", "unanswered", "")
    assert (event.remote_addr, event.remote_port) == ("127.0.0.1", PORT)
    assert event.owner_known


# ---------------------------------------------------------------- what no server should send

NAME = b"odd.test"
AT_QUESTION = b"\xc0\x0c"
LONG_NAME = (b"\x3f" + b"x" * 63) * 4 + b"\0"
ODD: dict[str, tuple[bytes, int, str]] = {
    "a loop": (b"\xc0\x1a" + ONE_A[2:], 1, "a pointer that does not lead back"),
    "forward": (b"\xc0\xff" + ONE_A[2:], 1, "a pointer that does not lead back"),
    "a label type": (b"\x80" + ONE_A[1:], 1, "a label of an unknown type"),
    "too long": (record(b"\1\2\3\4", name=LONG_NAME), 1, "a name that is too long"),
    "too early": (ONE_A[:-2], 1, "it ends too early"),
    "fewer": (ONE_A, 2, "it ends too early"),
    "a short address": (record(b"\1\2\3"), 1, "a record of type A of another length"),
    "a long name's data": (record(b"\1x\0y", 5), 1, "a record of type CNAME of another length"),
    "a loop in data": (record(b"\xc0\x26", 5), 1, "a pointer that does not lead back"),
}


def ask_for_odd() -> None:
    def answer(asked: bytes) -> list[bytes]:
        records, count, _ = list(ODD.values())[asked[1]]
        return [response(asked, records, count)]

    with serve(answer):
        for number in range(len(ODD)):
            ask([query(number, question(NAME))], answers=1)


def test_malformed_responses_are_survived_and_marked(tmp_path: Path, scope: Scope) -> None:
    """Each answers its query, for number and question are in order; what is wrong is said."""
    _, recording = recorded(tmp_path, scope, ask_for_odd)
    events = sorted(recording.of("net.dns"), key=lambda event: event.dns_id)
    assert [event.malformed for event in events] == [mistake for _, _, mistake in ODD.values()]
    assert {told(event) for event in events} == {("odd.test", "A", "answered", "NOERROR")}
    for event in events:
        assert len(event.answers) + event.answers_left_out in (1, 2)


BAD_QUESTIONS = (
    b"\x80odd\0\0\1\0\1",
    b"\x3fshort",
    b"\xc0\x0c\0\1\0\1",
    LONG_NAME + b"\0\1\0\1",
    b"",
)


def ask_oddly() -> None:
    with serve(lambda asked: []):
        ask([query(number, odd) for number, odd in enumerate(BAD_QUESTIONS)], answers=0)


def test_malformed_questions_are_marked(tmp_path: Path, scope: Scope) -> None:
    _, recording = recorded(tmp_path, scope, ask_oddly, config=SOON, wait=len(BAD_QUESTIONS))
    events = sorted(recording.of("net.dns"), key=lambda event: event.dns_id)
    assert [event.malformed for event in events] == [
        "a label of an unknown type",
        "it ends too early",
        "a pointer that does not lead back",
        "a name that is too long",
        "it ends too early",
    ]
    assert {event.state for event in events} == {"unanswered"}


MANY = 250
OPT = b"\0" + struct.pack("!HHIH", 41, 4096, 0, 0)


def ask_for_much() -> None:
    def answer(asked: bytes) -> list[bytes]:
        if asked[1]:
            return [response(asked, record(b"\xff" * 60000, 16), 1)]
        addresses = [record(struct.pack("!I", 0x0A000000 + number)) for number in range(MANY)]
        return [response(asked, b"".join(addresses) + OPT, MANY, more=1)]

    with serve(answer):
        for number in range(2):
            ask([query(number, question(b"big.test"))], answers=1)


def test_large_responses_are_bounded_and_say_so(tmp_path: Path, scope: Scope) -> None:
    """Of 4096 bytes and less all is looked at, and 32 answers are told; of more it is said."""
    _, recording = recorded(tmp_path, scope, ask_for_much)
    many, large = recording.of("net.dns")
    assert (len(many.answers), many.answers_left_out) == (32, MANY - 32)
    assert (many.edns_bytes, many.truncated, many.malformed) == (4096, (), "")
    assert many.message_bytes == 12 + 14 + MANY * 16 + 11
    assert (large.message_bytes, large.truncated, large.malformed) == (60038, ("answers",), "")
    assert (large.answers, large.answers_left_out) == ([], 1)


# ---------------------------------------------------------------- over TCP

BIG = "--txt-record=big.test," + ",".join("x" * 250 for _ in range(4))


def dig_over_tcp() -> dict[str, Digged]:
    with dnsmasq(BIG):
        return {
            "c.test": dig("+tcp", "-q", "c.test", "-t", "A", "@127.0.0.1"),
            "no.test": dig("+tcp", "-q", "no.test", "-t", "AAAA", "@::1"),
            "big.test": dig("+noedns", "-q", "big.test", "-t", "TXT", "@127.0.0.1"),
        }


def test_what_dig_asks_over_tcp(tmp_path: Path, scope: Scope) -> None:
    """Also when it is told over UDP that the answer has no room there."""
    digged, recording = recorded(tmp_path, scope, dig_over_tcp)
    events = {(event.query, event.transport): event for event in recording.of("net.dns")}
    assert events.keys() == {
        ("c.test", "tcp"),
        ("no.test", "tcp"),
        ("big.test", "udp"),
        ("big.test", "tcp"),
    }
    assert len(recording.of("net.dns")) == len(events)
    for (name, transport), event in events.items():
        truncated = (name, transport) == ("big.test", "udp")
        assert (event.response_truncated, event.state) == (truncated, "answered")
        assert (event.queries, event.malformed, event.truncated) == (1, "", ())
        assert event.latency_ns > 0
        assert event.owner_known
        assert event.comm.startswith("isc-net")
        if not truncated:
            witness = digged[name]
            assert (event.dns_id, event.response_code) == (witness.number, witness.status)
            assert len(event.answers) == len(witness.answers)
    assert events["big.test", "tcp"].answers[0].data == " ".join([f'"{"x" * 250}"'] * 4)


THREE = [
    query(number, question(name)) for number, name in enumerate((b"a.test", b"b.test", b"c.test"))
]


def ask_in_pieces() -> None:
    """Three queries and their responses: in one packet, byte by byte, and cut in every length."""

    def answer(connection: socket.socket) -> None:
        asked = [read_framed(connection) for _ in range(9)]
        answers = b"".join(framed(response(one, ONE_A, 1)) for one in asked)
        size = len(answers) // 9
        connection.sendall(answers[: 3 * size])
        in_pieces(connection, answers[3 * size : 6 * size], *[1] * (3 * size - 1))
        in_pieces(connection, answers[6 * size :], 1, size, 2, size - 2, 1)

    messages = b"".join(map(framed, THREE))
    with over_tcp(answer) as client:
        client.sendall(messages)
        in_pieces(client, messages.replace(b"test", b"best"), *[1] * (len(messages) - 1))
        in_pieces(client, messages.replace(b"test", b"rest"), 1, 40, 25)
        for _ in range(9):
            read_framed(client)


@pytest.mark.every_kernel
def test_messages_over_tcp_however_they_are_cut(tmp_path: Path, scope: Scope) -> None:
    _, recording = recorded(tmp_path, scope, ask_in_pieces)
    events = recording.of("net.dns")
    assert Counter(map(told, events)) == {
        (f"{name}.{zone}", "A", "answered", "NOERROR"): 1
        for name in "abc"
        for zone in ("test", "best", "rest")
    }
    assert all((e.queries, e.truncated, e.malformed) == (1, (), "") for e in events)
    assert {len(event.answers) for event in events} == {1}
    assert recording.heartbeat.faults == {}


def ask_for_more_than_is_kept() -> None:
    """Responses of 4096 bytes and of 60,000; and between them one that is none."""

    def answer(connection: socket.socket) -> None:
        for size in (4096, 60000):
            asked = read_framed(connection)
            text = record(b"\xff" + b"x" * 255, 16)
            records = text * ((size - len(asked)) // len(text))
            rest = size - len(asked) - len(records)
            records += record(b"y" * (rest - 12), 99)
            connection.sendall(framed(response(asked, records, 1 + len(records) // len(text))))

    with over_tcp(answer) as client:
        for number in range(2):
            client.sendall(framed(query(number, question(b"long.test"))))
            read_framed(client)


def test_long_messages_over_tcp_are_bounded_and_say_so(tmp_path: Path, scope: Scope) -> None:
    _, recording = recorded(tmp_path, scope, ask_for_more_than_is_kept)
    whole, cut = recording.of("net.dns")
    assert (whole.message_bytes, whole.truncated, whole.malformed) == (4096, (), "")
    assert (cut.message_bytes, cut.truncated, cut.malformed) == (60000, ("answers",), "")
    assert len(cut.answers) + cut.answers_left_out == 60000 // 268 + 1


def ask_through_losses() -> int:
    """A query that TCP has to send again, and a response."""

    before = nstat("TcpRetransSegs")
    with socket.create_server(("127.0.0.1", PORT)) as listener:
        client = socket.create_connection(("127.0.0.1", PORT), seconds(5))
        client.settimeout(seconds(20))
        server, _ = listener.accept()
        deafen(server)
        client.sendall(framed(query(5, question(b"again.test"))))
        time.sleep(seconds(1))
        server.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        asked = read_framed(server)
        deafen(client)
        server.sendall(framed(response(asked, ONE_A, 1)))
        time.sleep(seconds(1))
        client.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        read_framed(client)
        client.close()
        server.close()
    return nstat("TcpRetransSegs") - before


def test_what_tcp_sends_again_counts_once(tmp_path: Path, scope: Scope) -> None:
    config = "[kernel]\ndns_timeout_seconds = 60\n"  # in a slow guest it takes longer than 5
    retransmitted, recording = recorded(tmp_path, scope, ask_through_losses, config=config)
    assert retransmitted >= 2
    (event,) = recording.of("net.dns")
    assert (event.query, event.queries, event.state) == ("again.test", 1, "answered")
    assert event.latency_ns >= 0.9 * 10**9
    assert recording.heartbeat.faults == {}


AXFR, IXFR = 252, 251


def transfer(kind: int) -> None:
    """A zone of five messages, then a response that nobody asked for, and then a query."""

    def answer(connection: socket.socket) -> None:
        asked = read_framed(connection)
        first = response(asked, ONE_A, 1)
        bare = first[:4] + struct.pack("!4H", 0, 1, 0, 0) + record(b"\1\2\3\4", name=b"\1x\0")
        connection.sendall(framed(first) + framed(first) + framed(bare) * 3)
        connection.sendall(framed(response(query(9, question(b"forged.test")), ONE_A, 1)))
        connection.sendall(framed(response(read_framed(connection), ONE_A, 1)))

    with over_tcp(answer) as client:
        client.sendall(framed(query(1, question(b"zone.test", kind))))
        for _ in range(6):
            read_framed(client)
        client.sendall(framed(query(2, question(b"after.test"))))
        read_framed(client)


@pytest.mark.parametrize(("kind", "name"), [(AXFR, "AXFR"), (IXFR, "IXFR")])
def test_a_zone_transfer_is_one_exchange(
    tmp_path: Path, scope: Scope, kind: int, name: str
) -> None:
    """And hides no response but its own."""
    _, recording = recorded(tmp_path, scope, transfer, kind)
    assert [(e.query, e.query_type, e.state) for e in recording.of("net.dns")] == [
        ("zone.test", name, "answered"),
        ("forged.test", "A", "unsolicited"),
        ("after.test", "A", "answered"),
    ]


def connect_first() -> None:
    with over_tcp(lambda server: server.sendall(framed(response(read_framed(server))))) as client:
        checkpoint()
        client.sendall(framed(query(1, question(b"before.test"))))
        read_framed(client)


def test_a_connection_from_before_the_agent_is_counted(tmp_path: Path, scope: Scope) -> None:
    """Where its messages begin nobody knows: it is not guessed."""
    with scope.start(in_own_network, connect_first) as actor:
        actor.reached()
        with Agent(tmp_path, *scope.options, events="net.dns") as agent:
            actor.proceed()
            actor.result()
            recording = agent.stop()
    assert recording.of("net.dns") == []
    assert recording.heartbeat.faults["dns_unfollowed"] == 2  # both directions


# ---------------------------------------------------------------- floods

ROOM = 8
FLOOD = 20
WAITED = 6
SMALL = f"[kernel]\ndns_timeout_seconds = {WAITED}\ndns_queries = 64\n"


def flood() -> None:
    """More queries than one user may have waiting, and then one of somebody else."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.1", PORT))
        ask([query(number, question(b"flood.test")) for number in range(FLOOD)], answers=0)
        Role("other", ask_as_other).result()


def ask_as_other() -> None:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    ask([query(1, question(b"other.test"))], answers=0)


def test_a_full_table_is_counted_and_costs_nobody_else(tmp_path: Path, scope: Scope) -> None:
    """One user has an eighth of the room; what he asks beyond that is lost, and told as such."""
    _, recording = recorded(tmp_path, scope, flood, config=SMALL, wait=ROOM + 1)
    events = recording.of("net.dns")
    names = Counter(event.query for event in events)
    assert names == {"flood.test": ROOM, "other.test": 1}
    assert all(1 <= event.latency_ns / 10**9 / WAITED < seconds(1.9) for event in events)
    heartbeat = recording.heartbeat
    counts = heartbeat.counts["net.dns"]
    assert (counts.produced - counts.filtered, counts.lost, counts.read) == (
        FLOOD + 1,
        FLOOD - ROOM,
        ROOM + 1,
    )
    assert heartbeat.faults["dns_full"] == FLOOD - ROOM
    assert sum(loss.count for loss in recording.losses) == FLOOD - ROOM


LOGINS = (4242, 4243, 4244)
VICTIM = LOGINS[0]
"""Whose share is another than NOBODY's: there are 256."""


def flood_under_logins() -> None:
    """One user, who says for each of his processes that somebody else has logged in."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.1", PORT))
        for login in LOGINS:
            Role("flooder", flood_as_logged_in, login).result()
        Role("victim", ask_as, VICTIM, b"victim.test").result()
        ask([query(1, question(b"root.test"))], answers=0)


def flood_as_logged_in(login: int) -> None:
    become(NOBODY)
    LOGINUID.write_text(str(login))
    ask([query(number, question(b"flood.test")) for number in range(ROOM)], answers=0)


def ask_as(uid: int, name: bytes) -> None:
    become(uid)
    ask([query(1, question(name))], answers=0)


@pytest.mark.skipif(not may_say_who_logged_in(), reason="a login id is set, or cannot be")
def test_nobody_chooses_his_share_by_his_login(tmp_path: Path, scope: Scope) -> None:
    """He has one, whoever he says has logged in, and takes up nobody else's."""
    _, recording = recorded(tmp_path, scope, flood_under_logins, config=SMALL, wait=ROOM + 2)
    names = Counter(event.query for event in recording.of("net.dns"))
    assert names == {"flood.test": ROOM, "victim.test": 1, "root.test": 1}
    counts = recording.heartbeat.counts["net.dns"]
    assert (counts.produced - counts.filtered, counts.lost) == (
        len(LOGINS) * ROOM + 2,
        (len(LOGINS) - 1) * ROOM,
    )


def flood_as_root_of_namespaces() -> None:
    """One user, in user namespaces of his own, in which he is root, and others."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.1", PORT))
        for depth in range(3):
            Role("flooder", flood_within, depth).result()
        ask([query(1, question(b"root.test"))], answers=0)


def flood_within(depth: int) -> None:
    become(NOBODY)
    for _ in range(depth):
        own_namespaces(0)
    ask([query(number, question(b"flood.test")) for number in range(ROOM)], answers=0)


def test_all_user_namespaces_of_one_user_have_one_share(tmp_path: Path, scope: Scope) -> None:
    _, recording = recorded(
        tmp_path, scope, flood_as_root_of_namespaces, config=SMALL, wait=ROOM + 1
    )
    names = Counter(event.query for event in recording.of("net.dns"))
    assert names == {"flood.test": ROOM, "root.test": 1}
    assert recording.heartbeat.counts["net.dns"].lost == 2 * ROOM


def flood_over_tcp() -> int:
    """Of what one user asks, TCP sends most while its server, who is somebody else, reads.

    The process that asks.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        listener.bind(("127.0.0.1", PORT))
        listener.listen()
        pid = int(Role("other", ask_much_as_other).result())
        server, _ = listener.accept()
        with server:
            server.settimeout(seconds(10))
            while server.recv(65536):
                pass
    return pid


def ask_much_as_other() -> int:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    with socket.create_connection(("127.0.0.1", PORT), seconds(5)) as client:
        for number in range(FLOOD):
            client.sendall(framed(query(number, question(b"queued.test")) + bytes(600)))
    return os.getpid()


def test_what_waits_over_tcp_is_charged_to_who_connected(tmp_path: Path, scope: Scope) -> None:
    pid, recording = recorded(tmp_path, scope, flood_over_tcp, config=SMALL, wait=ROOM)
    events = recording.of("net.dns")
    assert Counter(event.query for event in events) == {"queued.test": ROOM}
    assert {(event.owner_known, event.pid, event.comm) for event in events} == {
        (True, pid, "other")
    }
    counts = recording.heartbeat.counts["net.dns"]
    assert (counts.produced - counts.filtered, counts.lost) == (FLOOD, FLOOD - ROOM)


UNSOLICITED = 100
"""Of one user in a second."""


def answer_unasked() -> None:
    """To one user's socket more than is told, and then one to somebody else's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", PORT))
        for uid, count in ((0, 2 * UNSOLICITED), (NOBODY, 1)):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                os.fchown(client.fileno(), uid, uid)
                client.bind(("127.0.0.1", 0))
                for number in range(count):
                    forged = response(query(number, question(b"%d.test" % uid)), ONE_A, 1)
                    server.sendto(forged, client.getsockname())


def test_unsolicited_responses_to_one_user_hide_none_to_another(
    tmp_path: Path, scope: Scope
) -> None:
    _, recording = recorded(tmp_path, scope, answer_unasked)
    events = recording.of("net.dns")
    assert {event.state for event in events} == {"unsolicited"}
    names = Counter(event.query for event in events)
    assert names[f"{NOBODY}.test"] == 1
    counts = recording.heartbeat.counts["net.dns"]
    assert (counts.produced - counts.filtered, counts.lost) == (2 * UNSOLICITED + 1, 0)
    assert counts.shed == 2 * UNSOLICITED - names["0.test"] > 0


MOST = 10
SLOW = f"[kernel]\ndns_per_second = {MOST}\n"
OFTEN = 50


def ask_often() -> float:
    with serve(lambda asked: [response(asked, ONE_A, 1)]):
        begun = time.monotonic()
        for number in range(OFTEN):
            ask([query(number, question(b"often.test"))], answers=1)
        taken = time.monotonic() - begun
        time.sleep(1.1)
        ask([query(number, question(b"often.test"))], answers=1)
        return taken


def test_what_one_asks_too_often_is_shed_and_stands_in_a_weight(
    tmp_path: Path, scope: Scope
) -> None:
    taken, recording = recorded(tmp_path, scope, ask_often, config=SLOW)
    events = recording.of("net.dns")
    assert len(events) <= MOST * (int(taken) + 2) + 1
    counts = recording.heartbeat.counts["net.dns"]
    assert (counts.produced - counts.filtered, counts.lost) == (OFTEN + 1, 0)
    assert counts.shed == OFTEN + 1 - len(events) > 0
    assert sum(event.weight for event in events) == OFTEN + 1


# ---------------------------------------------------------------- filters


def ask_twice() -> None:
    with serve(lambda asked: [response(asked, ONE_A, 1)]):
        ask([query(1, question(b"mine.test"))], answers=1)
        Role("leftout", ask_left_out).result()


def ask_left_out() -> None:
    ask([query(2, question(b"leftout.test"))], answers=1)


def test_filters_judge_who_asks(tmp_path: Path, scope: Scope) -> None:
    """And what is filtered is not mistaken for a response that nobody asked for."""
    config = '[filters]\nexclude_comms = ["leftout"]\n'
    _, recording = recorded(tmp_path, scope, ask_twice, config=config)
    assert [event.query for event in recording.of("net.dns")] == ["mine.test"]
    assert recording.filtered("net.dns") >= 1
