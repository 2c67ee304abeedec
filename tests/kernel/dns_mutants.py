"""DNS messages with mistakes, and what is to be told of each, by the standards."""

from __future__ import annotations

import itertools
import random
import struct
from collections import Counter
from dataclasses import dataclass, field

from msgspec.structs import astuple

from streamer.events.dns import parse
from tests.kernel.dns import query, question, record, response

HEADER, RESPONSE = 12, 0x80
MOST_LABEL, MOST_NAME = 63, 255
KEPT_OF_QUERY, KEPT_OF_RESPONSE = 272, 4096
KEPT_OVER_TCP = 512
"""Bytes of a query that comes in packets."""
MOST_PIECES = 32
"""Of a packet: a message is two, its length and the rest."""
TRANSFERS = (251, 252)  # IXFR, AXFR
KINDS = (1, 2, 5, 6, 12, 15, 16, 28, 33, 65)

Told = tuple[object, ...]
"""Of an event: transport, state, number, how often it was sent, and all that is in the message."""


def question_of(message: bytes) -> bytes:
    """The first question: name, type and class (RFC 1035, 4.1.2). Empty where there is none."""
    at = HEADER
    while at < len(message) and (length := message[at]):
        if length > MOST_LABEL:
            return b""
        at += 1 + length
    name_and_more = message[HEADER : at + 5]
    whole = at < len(message) and len(name_and_more) == at + 5 - HEADER
    return name_and_more if whole and len(name_and_more) <= MOST_NAME + 4 else b""


def is_message(message: bytes, flag: int) -> bool:
    """Whether it is a query (0) or a response (RESPONSE)."""
    return len(message) >= HEADER and message[2] & RESPONSE == flag


def content_of(beginning: bytes, message: bytes = b"") -> Told:
    """What the parser makes of a query's beginning and a response; its own tests are elsewhere."""
    data = struct.pack("<H", len(beginning)) + beginning + message[:KEPT_OF_RESPONSE]
    answers, *rest = parse(data, cut=len(message) > KEPT_OF_RESPONSE)
    return (tuple(map(astuple, answers)), *rest)


@dataclass
class Waiting:
    """A query without a response."""

    beginning: bytes
    times: int = 1


@dataclass
class Account:
    """What is to come of the messages that one user's sockets sent and received."""

    transport: str
    room: int
    queries: int = 0
    responses: int = 0
    told: Counter[Told] = field(default_factory=Counter)
    unsolicited: Counter[Told] = field(default_factory=Counter)
    malformed: int = 0
    lost: int = 0
    unfollowed: int = 0
    """Directions of connections."""
    transferred: int = 0
    """Messages of a zone behind the first, which are in no event."""
    _waiting: dict[tuple[int, int, bytes], Waiting] = field(default_factory=dict)
    _transfers: dict[int, int] = field(default_factory=dict)

    def sent(self, socket: int, message: bytes) -> None:
        """A message went to the server."""
        self.queries += 1
        if not is_message(message, 0):
            self.malformed += 1
            return
        number, asked = int.from_bytes(message[:2], "big"), question_of(message[:KEPT_OVER_TCP])
        if self.transport == "tcp" and int.from_bytes(asked[-4:-2], "big") in TRANSFERS:
            self._transfers[socket] = number
        key = socket, number, asked.lower()
        if key in self._waiting:
            self._waiting[key].times += 1
        elif len(self._waiting) == self.room:
            self.lost += 1
        else:
            length = HEADER + len(asked) if asked else KEPT_OF_QUERY
            self._waiting[key] = Waiting(message[:length])

    def received(self, socket: int, message: bytes) -> None:
        """A message came from it."""
        self.responses += 1
        if not is_message(message, RESPONSE):
            self.malformed += 1
            return
        number = int.from_bytes(message[:2], "big")
        asked = question_of(message[:KEPT_OF_RESPONSE])
        waiting = self._waiting.pop((socket, number, asked.lower()), None)
        if waiting is None and self._transfers.get(socket) == number:
            self.transferred += 1
        elif waiting is None:
            content = content_of(b"", message)
            self.unsolicited[self.transport, "unsolicited", number, 0, *content] += 1
        else:
            content = content_of(waiting.beginning, message)
            self.told[self.transport, "answered", number, waiting.times, *content] += 1

    def expire(self, unfollowed: set[int]) -> None:
        """What waits is told: as `unfollowed` of those sockets."""
        for (socket, number, _), waiting in self._waiting.items():
            state = "unfollowed" if socket in unfollowed else "unanswered"
            content = content_of(waiting.beginning)
            self.told[self.transport, state, number, waiting.times, *content] += 1
        self._waiting.clear()


