"""Filters at an interface's traffic: where ours goes among others, and whose one is."""

from __future__ import annotations

import socket
import struct

import pytest

from streamer.kernel import traffic
from streamer.kernel.traffic import Filter, TrafficFilters, ports_in_use, priority_beside

ALL = socket.htons(3)


def there(*filters: tuple[str, int, int]) -> list[Filter]:
    return [Filter(kind, priority, protocol, 1, "") for kind, priority, protocol in filters]


@pytest.mark.parametrize(
    ("filters", "priority"),
    [
        ([], 1),
        ([("bpf", 1, ALL)], 1),  # those share one
        ([("u32", 1, ALL)], 2),
        ([("u32", 1, ALL), ("bpf", 2, socket.htons(0x0800)), ("bpf", 3, ALL)], 3),
        ([("u32", 5, ALL)], 1),
    ],
)
def test_the_first_place_that_is_free(filters: list[tuple[str, int, int]], priority: int) -> None:
    assert priority_beside(there(*filters)) == priority


def test_ports_are_those_of_rtnetlink() -> None:
    table = (
        "sk               Eth Pid        Groups   Rmem     Wmem\n"
        "0000000000000000 0   4711       00000000 0        0\n"
        "0000000000000000 4   4712       00000000 0        0\n"
    )
    assert ports_in_use(table) == {4711}


def test_a_socket_has_a_port_of_its_own_as_long_as_it_is_open() -> None:
    one, other = TrafficFilters(), TrafficFilters()
    assert one.port != other.port
    assert {one.port, other.port} <= ports_in_use()
    one.close()
    assert one.port not in ports_in_use()
    assert other.port in ports_in_use()
    other.close()


def test_what_the_kernel_refuses_is_its_error() -> None:
    filters = TrafficFilters()
    try:
        with pytest.raises(OSError, match=r"No such device|not permitted"):
            filters.attach((1 << 31) - 1, "ingress", 0)
        assert not filters.remove((1 << 31) - 1, "ingress", Filter("bpf", 1, ALL, 1, ""))
    finally:
        filters.close()


@pytest.mark.parametrize("data", [b"", bytes(19), bytes(20) + b"\x03\x00\x01\x00", bytes(21)])
def test_a_message_that_is_cut_off(data: bytes) -> None:
    """It ends before what it says, and is taken for as much as is there."""
    found = traffic._filter_of(data)
    assert found is None or found.kind == ""


def test_the_name_is_that_of_programs_alone() -> None:
    options = struct.pack("=HH8s", 12, 7, b"someone\0")
    attributes = struct.pack("=HH4s", 8, 1, b"u32\0") + struct.pack("=HH", 16, 2) + options
    found = traffic._filter_of(bytes(20) + attributes)
    assert found == Filter("u32", 0, 0, 0, "")
    attributes = struct.pack("=HH4s", 8, 1, b"bpf\0") + struct.pack("=HH", 16, 2) + options
    found = traffic._filter_of(bytes(20) + attributes)
    assert found == Filter("bpf", 0, 0, 0, "someone")
