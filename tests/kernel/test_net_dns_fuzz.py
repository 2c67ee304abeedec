"""`net.dns`, of a hundred thousand messages with mistakes: each is told, or counted as left out."""

from __future__ import annotations

import socket
import struct
import time
from collections import Counter
from typing import Any

import pytest
from msgspec.structs import astuple

from streamer.config.settings import Kernel, Rings, Settings
from streamer.events.dns import PARTS
from streamer.kernel.objects import CONTRACT
from tests.kernel.dns import PORT
from tests.kernel.dns_mutants import Account, Mutants, Stream, Told
from tests.kernel.live import Live
from tests.kernel.pace import repetitions, seconds
from tests.kernel.roles import in_own_network, netns_inode
from tests.kernel.scope import Scope

pytestmark = pytest.mark.kernel

MESSAGES = repetitions(50_000, 5_000)
"""By each transport."""
OVER_UDP, OVER_TCP = MESSAGES // 2, MESSAGES * 31 // 50
"""Exchanges: a query, and mostly a response. Of TCP some are within a message of a wrong length."""
QUERIES = 1 << 16
ROOM = QUERIES // 8
"""Of one user."""
SETTINGS = Settings(
    kernel=Kernel(dns_timeout_seconds=1, dns_per_second=1 << 20, dns_queries=QUERIES),
    rings=Rings(bulk_bytes=1 << 26),
)
MADE_AT_ONCE = 4096
FAULTS = [name for name, _, _ in CONTRACT["enum fault"]]
ADDRESSES = ("127.0.0.1", "::1")


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


# ---------------------------------------------------------------- UDP

PORTS, UDP_HEADER, DNS_HEADER = 4, 8, 12
CUT = 500


