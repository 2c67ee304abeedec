"""How far a kind is observed, given what became of the programs."""

from __future__ import annotations

from collections.abc import Callable

from streamer.kernel.objects import SENSORS
from streamer.kernel.state import KindStatus, ProgramStatus, coverage, sensors_of
from streamer.kernel.tags import ProgramInfo

RINGS = {"critical": 1 << 20, "bulk": 1 << 20}


def opens(attached: Callable[[ProgramInfo], bool]) -> KindStatus:
    """The coverage of `file.open` if only those programs are attached."""
    statuses = [
        ProgramStatus(
            name=one.name,
            sensor="file",
            hook=one.hook,
            way="",
            kinds=one.kinds,
            status="attached" if attached(one) else "failed",
            reason="" if attached(one) else f"no {one.name}",
        )
        for one in SENSORS["file"].programs
    ]
    return coverage(statuses, {"file.open"}, RINGS)["file.open"]


def test_one_way_to_each_hook_is_enough() -> None:
    for end in ("exit", "enter"):
        last = {one.hook for one in SENSORS["file"].programs if one.name.endswith(end)}
        assert last
    status = opens(lambda one: one.name.endswith(("exit", "enter")))
    assert status == KindStatus("full")


def test_what_only_completes_a_kind() -> None:
    """Without it the kind is observed in part; with it alone, not at all."""
    status = opens(lambda one: one.reports)
    assert status.status == "partial"
    assert "no on_openat_enter, so latencies of openat() are not observed" in status.reason
    assert opens(lambda one: not one.reports).status == "missing"


def test_one_hook_of_several() -> None:
    status = opens(lambda one: one.hook != "openat2")
    assert status == KindStatus(
        "partial", "no on_openat2_exit, so opens by openat2() are not observed"
    )


def coverage_of(kind: str, attached: Callable[[str, ProgramInfo], bool]) -> KindStatus:
    """The coverage of a kind, whichever sensors have a part in it."""
    statuses = [
        ProgramStatus(
            name=one.name,
            sensor=sensor.name,
            hook=one.hook,
            way=f"way {one.name}",
            kinds=one.kinds,
            status="attached" if attached(sensor.name, one) else "failed",
            reason="" if attached(sensor.name, one) else f"no {one.name}",
        )
        for sensor in SENSORS.values()
        for one in sensor.programs
    ]
    return coverage(statuses, {kind}, RINGS)[kind]


def test_a_way_that_is_not_as_good() -> None:
    """What it lacks is said, where it is the one that is used."""
    assert coverage_of("net.drop", lambda _, __: True) == KindStatus("full")
    status = coverage_of("net.drop", lambda _, one: "on_drop" != one.name != "on_drop_raw")
    assert status == KindStatus(
        "partial", "way on_drop_unreasoned: the reasons of drops are not observed"
    )


def test_closes_without_what_they_end() -> None:
    """Of a socket, where nobody sees what it sends or receives, there is no record."""
    counts = {"udp_sendmsg", "udpv6_sendmsg", "udp_send", "udp_receive"}
    assert coverage_of("net.udp", lambda _, one: one.hook not in counts).status == "missing"
    status = coverage_of("net.udp", lambda _, one: one.hook in counts)
    assert status.status == "partial"
    assert "so closes of UDP sockets are not observed" in status.reason


def test_what_another_sensor_keeps() -> None:
    """Without it the events are there, and nobody knows whose they are."""
    lost = {"sock_state", "sock_state_twin", "accept", "accept4"}
    status = coverage_of("net.retransmit", lambda _, one: one.hook not in lost)
    assert status.status == "partial"
    assert "owners of connections, and those of the agent itself, are not known" in status.reason
    assert coverage_of("net.retransmit", lambda _, one: one.hook in lost).status == "missing"


def test_a_sensor_is_loaded_for_what_it_keeps() -> None:
    assert sensors_of({"net.retransmit"}) == ["net", "tracepoint_net"]
    assert sensors_of({"net.listen", "net.udp"}) == ["tracepoint_net"]
    assert sensors_of({"net.close"}) == ["net"]
