"""`xdp.counters`: every packet that comes in is counted, once, as what it is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from streamer.config.settings import Kernel, Settings
from streamer.events.envelope import Envelope
from streamer.events.summaries import XdpCounters
from streamer.kernel import state
from streamer.kernel.libbpf import run_program
from streamer.kernel.loader import Loader
from streamer.kernel.targets import targets_of
from streamer.summaries.period import Summaries
from tests.conftest import Require
from tests.kernel.agent import Agent
from tests.kernel.pace import seconds
from tests.kernel.packets import FRAMES, Class, classify, mutated
from tests.kernel.roles import (
    Role,
    enter_netns,
    in_own_network,
    leave_mounts,
    show_network,
    two_namespaces,
)
from tests.kernel.witness import bpftrace

pytestmark = pytest.mark.kernel

KIND = "xdp.counters"
Counts = Counter[tuple[Class, str]]
"""Packets and bytes by class: (class, "packets") and (class, "bytes")."""


def counted(records: Iterable[XdpCounters]) -> Counts:
    """Added up, over all periods."""
    found = Counts()
    for one in records:
        klass = Class(one.vlan, one.network, one.transport, one.ports, one.verdict)
        found[klass, "packets"] += one.packets
        found[klass, "bytes"] += one.bytes
    return found


def expected(frames: Iterable[tuple[bytes, Class]]) -> Counts:
    found = Counts()
    for frame, klass in frames:
        found[klass, "packets"] += 1
        found[klass, "bytes"] += len(frame)
    return found


@pytest.mark.parametrize("name", FRAMES)
def test_the_second_reading_agrees_with_the_builder(name: str) -> None:
    """By which what is changed at random is judged."""
    frame, klass = FRAMES[name]
    assert classify(frame) == klass


# ---------------------------------------------------------------- the program alone


def run_all(frames: list[bytes]) -> tuple[set[int], list[XdpCounters]]:
    """Each once, with a look at the tables in the middle. Verdicts and records."""
    settings = Settings(kernel=Kernel(interfaces=("lo",)))
    kernel = state.load(settings, {KIND}, Loader(targets=targets_of(settings.kernel)))
    try:
        kernel.attach()
        summaries = Summaries(kernel, Envelope(), {KIND})
        fd = kernel.program_fds["on_packet"]
        half = len(frames) // 2
        verdicts = {run_program(fd, 1, frame) for frame in frames[:half]}
        records: list[Any] = summaries.collect()
        verdicts |= {run_program(fd, 1, frame) for frame in frames[half:]}
        records += summaries.collect()
        assert summaries.collect() == []
        assert not any(kernel.faults[: len(kernel.faults)])
        return verdicts, records
    finally:
        kernel.close()


XDP_PASS = 2


def test_a_hundred_thousand_frames_with_bytes_changed_at_random() -> None:
    frames = list(mutated(100_000, seed=20261129))
    verdicts, records = Role("test", in_own_network, run_all, frames).result()
    assert verdicts == {XDP_PASS}
    wanted = expected((frame, classify(frame)) for frame in frames)
    assert counted(records) == wanted
    assert len({klass.verdict for klass, _ in wanted}) == 6  # it met all there are


# ---------------------------------------------------------------- as many as can be named

MOST = 16
PAIRS = [(f"veth{at}", f"veth{at + 1}") for at in range(0, MOST, 2)]


def count_at_all() -> tuple[list[XdpCounters], dict[str, int], int]:
    """As many packets into each interface as its number says. Records, indexes, entries."""
    leave_mounts()
    show_network()
    for one, other in PAIRS:
        run_ip("add", one, "type", "veth", "peer", "name", other)
        for name in (one, other):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
            run_ip("set", name, "up")
    names = tuple(name for pair in PAIRS for name in pair)
    settings = Settings(kernel=Kernel(interfaces=names))
    kernel = state.load(settings, {KIND}, Loader(targets=targets_of(settings.kernel)))
    try:
        kernel.attach()
        summaries = Summaries(kernel, Envelope(), {KIND})
        for one, other in PAIRS:
            for source, to in ((one, other), (other, one)):
                with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
                    sender.bind((source, 0))
                    for _ in range(names.index(to) + 1):
                        sender.send(FRAMES["UDP"][0])
        time.sleep(seconds(0.3))
        indexes = {name: socket.if_nametoindex(name) for name in names}
        records: list[Any] = summaries.collect()
        return records, indexes, len(kernel.read("interfaces"))
    finally:
        kernel.close()


def run_ip(*command: str) -> None:
    subprocess.run(["ip", "link", *command], check=True)


def test_as_many_interfaces_as_can_be_named(require: Require) -> None:
    """Each has an entry of its own, and what comes in there is counted for no other."""
    require(shutil.which("ip"), "ip (iproute2) is not installed")
    records, indexes, entries = Role("test", in_own_network, count_at_all).result()
    assert {(one.interface, one.ifindex): one.packets for one in records} == {
        item: number for number, item in enumerate(indexes.items(), 1)
    }
    assert counted(records) == expected([FRAMES["UDP"]] * sum(range(MOST + 1)))
    assert len(records) == entries == MOST


def test_more_interfaces_than_can_be_named() -> None:
    """Are a mistake in the configuration, before anything is loaded."""
    named = [part for at in range(MOST + 1) for part in ("--interface", f"veth{at}")]
    command = [sys.executable, "-m", "streamer", "run", "--events", KIND, *named]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "interfaces" in done.stderr


# ---------------------------------------------------------------- real traffic


def send(frames: list[bytes]) -> None:
    """At the far end, slowly enough for the near one's queue of 256."""
    enter_netns(NEAR_AND_FAR[1])
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind(("veth2", 0))
        for frame in frames:
            sender.send(frame)
            time.sleep(0.0005)