class Stream:
    """One direction of a connection: messages, each behind its length (RFC 1035, 4.2.2)."""

    def __init__(self) -> None:
        self.lost = False
        """Whether a packet held more than is looked at."""
        self._bytes = b""
        self._has_length = False

    def packet(self, data: bytes) -> list[bytes]:
        """The messages that it completes; empty ones for lengths that are 0."""
        if self.lost:
            return []
        found: list[bytes] = []
        for _ in range(MOST_PIECES):
            if not data:
                return found
            size = int.from_bytes(self._bytes[:2], "big") + 2 if self._has_length else 2
            taken = data[: size - len(self._bytes)]
            self._bytes, data = self._bytes + taken, data[len(taken) :]
            if len(self._bytes) < size:
                continue
            if self._has_length or self._bytes == b"\0\0":
                found.append(self._bytes[2:])
                self._bytes, self._has_length = b"", False
            else:
                self._has_length = True
        self.lost = bool(data)
        return found

    def ends_in_the_middle(self) -> bool:
        """Whether it would, now."""
        return not self.lost and bool(self._bytes)


class Mutants:
    """Messages, from a seed."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def query(self) -> bytes:
        """One of any kind, with mistakes more often than not."""
        labels = [
            self.dice.randbytes(self.dice.choice((1, 3, 7, 20, 63)))
            for _ in range(self.dice.choice((0, 1, 2, 3, 4, 5)))
        ]
        name = b".".join(label.replace(b".", b"-") for label in labels)
        number = self.dice.randrange(1 << 16)
        return self._mutated(query(number, question(name, self.dice.choice(KINDS))))

    def response(self, asked: bytes) -> bytes:
        """One to a query, whose number and question are mostly as they were."""
        if len(asked) < HEADER:
            return self.dice.randbytes(self.dice.randrange(40))
        records = [self._record() for _ in range(self.dice.choice((0, 1, 1, 2, 3, 40)))]
        whole = response(asked, b"".join(records), len(records))
        return self._mutated(whole, min(len(asked), len(whole)))

    def framed(self, message: bytes) -> bytes:
        """As it goes over TCP, with a length that is mostly right."""
        length = len(message)
        if self.dice.random() < 0.02:
            length = self.dice.choice((0, 1, 11, length + 1, max(length - 1, 0), 700))
        return struct.pack("!H", length) + message

    def cut(self, data: bytes) -> list[bytes]:
        """In one to four packets."""
        places = {self.dice.randrange(1, len(data)) for _ in range(self.dice.randrange(4))}
        ends = [0, *sorted(places), len(data)]
        return [data[one:other] for one, other in itertools.pairwise(ends)]

    def _record(self) -> bytes:
        name = self.dice.choice((b"\xc0\x0c", b"\xc0\xff", b"\0", b"\x3fx\0", b"\xc0\x1a"))
        size = self.dice.choice((0, 1, 4, 4, 16, 30, 200))
        return record(self.dice.randbytes(size), self.dice.choice((*KINDS, 41)), name)

    def _mutated(self, message: bytes, spare: int = 0) -> bytes:
        """Bytes changed, cut off, or behind it; seldom one of the first `spare`."""
        first = spare if self.dice.random() < 0.8 else 0
        what = self.dice.randrange(6)
        if what == 0 and first < len(message):
            return message[: self.dice.randrange(first, len(message))]
        if what == 1:
            return message + self.dice.randbytes(self.dice.choice((1, 2, 50, 5000)))
        if what == 2 and not first:
            return self.dice.randbytes(self.dice.randrange(600))
        if what < 5 and first < len(message):
            changed = bytearray(message)
            for _ in range(self.dice.randrange(1, 5)):
                changed[self.dice.randrange(first, len(message))] = self.dice.randrange(256)
            return bytes(changed)
        return message
