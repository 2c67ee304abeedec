"""Modules that are unloaded while programs are attached to what they made.

Only in virtual machines: no test loads a module into the kernel of the machine it runs on.
"""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Require
from tests.kernel.flows import Near, ip, observe, run
from tests.kernel.system import IN_GUEST

pytestmark = pytest.mark.kernel

OURS, OTHER = "198.51.100.1", "198.51.100.2"
DATAGRAMS = 4
GONE = "dummy7: No such device"
KINDS = ("net.flow", "xdp.counters")


def make_dummy(near: str = "", far: str = "") -> None:
    """An interface of the module's, which takes every packet and sends none."""
    run("/run/modprobe", "dummy", "numdummies=0")
    ip("link", "add", "dummy7", "type", "dummy")
    ip("address", "add", f"{OURS}/24", "dev", "dummy7")
    ip("link", "set", "dummy7", "up")


def is_loaded() -> bool:
    return any(line.startswith("dummy ") for line in Path("/proc/modules").read_text().splitlines())


def send() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((OURS, 5000))
        for _ in range(DATAGRAMS):
            sender.sendto(bytes(100), (OTHER, 7000))


def unload_and_load_again(near: Near) -> list[bool]:
    send()
    loaded = [is_loaded()]
    subprocess.run(["/run/modprobe", "-r", "dummy"], check=True)
    loaded.append(is_loaded())
    near.agent.wait_for(b'"reason":"gone"')
    near.agent.wait_for(b'{"event":"stream.manifest"', 2)
    make_dummy()
    near.agent.wait_for(b'{"event":"stream.manifest"', 3)
    send()
    near.settle()
    return loaded


@pytest.mark.every_kernel
def test_a_module_that_unloads_with_its_interface(tmp_path: Path, require_kernel: Require) -> None:
    """Nothing holds it; its flows are reported, and that they are observed no more, then again."""
    require_kernel(IN_GUEST, "modules are loaded in virtual machines only")
    seen = observe(
        tmp_path,
        unload_and_load_again,
        interfaces=("veth1", "dummy7"),
        prepare=make_dummy,
        events=",".join(KINDS),
    )
    assert seen.result == [True, False]
    assert seen.recording.losses == []
    first, second = [
        event
        for event in seen.recording.of("net.flow")
        if event.interface == "dummy7" and event.client_port == 5000
    ]
    assert (first.reason, second.reason) == ("gone", "stop")
    assert first.client_packets == second.client_packets == DATAGRAMS
    assert first.client_bytes == second.client_bytes == DATAGRAMS * (14 + 20 + 8 + 100)
    assert first.ifindex != second.ifindex
    for kind in KINDS:
        reasons = [one.coverage[kind].reason for one in seen.recording.of("stream.manifest")]
        assert [GONE in reason for reason in reasons] == [False, True, False]
        assert f"{kind} is observed in part: {GONE}" in seen.recording.stderr
