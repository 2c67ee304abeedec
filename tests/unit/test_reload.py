"""What a reload changes, and what it refuses: the decision alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from streamer.agent.reload import (
    CHANGEABLE,
    FIXED,
    Plan,
    Refusal,
    Running,
    Wanted,
    differing,
    plan,
    why_fixed,
)
from streamer.config.settings import (
    AnySink,
    FileSink,
    Filters,
    KafkaSink,
    Kernel,
    MqttSink,
    Settings,
    StdoutSink,
    Tls,
)
from streamer.kernel.loader import Targets
from streamer.kernel.state import sensors_of
from streamer.privilege.files import NamedFile

KINDS = frozenset({"process.exec", "file.open"})
KAFKA = KafkaSink(bootstrap=("127.0.0.1:9092",))
MQTT = MqttSink(host="broker")
A, B = FileSink(path="/a"), FileSink(path="b")


def running(settings: Settings, had: frozenset[str] = KINDS, **given: Any) -> Running:
    loaded = {sensor: had for sensor in sensors_of(had)}
    defaults: dict[str, Any] = {"targets": {}, "files": frozenset(told("/a", "/dir/b"))}
    return Running(settings, had, loaded, **(defaults | given))


def told(*paths: str) -> list[NamedFile]:
    return [NamedFile(path, "append", 0o640) for path in paths]


def planned(old: Settings, new: Settings, kinds: frozenset[str] = KINDS, **given: Any) -> Plan:
    found = plan(running(old, **given), Wanted(new, kinds, "/dir"))
    assert isinstance(found, Plan), found
    return found


def refused(
    old: Settings, new: Settings, kinds: frozenset[str] = KINDS, **given: Any
) -> list[Refusal]:
    found = plan(running(old, **given), Wanted(new, kinds, "/dir"))
    assert isinstance(found, list), found
    return found


def with_sinks(*sinks: AnySink) -> Settings:
    return Settings(sinks=sinks)


# ---------------------------------------------------------------- settings


def leaves(section: Any, prefix: str = "") -> list[str]:
    found = []
    for name in section.__struct_fields__:
        value = getattr(section, name)
        if isinstance(value, msgspec.Struct):
            found += leaves(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


def test_every_setting_can_be_changed_or_says_why_not() -> None:
    """One that is added has to be put into one of the two."""
    keys = leaves(Settings())
    for key in keys:
        assert bool(why_fixed(key)) != (not CHANGEABLE.isdisjoint((key, key.partition(".")[0])))
    known = {*keys, *(key.partition(".")[0] for key in keys)}
    assert CHANGEABLE | FIXED.keys() <= known


def test_nothing_has_changed() -> None:
    old = Settings(filters=Filters(pids=(1,)), sinks=(A, KAFKA))
    assert planned(old, old) == Plan(kept=(0, 1))


@pytest.mark.parametrize(
    "key", ["log_level", "heartbeat_seconds", "summary_seconds", "grace_seconds"]
)
def test_what_can_be_changed(key: str) -> None:
    other = {"log_level": "debug"}.get(key, 3.0)
    new = msgspec.structs.replace(Settings(), **{key: other})
    assert planned(Settings(), new).changes == (key,)


def test_filters_and_sampling() -> None:
    new = Settings(filters=Filters(pids=(1,)), kernel=Kernel(sample={"file.open": 10}))
    found = planned(Settings(), new)
    assert found.changes == ("kernel.sample", "filters.pids")
    assert found.filters
    assert not planned(new, msgspec.structs.replace(new, kernel=Kernel())).filters


def test_all_that_is_refused_is_said() -> None:
    new = Settings(
        user="daemon", kernel=Kernel(dns_per_second=1, interfaces=("lo",)), heartbeat_seconds=2
    )
    found = refused(Settings(), new)
    assert [one.key for one in found] == ["user", "kernel.interfaces", "kernel.dns_per_second"] or [
        one.key for one in found
    ] == ["user", "kernel.dns_per_second", "kernel.interfaces"]
    assert all(one.reason for one in found)
    assert str(found[0]) == "user: it takes privileges, which the agent has given up"


def test_keys_that_differ() -> None:
    new = Settings(kernel=Kernel(flows=128), sinks=(A,))
    assert list(differing(Settings(), new)) == ["kernel.flows", "sinks"]


# ---------------------------------------------------------------- kinds


def test_a_kind_whose_programs_are_loaded() -> None:
    new = frozenset({"process.exec", "process.exit"})
    found = planned(Settings(), Settings(), new)
    assert found.changes == ("events: file.open off", "events: process.exit on")
    assert (found.load, found.unload) == ((), ("file",))


def test_a_kind_whose_programs_are_not_loaded() -> None:
    found = planned(Settings(), Settings(), KINDS | {"net.connect", "net.bind"})
    assert (found.load, found.unload) == (("net", "tracepoint_net"), ())


def test_who_owns_connections_is_kept_for_kinds_that_need_it() -> None:
    found = planned(Settings(), Settings(), KINDS | {"net.retransmit"})
    assert found.load == ("net", "tracepoint_net")
    assert not planned(Settings(), Settings(), KINDS | {"net.bind"}).unload


def test_a_kind_that_a_loaded_sensor_was_loaded_without() -> None:
    kinds = frozenset({"net.bind"})
    (found,) = refused(Settings(), Settings(), kinds | {"net.drop"}, had=kinds)
    reason = "its programs are part of tracepoint_net, which is loaded without them"
    assert found == Refusal("events", f"net.drop: {reason}")
    without = planned(Settings(), Settings(), kinds, had=kinds | {"net.drop"})
    assert "tracepoint_net" not in without.unload


def test_a_kind_that_attaches_where_the_helper_was_not_told() -> None:
    wanted = KINDS | {"net.dns"}
    (found,) = refused(Settings(), Settings(), wanted)
    assert found.reason.startswith("net.dns: it attaches by cgroup, and ")
    given = {"targets": {"net_dns": Targets(cgroup="/sys/fs/cgroup")}}
    assert planned(Settings(), Settings(), wanted, **given).load == ("net", "net_dns")


@pytest.mark.parametrize("at_functions", [True, False])
def test_a_way_that_is_not_used_needs_nothing(at_functions: bool) -> None:
    """Without fentry, closes of UDP sockets are seen at a cgroup."""
    wanted = Wanted(Settings(), KINDS | {"net.udp"})
    found = plan(running(Settings(), at_functions=at_functions), wanted)
    assert isinstance(found, Plan) == at_functions


@pytest.mark.parametrize("kind", ["xdp.counters", "syscall.latency", "profile.sample", "net.flow"])
def test_what_is_counted_in_tables_stays_as_it_is(kind: str) -> None:
    for old, new in ((KINDS, KINDS | {kind}), (KINDS | {kind}, KINDS)):
        (found,) = refused(Settings(), Settings(), new, had=old)
        assert found.key == "events"
        assert found.reason.startswith(f"{kind}: ")


# ---------------------------------------------------------------- sinks


def test_sinks_that_stay_go_and_come() -> None:
    found = planned(with_sinks(A, KAFKA), with_sinks(MQTT, A))
    assert found.kept == (None, 0)
    assert found.changes[:2] == (
        "sinks: kafka://127.0.0.1:9092/kernel-events gone",
        "sinks: mqtt://broker:1883/kernel/{host}/{category} new",
    )


def test_a_sink_that_changes_goes_and_comes() -> None:
    found = planned(with_sinks(A), with_sinks(FileSink(path="/a", fsync="batch")))
    assert found.kept == (None,)
    assert found.changes == ("sinks: file:/a changed",)


def test_budget_and_policy_change_while_a_sink_runs() -> None:
    new = FileSink(path="/a", budget_bytes=1 << 20, on_full="drop")
    found = planned(with_sinks(A), with_sinks(new))
    assert found.kept == (0,)
    assert found.changes == ("sinks: file:/a holds 1048576 bytes", "sinks: file:/a on_full")


def test_a_share_of_the_budget_changes_with_the_others() -> None:
    found = planned(with_sinks(A), with_sinks(A, MQTT))
    assert found.changes[-1] == f"sinks: file:/a holds {24 << 20} bytes"


def test_order_alone_is_no_change_that_needs_anything() -> None:
    found = planned(with_sinks(A, KAFKA), with_sinks(KAFKA, A))
    assert (found.kept, found.changes) == ((1, 0), ())


@pytest.mark.parametrize("sink", [A, B, StdoutSink(), FileSink(path="/dev/fd/7"), KAFKA])
def test_files_that_the_helper_was_told_of(sink: AnySink) -> None:
    assert planned(with_sinks(MQTT), with_sinks(MQTT, sink)).kept == (0, None)


@pytest.mark.parametrize(
    ("sink", "key", "path"),
    [
        (FileSink(path="/c"), "sinks[1]", "not /c"),
        (FileSink(path="../a/../c"), "sinks[1]", "not /c"),
        (FileSink(path="/a", mode="0666"), "sinks[1].mode", "/a with mode 0640"),
        (MqttSink(host="x", username="u", password_file="/a"), "sinks[1]", "not /a"),
        (KafkaSink(bootstrap=("x:1",), tls=Tls(ca_file="ca.pem")), "sinks[1]", "not /dir/ca.pem"),
    ],
)
def test_files_that_it_was_not_told_of(sink: AnySink, key: str, path: str) -> None:
    """Nor for another use."""
    (found,) = refused(with_sinks(MQTT), with_sinks(MQTT, sink))
    assert found.key == key
    assert found.reason.startswith("the privileged helper opens only what it was told of")
    assert found.reason.endswith(path)


SPOOLED = msgspec.structs.replace(KAFKA, spool="spill")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        (SPOOLED, KAFKA, "sinks"),
        (KAFKA, SPOOLED, "sinks[0].spool"),
        (SPOOLED, A, "sinks"),
        (SPOOLED, msgspec.structs.replace(SPOOLED, budget_bytes=1 << 20), "sinks[0].budget_bytes"),
    ],
)
def test_a_sink_with_a_spool_stays_as_it_is(old: AnySink, new: AnySink, key: str) -> None:
    (found,) = refused(with_sinks(old), with_sinks(new))
    assert found.key == key
    assert planned(with_sinks(SPOOLED), with_sinks(SPOOLED, A)).kept == (0, None)


def test_sinks_of_several_workers_stay_as_they_are() -> None:
    """Each has its own, of which the others know nothing."""
    slower = msgspec.structs.replace(KAFKA, linger_ms=7)
    smaller = msgspec.structs.replace(KAFKA, budget_bytes=1 << 20)
    many = msgspec.structs.replace(with_sinks(KAFKA), workers=2)
    for sinks, keys in (
        ((slower,), ["sinks", "sinks[0]"]),
        ((smaller,), ["sinks[0]"]),
        ((KAFKA, MQTT), ["sinks[1]"]),
        ((), ["sinks"]),
    ):
        new = msgspec.structs.replace(many, sinks=sinks)
        assert [one.key for one in refused(many, new)] == keys
    filtered = msgspec.structs.replace(many, filters=Filters(comms=("a",)))
    assert planned(many, filtered).filters
    assert [one.key for one in refused(many, with_sinks(KAFKA))] == ["workers"]


def test_two_sinks_of_one_name() -> None:
    twice = msgspec.structs.replace(KAFKA, linger_ms=7)
    (found,) = refused(with_sinks(KAFKA), with_sinks(KAFKA, twice))
    assert found == Refusal("sinks[1]", f"found the same one twice: {KAFKA.name}")
