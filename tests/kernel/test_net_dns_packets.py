"""`net.dns`: which response is whose, and packets of every shape that the kernel makes or takes."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import Require
from tests.kernel.dns import (
    PORT,
    ask,
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
from tests.kernel.roles import Role
from tests.kernel.scope import Scope
from tests.kernel.test_net_dns import (
    FLOOD,
    NOBODY,
    ONE_A,
    ROOM,
    SMALL,
    SOON,
    ask_as,
    recorded,
    told,
)
from tests.kernel.test_net_drop_fuzz import checksum
from tests.kernel.unprivileged import become

pytestmark = pytest.mark.kernel

# ---------------------------------------------------------------- whose response


def to_another_socket() -> tuple[int, int]:
    """Of one query: to another socket of the same process, and to the one that has asked.

    The ports of both, in that order.
    """
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        server.bind(("127.0.0.1", PORT))
        other.bind(("127.0.0.1", 0))
        for one in (server, client, other):
            one.settimeout(seconds(10))
        for _ in range(2):
            client.sendto(query(7, question(b"mine.test")), ("127.0.0.1", PORT))
            asked, peer = server.recvfrom(65535)
            time.sleep(0.2)
        for receiver in (other, client):
            server.sendto(response(asked, ONE_A, 1), receiver.getsockname())
            receiver.recvfrom(65535)
        assert peer[1] == client.getsockname()[1]
        return other.getsockname()[1], client.getsockname()[1]


def test_a_response_to_another_socket_answers_nothing(tmp_path: Path, scope: Scope) -> None:
    """Though address, number and question are right. The time is that since the first query."""
    (other, port), recording = recorded(tmp_path, scope, to_another_socket)
    unsolicited, answered = recording.of("net.dns")
    assert (unsolicited.state, unsolicited.local_port) == ("unsolicited", other)
    assert (answered.state, answered.local_port) == ("answered", port)
    assert [event.local_addr for event in (unsolicited, answered)] == ["127.0.0.1"] * 2
    assert answered.queries == 2
    assert answered.latency_ns >= 400_000_000
    assert answered.owner_known


ALIKE = b"@`[{\xc1\xe1"
"""What differs by the bit that tells small letters from large ones, and is no letter."""
LETTERS = b"\x0dabcdefghijklm\x0dnopqrstuvwxyz" + bytes([len(ALIKE)]) + ALIKE + b"\0\0\1\0\1"


def turned(asked: bytes, places: list[int]) -> bytes:
    """The question with that bit turned in some bytes."""
    return bytes(byte ^ 0x20 * (at in places) for at, byte in enumerate(asked))


def ask_in_capitals() -> None:
    """Six responses to questions that are like the one asked, and then one to it in capitals."""
    first = LETTERS.index(ALIKE)
    wrong = [[first + at] for at in range(len(ALIKE))]
    letters = [at for at, byte in enumerate(LETTERS) if byte in b"abcdefghijklmnopqrstuvwxyz"]
    assert len(letters) == 26

    def answer(asked: bytes) -> list[bytes]:
        return [
            response(asked[:12] + turned(asked[12:], places), ONE_A, 1)
            for places in (*wrong, letters)
        ]

    with serve(answer):
        ask([query(1, LETTERS)], answers=len(wrong) + 1)


def test_only_letters_are_the_same_in_capitals(tmp_path: Path, scope: Scope) -> None:
    """All of them, as servers answer whose clients mix the case (0x20)."""
    _, recording = recorded(tmp_path, scope, ask_in_capitals)
    events = recording.of("net.dns")
    assert [event.state for event in events] == ["unsolicited"] * len(ALIKE) + ["answered"]
    assert events[-1].query.startswith("ABCDEFGHIJKLM.NOPQRSTUVWXYZ.")


LONGEST = b"".join(bytes([size]) + b"n" * size for size in (63, 63, 63, 61)) + b"\0\0\1\0\1"


def ask_longest() -> None:
    """Over UDP and TCP: first a response to another question, which differs in its last letter."""

    def answer(asked: bytes) -> list[bytes]:
        other = asked[:-6] + b"x" + asked[-5:]
        return [response(other, ONE_A, 1), response(asked, ONE_A, 1)]

    def answer_over_tcp(connection: socket.socket) -> None:
        for message in answer(read_framed(connection)):
            connection.sendall(framed(message))

    with serve(answer):
        ask([query(1, LONGEST)], answers=2)
    with over_tcp(answer_over_tcp) as client:
        client.sendall(framed(query(2, LONGEST)))
        for _ in range(2):
            read_framed(client)


def test_the_longest_name_there_is(tmp_path: Path, scope: Scope) -> None:
    _, recording = recorded(tmp_path, scope, ask_longest)
    name = ".".join("n" * size for size in (63, 63, 63, 61))
    assert [(e.transport, e.query, e.state, e.malformed) for e in recording.of("net.dns")] == [
        (transport, asked, state, "")
        for transport in ("udp", "tcp")
        for asked, state in ((f"{name[:-1]}x", "unsolicited"), (name, "answered"))
    ]


REPEATED = 100
"""More than there is room for, and than one user can have waiting."""


def ask_again_and_again() -> None:
    with serve(lambda asked: [response(asked, ONE_A, 1)]):
        for number in range(REPEATED):
            ask([query(number, question(b"again.test"))], answers=1)


def test_what_is_answered_makes_room(tmp_path: Path, scope: Scope) -> None:
    _, recording = recorded(tmp_path, scope, ask_again_and_again, config=SMALL)
    events = recording.of("net.dns")
    assert Counter(map(told, events)) == {("again.test", "A", "answered", "NOERROR"): REPEATED}
    assert recording.heartbeat.faults == {}
    counts = recording.heartbeat.counts["net.dns"]
    assert (counts.produced - counts.filtered, counts.lost) == (REPEATED, 0)


# ---------------------------------------------------------------- where servers are

PORTS = (53, 5301, 5302, 5303)


def ask_everywhere() -> None:
    """At each port that is named, and at one that is not."""
    for port in (*PORTS, 5304):
        with serve(lambda asked: [response(asked, ONE_A, 1)], port=port):
            ask([query(port, question(b"port.test"))], answers=1, port=port)


def test_every_port_that_is_named(tmp_path: Path, scope: Scope) -> None:
    config = f"[kernel]\ndns_ports = {list(PORTS)}\n"
    _, recording = recorded(tmp_path, scope, ask_everywhere, config=config)
    events = recording.of("net.dns")
    assert [(event.remote_port, event.dns_id) for event in events] == [(p, p) for p in PORTS]
    assert {event.state for event in events} == {"answered"}


def ask_by_a_mapped_address() -> None:
    with (
        serve(lambda asked: [response(asked, ONE_A, 1)]),
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(seconds(5))
        client.connect(("::ffff:127.0.0.1", PORT))
        client.send(query(1, question(b"mapped.test")))
        client.recv(65535)


def test_ipv4_from_a_socket_of_ipv6(tmp_path: Path, scope: Scope) -> None:
    _, recording = recorded(tmp_path, scope, ask_by_a_mapped_address)
    (event,) = recording.of("net.dns")
    assert told(event) == ("mapped.test", "A", "answered", "NOERROR")
    assert (event.ip_version, event.local_addr) == (4, "127.0.0.1")
    assert (event.remote_addr, event.remote_port) == ("127.0.0.1", PORT)


ELSEWHERE = 5300


def can_translate() -> bool:
    """Whether this kernel translates addresses; the rules that do are left."""
    rules = [
        f"-A OUTPUT -d 127.0.0.5 -p {transport} --dport {PORT} -j DNAT"
        f" --to-destination 127.0.0.1:{ELSEWHERE}"
        for transport in ("udp", "tcp")
    ]
    commands = [["iptables", "-t", "nat", *rule.split()] for rule in rules]
    return all(subprocess.run(command, capture_output=True).returncode == 0 for command in commands)


def ask_translated() -> bool:
    """As in a container of Docker's, whose server is at an address that is none."""
    if not can_translate():
        return False
    with serve(lambda asked: [response(asked, ONE_A, 1)], port=ELSEWHERE):
        ask([query(1, question(b"udp.test"))], answers=1, address="127.0.0.5")
    with socket.create_server(("127.0.0.1", ELSEWHERE)) as listener:
        client = socket.create_connection(("127.0.0.5", PORT), seconds(5))
        server, _ = listener.accept()
        with client, server:
            client.sendall(framed(query(2, question(b"tcp.test"))))
            server.sendall(framed(response(read_framed(server), ONE_A, 1)))
            read_framed(client)
    return True