NEAR_AND_FAR: tuple[str, str] = ("", "")


@pytest.fixture
def near(require: Require, monkeypatch: pytest.MonkeyPatch) -> Iterable[str]:
    """A network namespace with the interface `veth1`, at which nothing comes in but the test's."""
    require(shutil.which("ip"), "ip (iproute2) is not installed")
    with two_namespaces() as names:
        for name in names:
            quiet = "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 >$f; done"
            subprocess.run(["ip", "netns", "exec", name, "sh", "-c", quiet], check=True)
        monkeypatch.setattr(sys.modules[__name__], "NEAR_AND_FAR", names)
        yield names[0]


def observe(near: str, directory: Path, *more: str, config: str = "") -> Agent:
    prefix = ("ip", "netns", "exec", near)
    options = ("--interface", "veth1", *more)
    config = f"summary_seconds = 1\n{config}"
    return Agent(directory, *options, events=KIND, config=config, prefix=prefix)


def test_frames_on_the_wire(near: str, tmp_path: Path) -> None:
    """Through the whole agent, over several periods; the totals are the sums of the periods."""
    frames = [one for one in FRAMES.values() if len(one[0]) >= 15]
    with observe(near, tmp_path) as agent:
        for _ in range(2):
            Role("sender", send, [frame for frame, _ in frames] * 5).result()
            time.sleep(seconds(1.2))
        recording = agent.stop()
    records = recording.of(KIND)
    assert counted(records) == expected(frames * 10)
    assert {one.interface for one in records} == {"veth1"}
    last = {(r.vlan, r.network, r.transport, r.ports, r.verdict): r for r in records}
    totals = Counts()
    for key, record in last.items():
        totals[Class(*key), "packets"] = record.packets_total
        totals[Class(*key), "bytes"] = record.bytes_total
    assert totals == counted(records)
    (program,) = recording.manifest.programs
    assert (program.status, program.way) == ("attached", "xdp veth1:native")
    assert recording.manifest.coverage[KIND].status == "full"
    assert recording.heartbeat.counts[KIND].read == len(records)


