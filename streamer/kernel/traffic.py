"""Programs at an interface's traffic by clsact, where the kernel has no tcx (before 6.6).

A filter is made and removed by rtnetlink: the messages are those of linux/rtnetlink.h and
linux/pkt_cls.h. Others have filters there, too, which are left alone. Ours has a name, and a
handle which is the port of our netlink socket: as long as a socket in this network namespace has
that port, the filter has an owner; one whose owner has gone (he was killed) is removed by the next.

Filters need the qdisc clsact. Where we have made it, the name of our filters says so: whichever
agent is the last one there removes it, unless others have filters in it by then.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

NAME = "streamer"
"""Begins the name of every filter of ours."""
_IN_OURS = "-in-ours"
"""Ends it where the qdisc is ours, too."""

_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_GETQDISC = 36, 37, 38
_RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 44, 45, 46
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _EXCL, _DUMP, _CREATE = 0x1, 0x4, 0x200, 0x300, 0x400
_TCA_KIND, _TCA_OPTIONS = 1, 2
_BPF_FD, _BPF_NAME, _BPF_FLAGS = 6, 7, 8
_DIRECT_ACTION = 1
_CLSACT = 0xFFFFFFF1
_PARENTS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_CLSACT_HANDLE = 0xFFFF0000
_ALL_PROTOCOLS = socket.htons(3)  # ETH_P_ALL
_HEADER = struct.Struct("=IHHII")
_TRAFFIC = struct.Struct("=BxxxiIII")  # struct tcmsg
_ATTRIBUTE = struct.Struct("=HH")
# Between the numbers of processes, which the kernel gives by itself, and those that it makes up.
_PORTS = range(1 << 24, 1 << 30)
_MOST_PRIORITY = 0xFFFF
_ANSWER_BYTES = 1 << 16
_ATTEMPTS = 8
_SECONDS = 10.0


class Filter(NamedTuple):
    """A filter that is there. `protocol` is in network order."""

    kind: str
    priority: int
    protocol: int
    handle: int
    name: str


class TrafficFilters:
    """Makes filters, over one socket, which has to be opened before the helper confines itself."""

    def __init__(self) -> None:
        """Raises OSError: there is no such socket to be had."""
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._socket.settimeout(_SECONDS)
        self._number = 0
        self._made: set[int] = set()  # interfaces at which clsact is ours
        self.port = self._bind()

    def _bind(self) -> int:
        for _ in range(_ATTEMPTS):
            port = _PORTS[int.from_bytes(os.urandom(4), "little") % len(_PORTS)]
            with suppress(OSError):
                self._socket.bind((port, 0))
                return port
        self._socket.bind((0, 0))
        return int(self._socket.getsockname()[0])

    def close(self) -> None:
        """Filters that are left have no owner from now on."""
        self._socket.close()

    def attach(self, index: int, direction: str, program: int) -> FilterLink:
        """Attach the program behind a descriptor; `direction` is ingress or egress.

        Raises:
            OSError: the kernel refused.
        """
        self._ensure_clsact(index)
        try:
            return self._attach(index, direction, program)
        except OSError:
            self._give_back_clsact(index)
            raise

    def _attach(self, index: int, direction: str, program: int) -> FilterLink:
        there = self._without_stale(index, direction)
        name = f"{NAME}-{direction}" + _IN_OURS * (index in self._made)
        one = Filter("bpf", priority_beside(there), _ALL_PROTOCOLS, self.port, name)
        options = _attribute(_BPF_FD, struct.pack("=I", program))
        options += _attribute(_BPF_NAME, name.encode() + b"\0")
        options += _attribute(_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
        data = _attribute(_TCA_KIND, b"bpf\0") + _attribute(_TCA_OPTIONS, options)
        self._ask(_RTM_NEWTFILTER, _CREATE | _EXCL, _place(index, direction, one), data)
        return FilterLink(self, index, direction, one)

    def filters(self, index: int, direction: str) -> list[Filter]:
        """All that are there, of all owners."""
        message = _TRAFFIC.pack(socket.AF_UNSPEC, index, 0, _PARENTS[direction], 0)
        parts = self._ask(_RTM_GETTFILTER, _DUMP, message, b"")
        return [found for part in parts if (found := _filter_of(part))]

    def remove(self, index: int, direction: str, one: Filter) -> bool:
        """Remove a filter. Whether it was there: it goes with its interface, or by others' hands.

        Raises:
            OSError: the kernel refused; it is still there.
        """
        data = _attribute(_TCA_KIND, b"bpf\0")
        try:
            self._ask(_RTM_DELTFILTER, 0, _place(index, direction, one), data)
        except OSError:  # which error says that it has gone depends on what went with it
            if any(_is_same(one, other) for other in self.filters(index, direction)):
                raise
            return False
        return True

    def detach(self, index: int, direction: str, one: Filter) -> None:
        """Remove a filter of ours, and clsact if that was for our filters alone.

        Raises:
            OSError: the kernel refused; what it was about is still there.
        """
        if self.remove(index, direction, one):
            self._give_back_clsact(index)
        else:  # by somebody who may have made a clsact of his own since
            self._made.discard(index)

    def _ensure_clsact(self, index: int) -> None:
        try:
            self._ask_of_clsact(_RTM_NEWQDISC, _CREATE | _EXCL, index)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            if any(one.name.endswith(_IN_OURS) for one in self._own_filters(index)):
                self._made.add(index)  # of an agent that is there, or was killed
        else:
            self._made.add(index)

    def _own_filters(self, index: int) -> list[Filter]:
        everywhere = (one for at in _PARENTS for one in self.filters(index, at))
        return [one for one in everywhere if one.name.startswith(f"{NAME}-")]

    def _give_back_clsact(self, index: int) -> None:
        """Remove clsact if it is ours, and nobody has a filter in it."""
        if index not in self._made or any(self.filters(index, at) for at in _PARENTS):
            return
        self._made.discard(index)
        try:
            self._ask_of_clsact(_RTM_DELQDISC, 0, index)
        except OSError:
            if self._has_clsact(index):
                raise

    def _has_clsact(self, index: int) -> bool:
        try:
            self._ask_of_clsact(_RTM_GETQDISC, 0, index)
        except OSError as error:  # neither the interface, nor any such qdisc, nor this one
            if error.errno not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
                raise
            return False
        return True

    def _ask_of_clsact(self, kind: int, flags: int, index: int) -> None:
        message = _TRAFFIC.pack(socket.AF_UNSPEC, index, _CLSACT_HANDLE, _CLSACT, 0)
        self._ask(kind, flags, message, _attribute(_TCA_KIND, b"clsact\0"))

    def _without_stale(self, index: int, direction: str) -> list[Filter]:
        there = self.filters(index, direction)
        living = ports_in_use()
        ours = (f"{NAME}-{direction}", f"{NAME}-{direction}{_IN_OURS}")
        left = []
        for one in there:
            if one.name in ours and one.handle not in living:
                self.remove(index, direction, one)  # unless another agent that begins has
            else:
                left.append(one)
        return left

    def _ask(self, kind: int, flags: int, message: bytes, data: bytes) -> list[bytes]:
        """Send a request, and wait for the end of the answer: its messages."""
        self._number += 1
        size = _HEADER.size + len(message) + len(data)
        header = _HEADER.pack(size, kind, _REQUEST | _ACK | flags, self._number, 0)
        self._socket.sendmsg([header + message + data])
        found: list[bytes] = []
        while True:
            answer, _, _, _ = self._socket.recvmsg(_ANSWER_BYTES)
            for what, number, body in _messages(answer):
                if number != self._number:
                    continue  # late, of a request that was given up
                if what == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", body)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    return found
                if what == _NLMSG_DONE:
                    return found
                found.append(body)


class FilterLink:
    """A filter of ours. It stays, even if the process ends, until `destroy`."""

    def __init__(self, filters: TrafficFilters, index: int, direction: str, one: Filter) -> None:
        """Where it is, on the interface of that index."""
        self._filters: TrafficFilters | None = filters
        self._index = index
        self._direction = direction
        self._filter = one

    def destroy(self) -> None:
        """Remove it. Harmless when it has gone, as with its interface.

        Raises:
            OSError: the kernel refused; it is still there.
        """
        filters, self._filters = self._filters, None
        if filters is None:
            return
        try:
            filters.detach(self._index, self._direction, self._filter)
        except OSError as error:
            what = f"clsact at {self._direction} of interface {self._index} cannot be removed"
            raise OSError(error.errno, f"{what}: {error.strerror or error}") from error


def _place(index: int, direction: str, one: Filter) -> bytes:
    """The beginning of a request that is about a filter."""
    info = one.priority << 16 | one.protocol
    return _TRAFFIC.pack(socket.AF_UNSPEC, index, one.handle, _PARENTS[direction], info)


def _is_same(one: Filter, other: Filter) -> bool:
    return one._replace(name=other.name) == other


def priority_beside(there: list[Filter]) -> int:
    """The first one that can be ours: others' terminal verdicts end what comes behind them.

    Programs for all protocols share one, the newest first; anything else has it for itself.
    """
    taken = {one.priority for one in there if one.kind != "bpf" or one.protocol != _ALL_PROTOCOLS}
    return next(number for number in range(1, _MOST_PRIORITY) if number not in taken)


def ports_in_use(table: str | None = None) -> set[int]:
    """The ports of rtnetlink sockets in this network namespace; `table` is /proc/net/netlink."""
    if table is None:
        with open("/proc/self/net/netlink") as file:
            table = file.read()
    rows = (line.split() for line in table.splitlines()[1:])
    return {int(row[2]) for row in rows if int(row[1]) == socket.NETLINK_ROUTE}


def _attribute(kind: int, data: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(size, kind) + data + bytes(-size % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if size < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, data[at + _ATTRIBUTE.size : at + size]
        at += size + -size % 4


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Kind, number and content of each message."""
    at = 0
    while at + _HEADER.size <= len(data):
        size, kind, _, number, _ = _HEADER.unpack_from(data, at)
        if size < _HEADER.size:
            return
        yield kind, number, data[at + _HEADER.size : at + size]
        at += size + -size % 4


def _filter_of(body: bytes) -> Filter | None:
    """The filter that a message of a dump tells of; None: of a priority only, without one."""
    if len(body) < _TRAFFIC.size:
        return None
    _, _, handle, _, info = _TRAFFIC.unpack_from(body)
    found = dict(_attributes(body[_TRAFFIC.size :]))
    kind = found.get(_TCA_KIND, b"").rstrip(b"\0").decode(errors="replace")
    options = dict(_attributes(found.get(_TCA_OPTIONS, b"")))
    name = options.get(_BPF_NAME, b"") if kind == "bpf" else b""
    text = name.rstrip(b"\0").decode(errors="replace")
    return Filter(kind, info >> 16, info & 0xFFFF, handle, text)