def test_addresses_that_are_translated(
    require: Require, require_kernel: Require, tmp_path: Path, scope: Scope
) -> None:
    """It is told whom the process asked, and that it was answered."""
    require(shutil.which("iptables"), "iptables is not installed")
    asked, recording = recorded(tmp_path, scope, ask_translated)
    require_kernel(asked, "this kernel does not translate addresses")
    events = recording.of("net.dns")
    assert [(event.query, event.transport, event.state) for event in events] == [
        ("udp.test", "udp", "answered"),
        ("tcp.test", "tcp", "answered"),
    ]
    assert {(e.remote_addr, e.remote_port) for e in events} == {("127.0.0.5", PORT)}


# ---------------------------------------------------------------- what a timer sends

FIRST_SYN = ["OUTPUT", "-p", "tcp", "--dport", str(PORT), "--syn", "-j", "DROP"]


def connect_by_a_timer() -> bool:
    """One user's connection, of which a rule of the network's drops the first SYN."""
    added = subprocess.run(["iptables", "-A", *FIRST_SYN], capture_output=True)
    if added.returncode:
        return False
    with (
        socket.create_server(("127.0.0.1", PORT)),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf,
    ):
        deaf.bind(("127.0.0.1", PORT))
        late = Role("late", flood_late)
        wait_for_syn_sent()
        subprocess.run(["iptables", "-D", *FIRST_SYN], check=True)
        late.result()
        Role("user", ask_as, NOBODY, b"user.test").result()
        ask([query(1, question(b"root.test"))], answers=0)
    return True