def over_udp(seed: int) -> tuple[int, Account]:
    """From a socket for each address."""
    account, mutants = Account("udp", ROOM), Mutants(seed)
    for number, address in enumerate(ADDRESSES):
        with (
            socket.socket(family_of(address), socket.SOCK_DGRAM) as server,
            socket.socket(family_of(address), socket.SOCK_DGRAM) as client,
        ):
            server.bind((address, PORT))
            client.connect((address, PORT))
            for one in (server, client):
                one.settimeout(seconds(5))
            for _ in range(OVER_UDP // len(ADDRESSES)):
                exchange(client, server, number, account, mutants)
    send_cut_headers(account, mutants)
    account.expire(set())
    return netns_inode(), account


def send_cut_headers(account: Account, mutants: Mutants) -> None:
    """Packets that end behind their ports, and before a header of DNS does."""
    whole = struct.pack("!4H", 40000, PORT, UDP_HEADER + DNS_HEADER, 0) + bytes(DNS_HEADER)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as sender:
        for _ in range(CUT):
            size = mutants.dice.randrange(PORTS, len(whole))
            sender.sendto(whole[:size], ("127.0.0.1", 0))
            account.queries += 1
            account.malformed += 1


def exchange(
    client: socket.socket, server: socket.socket, number: int, account: Account, mutants: Mutants
) -> None:
    asked = mutants.query()
    for _ in range(2 if mutants.dice.random() < 0.05 else 1):
        client.send(asked)
        account.sent(number, asked)
        got, peer = server.recvfrom(65535)
        assert got == asked
    for _ in range(mutants.dice.choice((0, *[1] * 11, 2))):
        answer = mutants.response(asked)
        server.sendto(answer, peer)
        account.received(number, answer)
        assert client.recv(65535) == answer


# ---------------------------------------------------------------- TCP

AT_ONCE, TOO_MANY = 4, 40
"""In a packet, unless it is cut; of the latter it is not looked at the last ones."""
PER_CONNECTION = 20


def over_tcp(seed: int) -> tuple[int, Account]:
    """By many connections, which the server closes, in the middle of a message or not."""
    account, mutants, unfollowed = Account("tcp", ROOM), Mutants(seed), set()
    for number in range(OVER_TCP // PER_CONNECTION):
        address = ADDRESSES[number % len(ADDRESSES)]
        with socket.create_server((address, PORT), family=family_of(address)) as listener:
            client = socket.create_connection((address, PORT), seconds(5))
            server, _ = listener.accept()
        both = Connection(number, client, server, account, mutants)
        for _ in range(PER_CONNECTION // AT_ONCE):
            both.exchange()
        if both.close():
            unfollowed.add(number)
    account.expire(unfollowed)
    return netns_inode(), account


class Connection:
    """Its two ends, in one process."""

    def __init__(
        self,
        number: int,
        client: socket.socket,
        server: socket.socket,
        account: Account,
        mutants: Mutants,
    ) -> None:
        self._number, self._account, self._mutants = number, account, mutants
        self._client, self._server = client, server
        self._sent, self._received = Stream(), Stream()
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.settimeout(seconds(5))

    def exchange(self) -> None:
        """Some queries, and their responses."""
        many = self._mutants.dice.random() < 0.01
        asked = [self._mutants.query() for _ in range(TOO_MANY if many else AT_ONCE)]
        for data in self._packets(self._client, self._server, asked):
            for message in self._sent.packet(data):
                self._account.sent(self._number, message)
        answered = [one for one in asked if self._mutants.dice.random() < 0.92]
        answers = [self._mutants.response(one) for one in answered]
        for data in self._packets(self._server, self._client, answers):
            for message in self._received.packet(data):
                self._account.received(self._number, message)

    def _packets(
        self, source: socket.socket, to: socket.socket, messages: list[bytes]
    ) -> list[bytes]:
        """Send the messages, cut anywhere; the packets that it takes.

        Each is read before the next one is sent, so that none waits, and no two become one.
        """
        data = b"".join(map(self._mutants.framed, messages))
        packets = self._mutants.cut(data) if data else []
        for packet in packets:
            source.sendall(packet)
            while packet:
                got = to.recv(len(packet))
                assert got
                assert packet.startswith(got)
                packet = packet[len(got) :]
        return packets

    def close(self) -> bool:
        """The server first, so that its end reaches the client. Whether a direction was lost."""
        with self._client:
            self._server.close()
            assert self._client.recv(1) == b""
        lost = 0
        for stream in (self._sent, self._received):
            self._account.malformed += stream.ends_in_the_middle()
            lost += stream.lost
        self._account.unfollowed += lost
        return lost > 0


# ---------------------------------------------------------------- what is told


def told(event: Any) -> Told:
    content = {part: getattr(event, part) for part in PARTS}
    answers = tuple(map(astuple, content.pop("answers")))
    return (event.transport, event.state, event.dns_id, event.queries, answers, *content.values())


def faults_of(live: Live) -> dict[str, int]:
    counts = memoryview(live.state.faults).cast("Q")[: len(FAULTS)]
    return {name.removeprefix("FAULT_"): count for name, count in zip(FAULTS, counts, strict=True)}


@pytest.mark.parametrize("fuzz", [over_udp, over_tcp])
def test_a_hundred_thousand_messages_with_mistakes(scope: Scope, fuzz: Any) -> None:
    """By both transports: what is told of each, to the last byte, or in which count it is."""
    with Live(scope, {"net.dns"}, SETTINGS) as live:
        for _ in range(QUERIES // MADE_AT_ONCE):
            live.state.run_timed()
        netns, account = scope.act(in_own_network, fuzz, 20261130)
        time.sleep(1.1)
        for _ in range(QUERIES // 1024):
            live.state.run_timed()
        live.check()
        events = [event for event in live.events if event.netns == netns]
        found = Counter(map(told, events))
        faults, counts = faults_of(live), live.counts("net.dns")
    unsolicited = Counter({one: count for one, count in found.items() if one[1] == "unsolicited"})
    assert found - unsolicited == account.told
    assert unsolicited <= account.unsolicited
    assert counts.shed == account.unsolicited.total() - unsolicited.total()
    assert counts.lost == account.lost
    expected = {
        "DNS_MALFORMED": account.malformed,
        "DNS_UNFOLLOWED": account.unfollowed,
        "DNS_FULL": account.lost,
    }
    assert {name: count for name, count in faults.items() if count} == {
        name: count for name, count in expected.items() if count
    }
    assert account.queries + account.responses >= MESSAGES
    states = Counter(str(state) for _, state, *_ in account.told.elements())
    most = min(states["answered"], states["unanswered"], account.unsolicited.total())
    assert min(most, account.malformed) > MESSAGES // 100
    assert (account.unfollowed > 0) == (states["unfollowed"] > 0) == (fuzz is over_tcp)