SIZE = 3 << 20
PORT = 5000


def serve(size: int) -> None:
    """At the near end; a client at the far end sends it so many bytes."""
    enter_netns(NEAR_AND_FAR[0])
    with socket.create_server(("192.0.2.1", PORT)) as listener:
        client = Role("client", transfer, size)
        connection, _ = listener.accept()
        with connection:
            got = 0
            while data := connection.recv(1 << 16):
                got += len(data)
        client.result()
    assert got == size


def transfer(size: int) -> None:
    enter_netns(NEAR_AND_FAR[1])
    with socket.create_connection(("192.0.2.1", PORT)) as connection:
        connection.sendall(bytes(size))


def sent(near: str) -> tuple[int, int]:
    """Packets and bytes that the far end has sent."""
    far = NEAR_AND_FAR[1]
    shown = subprocess.run(
        ["ip", "-n", far, "-s", "-j", "link", "show", "veth2"],
        capture_output=True,
        check=True,
    )
    (link,) = json.loads(shown.stdout)
    return link["stats64"]["tx"]["packets"], link["stats64"]["tx"]["bytes"]


def test_a_transfer_of_known_size(near: str, tmp_path: Path) -> None:
    """Packets and bytes as the far end's interface has sent them."""
    with observe(near, tmp_path) as agent:
        before = sent(near)
        Role("server", serve, SIZE).result()
        recording = agent.stop()
        after = sent(near)
    records = recording.of(KIND)
    found = counted(records)
    packets = sum(n for (_, what), n in found.items() if what == "packets")
    size = sum(n for (_, what), n in found.items() if what == "bytes")
    assert packets == after[0] - before[0]
    # Some kernels' veth counts frames without their headers of 14 bytes.
    assert size - (after[1] - before[1]) in (0, 14 * packets)
    tcp = [one for one in records if one.transport == "tcp"]
    assert {(one.network, one.ports, one.verdict) for one in tcp} == {("ipv4", "user", "whole")}
    payload = sum(one.bytes - 66 * one.packets for one in tcp)
    assert payload >= SIZE  # options of a SYN, and what was sent again
    assert {one.network for one in records} == {"ipv4", "arp"}


PINGS = 40
PADDING = 777
"""Bytes that each ping carries, so that another reader knows it by its length."""
THEIRS = 'tracepoint:net:netif_receive_skb /str(args->name) == "veth1"/ { @[args->len] = count(); }'
"""What the kernel hands on of what comes in, by length without the Ethernet header."""


def ping(*address: str) -> None:
    command = ["ping", "-q", "-c", str(PINGS), "-i", "0.01", "-s", str(PADDING), *address]
    subprocess.run(["ip", "netns", "exec", NEAR_AND_FAR[1], *command], check=True)


def test_pings_and_bpftrace(near: str, tmp_path: Path, require: Require) -> None:
    """As many as were sent by either protocol, and as many of that length as bpftrace has seen."""
    for tool in ("ping", "bpftrace"):
        require(shutil.which(tool), f"{tool} is not installed")
    for name in NEAR_AND_FAR:
        allow = "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 0 >$f; done"
        subprocess.run(["ip", "netns", "exec", name, "sh", "-c", allow], check=True)
    for number, name in enumerate(NEAR_AND_FAR, 1):
        address = ["address", "add", f"2001:db8::{number}/64", "dev", f"veth{number}", "nodad"]
        subprocess.run(["ip", "-n", name, *address], check=True)
    with bpftrace(THEIRS, tmp_path / "bpftrace") as ended, observe(near, tmp_path) as agent:
        ping("192.0.2.1")
        ping("-6", "2001:db8::1")
        recording = agent.stop()
        shown = ended()
    found = counted(recording.of(KIND))
    four, six = Class(network="ipv4", transport="icmp"), Class(network="ipv6", transport="icmpv6")
    assert found[four, "packets"] == PINGS
    assert found[four, "bytes"] == PINGS * (14 + 20 + 8 + PADDING)
    assert found[six, "packets"] >= PINGS  # the kernel sends some of its own
    for header in (20, 40):
        assert f"@[{header + 8 + PADDING}]: {PINGS}\n" in shown