def flood_late() -> None:
    become(NOBODY)
    with socket.create_connection(("127.0.0.1", PORT), seconds(20)) as client:
        for number in range(FLOOD):
            client.sendall(framed(query(number, question(b"late.test"))))


def wait_for_syn_sent() -> None:
    deadline = time.monotonic() + seconds(10)
    while " 02 " not in Path("/proc/thread-self/net/tcp").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_timer_opens_is_charged_to_nobody_it_interrupts(
    require: Require, require_kernel: Require, tmp_path: Path, scope: Scope
) -> None:
    """Nor to its user, for it is not known then who that is: such connections have one share."""
    require(shutil.which("iptables"), "iptables is not installed")
    opened, recording = recorded(tmp_path, scope, connect_by_a_timer, config=SMALL, wait=ROOM + 2)
    require_kernel(opened, "this kernel has no rules for packets")
    names = Counter(event.query for event in recording.of("net.dns"))
    assert names == {"late.test": ROOM, "user.test": 1, "root.test": 1}
    assert recording.heartbeat.counts["net.dns"].lost == FLOOD - ROOM


# ---------------------------------------------------------------- headers

IPV6_HOPOPTS, IPV6_DSTOPTS = 54, 59
PADDING = b"\1\4" + bytes(4)
"""PadN: an option of six bytes that means nothing (RFC 8200)."""
UNKNOWN = b"\x1e\x0e" + bytes(14)
"""One of 16 bytes, for experiments (RFC 4727): who does not know it goes on behind it."""


def ask_with_options() -> None:
    """IPv4 with four bytes of options; IPv6 with two extensions, of 8 bytes and of 24."""
    options = [
        (socket.AF_INET, "127.0.0.1", socket.IPPROTO_IP, socket.IP_OPTIONS, b"\1\1\1\1"),
        (socket.AF_INET6, "::1", socket.IPPROTO_IPV6, IPV6_HOPOPTS, b"\0\0" + PADDING),
        (
            *(socket.AF_INET6, "::1", socket.IPPROTO_IPV6, IPV6_DSTOPTS),
            b"\0\2" + PADDING + UNKNOWN,
        ),
    ]
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with (
            serve(lambda asked: [response(asked, ONE_A, 1)], address),
            socket.socket(family, socket.SOCK_DGRAM) as client,
        ):
            for of, _, level, option, value in options:
                if of == family:
                    client.setsockopt(level, option, value)
            client.settimeout(seconds(5))
            client.connect((address, PORT))
            client.send(query(1, question(b"options.test")))
            client.recv(65535)


def test_headers_with_options(tmp_path: Path, scope: Scope) -> None:
    _, recording = recorded(tmp_path, scope, ask_with_options)
    events = recording.of("net.dns")
    assert [(event.remote_addr, *told(event)) for event in events] == [
        (address, "options.test", "A", "answered", "NOERROR") for address in ("127.0.0.1", "::1")
    ]
    assert all(event.message_bytes == 12 + len(question(b"options.test")) + 16 for event in events)


# ---------------------------------------------------------------- TCP

MSG_FASTOPEN, TCP_FASTOPEN, TCPI_OPT_SYN_DATA = 0x20000000, 23, 32
WITHOUT_COOKIES = 0x207  # net.ipv4.tcp_fastopen: both ends, with data, and none asks for a cookie


def ask_at_once() -> int:
    """With the SYN (TCP Fast Open); what the kernel says that it did."""
    Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(WITHOUT_COOKIES))
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client,
    ):
        listener.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, 5)
        listener.bind(("127.0.0.1", PORT))
        listener.listen()
        client.settimeout(seconds(5))
        client.sendto(framed(query(1, question(b"fast.test"))), MSG_FASTOPEN, ("127.0.0.1", PORT))
        server, _ = listener.accept()
        with server:
            server.sendall(framed(response(read_framed(server), ONE_A, 1)))
            read_framed(client)
        return int(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5])


def test_a_query_that_comes_with_the_syn(tmp_path: Path, scope: Scope) -> None:
    options, recording = recorded(tmp_path, scope, ask_at_once)
    assert options & TCPI_OPT_SYN_DATA
    (event,) = recording.of("net.dns")
    assert told(event) == ("fast.test", "A", "answered", "NOERROR")
    assert (event.transport, event.queries, event.owner_known) == ("tcp", 1, True)
    assert recording.heartbeat.faults == {}


IP_MINTTL = 21
NEAR_TTL, FAR_TTL = 255, 64


def ask_with_a_hole() -> None:
    """Of the first response the middle is lost, and comes again behind the end. Then another.

    The client takes no packets that have come as far as that one says it has: so the kernel
    drops it before anybody sees it.
    """
    lost_for_long = "local 127.0.0.0/8 dev lo proto kernel scope host src 127.0.0.1 rto_min 30s"
    subprocess.run(["ip", "route", "replace", "table", "local", *lost_for_long.split()], check=True)

    def answer(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, NEAR_TTL)
        asked = read_framed(connection)
        records = b"".join(record(bytes([192, 0, 2, number])) for number in range(10))
        data = framed(response(asked, records, 10))
        in_pieces(connection, data[:100])
        # Two records are missing: what is before and behind would fit together.
        for part, ttl in ((data[100:132], FAR_TTL), (data[132:], NEAR_TTL)):
            connection.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            connection.sendall(part)
        connection.sendall(framed(response(read_framed(connection), ONE_A, 1)))

    with over_tcp(answer) as client:
        client.settimeout(seconds(20))
        client.setsockopt(socket.IPPROTO_IP, IP_MINTTL, NEAR_TTL - 1)
        for number, name in enumerate((b"hole.test", b"whole.test")):
            client.sendall(framed(query(number, question(name))))
            read_framed(client)


def test_what_is_missing_of_a_response_over_tcp(tmp_path: Path, scope: Scope) -> None:
    """It is told as cut, and where the next one begins is known all the same."""
    _, recording = recorded(tmp_path, scope, ask_with_a_hole)
    hole, whole = recording.of("net.dns")
    assert told(hole) == ("hole.test", "A", "answered", "NOERROR")
    assert (hole.truncated, hole.malformed) == (("answers",), "")
    assert hole.message_bytes == 12 + len(question(b"hole.test")) + 10 * 16
    assert [answer.data for answer in hole.answers] == [f"192.0.2.{at}" for at in range(4)]
    assert hole.answers_left_out == 6
    assert told(whole) == ("whole.test", "A", "answered", "NOERROR")
    assert (whole.truncated, len(whole.answers)) == ((), 1)
    assert recording.heartbeat.faults == {}


MESSAGES = 16
"""That are looked at of one packet."""


def answer_behind_others(names: list[tuple[bytes, int]]) -> None:
    """The response comes in one packet with so many messages that are none."""

    def answer(connection: socket.socket) -> None:
        for _, count in names:
            asked = read_framed(connection)
            noise = framed(query(99, question(b"noise.test"))) * count
            connection.sendall(noise + framed(response(asked, ONE_A, 1)))

    with over_tcp(answer) as client:
        for number, (name, count) in enumerate(names):
            client.sendall(framed(query(number, question(name))))
            for _ in range(count + 1):
                read_framed(client)


def ask_what_is_not_followed() -> None:
    answer_behind_others([(b"last.test", MESSAGES - 1), (b"lost.test", MESSAGES)])
    with over_tcp(lambda connection: None) as client:
        client.sendall(framed(query(1, question(b"mute.test"))))