# ---------------------------------------------------------------- interfaces that come and go


def link(near: str, *command: str) -> None:
    subprocess.run(["ip", "-n", near, "link", *command], check=True)


def test_an_interface_that_goes_and_comes_back(near: str, tmp_path: Path) -> None:
    """It is said in the log and in a manifest, and what comes in at the new one is counted."""
    near_name, far_name = NEAR_AND_FAR
    frames = [FRAMES["UDP"], FRAMES["IPv6, TCP"]] * 20
    with observe(near, tmp_path, "--interface", "lo") as agent:
        Role("sender", send, [frame for frame, _ in frames]).result()
        time.sleep(seconds(1.5))
        link(near, "delete", "veth1")
        agent.wait_for(b'"veth1: No such device"')
        pair = ["veth1", "type", "veth", "peer", "name", "veth2", "netns", far_name]
        link(near, "add", *pair)
        for name, device in ((near_name, "veth1"), (far_name, "veth2")):
            subprocess.run(["ip", "-n", name, "link", "set", device, "up"], check=True)
        agent.wait_for(b'{"event":"stream.manifest"', 3)
        Role("sender", send, [frame for frame, _ in frames]).result()
        recording = agent.stop(check=False)
    assert recording.returncode == 0
    records = [one for one in recording.of(KIND) if one.interface == "veth1"]
    assert counted(records) == expected(frames * 2)
    assert len({one.ifindex for one in records}) == 2
    statuses = [one.coverage[KIND].status for one in recording.of("stream.manifest")]
    assert statuses == ["full", "partial", "full"]
    assert f"{KIND} is observed in part: veth1: No such device" in recording.stderr
    assert f"{KIND} is observed again" in recording.stderr


def test_another_name_of_an_interface_takes_no_packets_of_it(
    near: str, tmp_path: Path, require: Require
) -> None:
    """By it one finds the index, but attaches to nothing."""
    command = ["ip", "-n", near, "link", "property", "add", "dev", "veth1", "altname", "other"]
    named = subprocess.run(command, check=False)
    require(named.returncode == 0, "interfaces have one name here (Linux 5.5)")
    with observe(near, tmp_path, "--interface", "other") as agent:
        Role("sender", send, [FRAMES["UDP"][0]] * 10).result()
        recording = agent.stop(check=False)
    assert recording.manifest.coverage[KIND].reason == "other: No such device"
    records = recording.of(KIND)
    assert {one.interface for one in records} == {"veth1"}
    assert counted(records) == expected([FRAMES["UDP"]] * 10)


def test_what_others_have_attached_stays(near: str, tmp_path: Path) -> None:
    """There is room for one XDP program at an interface: ours does not push out another's."""
    with observe(near, tmp_path / "first") as first:
        with observe(near, tmp_path / "second", "--interface", "lo") as second:
            recording = second.stop(check=False)
        Role("sender", send, [FRAMES["UDP"][0]] * 10).result()
        kept = first.stop()
    report = recording.manifest.coverage[KIND]
    assert (report.status, report.reason) == ("partial", "veth1: Device or resource busy")
    assert counted(kept.of(KIND)) == expected([FRAMES["UDP"]] * 10)


def test_an_agent_that_is_killed_leaves_nothing_attached(near: str, tmp_path: Path) -> None:
    with observe(near, tmp_path) as agent:
        os.kill(agent.pid, signal.SIGKILL)
        agent.process.wait()
    deadline = time.monotonic() + seconds(10)
    while "xdp" in shown(near):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def shown(near: str) -> dict[str, Any]:
    command = ["ip", "-n", near, "-j", "link", "show", "veth1"]
    (found,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return dict(found)