def test_a_connection_that_cannot_be_followed_says_so(tmp_path: Path, scope: Scope) -> None:
    """Its query is not said to be unanswered, as one is whose connection was followed."""
    _, recording = recorded(tmp_path, scope, ask_what_is_not_followed, config=SOON, wait=3)
    events = recording.of("net.dns")
    assert {event.query: event.state for event in events} == {
        "last.test": "answered",
        "lost.test": "unfollowed",
        "mute.test": "unanswered",
    }
    assert len(events) == 3
    none = 2 * MESSAGES - 1  # queries, where responses are due
    assert recording.heartbeat.faults == {"dns_unfollowed": 1, "dns_malformed": none}


TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
REPAIR, REPAIRED, SEND_QUEUE = 1, -1, 2
FIN, RST = 1, 4
BEHIND = (-1, -8, -(1 << 20), -(1 << 31) + 64)
"""Of the number that is expected."""


def next_number(connection: socket.socket) -> int:
    """That of the byte which the connection sends next."""
    connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR)
    connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)
    number = connection.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ)
    connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIRED)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # which that took away
    return number


def forge(connection: socket.socket, flags: int, number: int) -> None:
    """Send the other end what looks as if it came from here."""
    peer = connection.getpeername()
    ports, words = (PORT, peer[1]), 5
    head = struct.pack("!HHIIBBHHH", *ports, number & 0xFFFFFFFF, 0, words << 4, flags, 0, 0, 0)
    addresses = socket.inet_aton("127.0.0.1") * 2
    pseudo = addresses + struct.pack("!HH", socket.IPPROTO_TCP, len(head))
    head = head[:16] + struct.pack("!H", checksum(pseudo + head)) + head[18:]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as sender:
        sender.sendto(head, (peer[0], 0))


def answer_with(forged: list[tuple[int, int]], name: bytes) -> None:
    """In the middle of each of two responses come such packets: flags, distance from the number."""

    def answer(connection: socket.socket) -> None:
        for _ in range(2):
            data = framed(response(read_framed(connection), ONE_A, 1))
            for flags, distance in forged:
                in_pieces(connection, data[:7])
                data = data[7:]
                forge(connection, flags, next_number(connection) + distance)
            in_pieces(connection, data)

    with over_tcp(answer) as client:
        for number in range(2):
            client.sendall(framed(query(number, question(name))))
            read_framed(client)


def end_in_the_middle() -> None:
    """By packets none of which TCP takes: of other numbers, and without an acknowledgement."""
    answer_with([(flag, behind) for behind in BEHIND[:2] for flag in (FIN, RST)], b"old.test")
    answer_with([(flag, behind) for behind in BEHIND[2:] for flag in (FIN, RST)], b"older.test")
    answer_with([(FIN, 1), (RST, 1 << 30)], b"ahead.test")
    answer_with([(FIN, 0)], b"end.test")


IN_TIME = f"[kernel]\ndns_timeout_seconds = {round(seconds(3))}\n"


def test_an_end_that_tcp_does_not_take(tmp_path: Path, scope: Scope) -> None:
    """One of another number ends nothing; behind one of the right number nothing is guessed."""
    _, recording = recorded(tmp_path, scope, end_in_the_middle, config=IN_TIME, wait=8)
    assert Counter((event.query, event.state) for event in recording.of("net.dns")) == {
        ("old.test", "answered"): 2,
        ("older.test", "answered"): 2,
        ("ahead.test", "answered"): 2,
        ("end.test", "unfollowed"): 2,
    }
    assert recording.heartbeat.faults == {"dns_unfollowed": 1, "dns_malformed": 1}


# ---------------------------------------------------------------- the address of the record


def ask_from_a_port() -> int:
    """Over TCP. The client's port."""
    with over_tcp(lambda one: one.sendall(framed(response(read_framed(one), ONE_A, 1)))) as client:
        client.sendall(framed(query(1, question(b"port.test"))))
        read_framed(client)
        return int(client.getsockname()[1])


def test_the_local_port_over_tcp(tmp_path: Path, scope: Scope) -> None:
    port, recording = recorded(tmp_path, scope, ask_from_a_port)
    (event,) = recording.of("net.dns")
    assert (event.local_addr, event.local_port, event.state) == ("127.0.0.1", port, "answered")
