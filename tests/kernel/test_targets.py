"""Sensors that attach to interfaces, a cgroup or a sampling rate, with maps that are read."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamer.errors import KernelError
from streamer.kernel.capabilities import CAP_NET_ADMIN
from streamer.kernel.loader import OBJECTS, Loader, ProgramState, Targets
from streamer.kernel.loading import LoaderLike
from streamer.privilege.client import RemoteLoader
from streamer.privilege.split import start_helper
from tests.bpf_variant import ROOT
from tests.conftest import SET_UP, Require
from tests.kernel.bpf_maps import look_up, possible_cpus
from tests.kernel.pace import seconds
from tests.kernel.roles import Role, in_own_network, leave_network
from tests.kernel.scope import Scope
from tests.kernel.system import sampled_by
from tests.kernel.targets_sensor import CATALOGUE, SENSOR

pytestmark = pytest.mark.kernel

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
EXPERIMENTAL = 0x88B5
"""An Ethernet protocol that nothing else uses."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The core, and the sensor of this test."""
    place, ours = tmp_path_factory.mktemp("objects"), ROOT / "build" / "bpf" / f"{SENSOR}.bpf.o"
    if not ours.exists():
        pytest.skip(f"{ours.name} is not compiled: {SET_UP}")
    for built in (Path(OBJECTS, "core.bpf.o"), ours):
        shutil.copy(built, place)
    return str(place)


HELPER = """
import sys
sys.path.append({root!r})
from streamer.kernel.loader import Loader
from streamer.privilege.helper import main
from tests.kernel.targets_sensor import CATALOGUE
def make_loader(targets, workers):
    return Loader(
        parent_is_agent=True, sensors=CATALOGUE, directory={directory!r}, targets=targets
    )
sys.exit(main(int(sys.argv[1]), make_loader=make_loader))
"""


def direct(directory: str, targets: Targets) -> LoaderLike:
    return Loader(sensors=CATALOGUE, directory=directory, targets={SENSOR: targets})


def through_a_helper(directory: str, targets: Targets) -> LoaderLike:
    """The privileged helper, which knows this sensor."""
    program = Path(directory, "helper.py")
    program.write_text(HELPER.format(root=str(ROOT), directory=directory))
    client = start_helper(str(program))
    client.set_up([], {SENSOR: targets})
    return RemoteLoader(client, [])


class Sensing:
    """The sensor, loaded and attached to its targets."""

    def __init__(
        self,
        directory: str,
        targets: Targets,
        options: dict[str, int] | None = None,
        make: Callable[[str, Targets], LoaderLike] = direct,
    ) -> None:
        self.loader = make(directory, targets)
        self.loader.load_core({"critical": 4096, "bulk": 4096}, None)
        self.loaded = self.loader.load(SENSOR, options or {})
        self.states = self.loader.attach(SENSOR).programs

    def read(self, name: str) -> dict[int, list[int]]:
        """The map: per key the words of its value."""
        return {
            int.from_bytes(key, "little"): [
                int.from_bytes(value[at : at + 8], "little") for at in range(0, len(value), 8)
            ]
            for key, value in self.loader.read(name)
        }

    def unload(self, name: str) -> int:
        """Unload the sensor; a descriptor by which its map lives on."""
        fd = os.dup(self.loaded.maps[name])
        self.loader.unload(SENSOR)
        return fd

    def close(self) -> None:
        self.loader.close()


def attached(*programs: tuple[str, str, str]) -> list[ProgramState]:
    return [ProgramState(*one, "attached") for one in programs]


def test_programs_without_what_they_need(directory: str) -> None:
    """They are not loaded, their maps not made, and nobody misses them."""
    sensing = Sensing(directory, Targets())
    sensing.close()
    assert sensing.states == []
    assert sensing.loaded.maps == {}


# ---------------------------------------------------------------- interfaces


def in_own_system(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a network namespace of its own, which /sys shows too."""
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None),
    ):
        assert not failed, os.strerror(ctypes.get_errno())
    leave_network()
    assert not libc.mount(b"none", b"/sys", b"sysfs", 0, None), os.strerror(ctypes.get_errno())
    return function(*arguments)


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def make_pair() -> None:
    ip("link", "add", "here", "type", "veth", "peer", "name", "there")
    for name in ("lo", "here", "there"):
        ip("link", "set", name, "up")


def send_frames(interface: str, count: int) -> None:
    """Out of one end of a pair, and into the other."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((interface, 0))
        for _ in range(count):
            sender.send(b"\xff" * 6 + b"\x02" * 6 + EXPERIMENTAL.to_bytes(2, "big") + bytes(46))


def has_xdp(interface: str) -> bool:
    (link,) = json.loads(ip("-json", "link", "show", interface))
    return "xdp" in link


def frames_of(sensing: Sensing) -> int:
    return sum(sensing.read("protocols").get(EXPERIMENTAL, []))


def wait_for_frames(sensing: Sensing, count: int) -> None:
    """They take their time from one end to the other."""
    deadline = time.monotonic() + seconds(10)
    while frames_of(sensing) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def count_frames(directory: str) -> dict[str, Any]:
    make_pair()
    descriptors = len(os.listdir("/proc/self/fd"))
    sensing = Sensing(directory, Targets(interfaces=("here", "lo")))
    for count, so_far in ((25, 25), (10, 35)):
        send_frames("there", count)
        wait_for_frames(sensing, so_far)
    send_frames("here", 7)  # come in at the end that is not observed
    found: dict[str, Any] = {"states": sensing.states, "frames": frames_of(sensing)}
    found["held"] = [has_xdp(name) for name in ("here", "lo", "there")]
    fd = sensing.unload("protocols")
    found["held after"] = [has_xdp(name) for name in ("here", "lo", "there")]
    send_frames("there", 5)
    time.sleep(0.2)
    words = look_up(fd, EXPERIMENTAL.to_bytes(2, "little"), 8 * possible_cpus())
    found["frames after"] = sum(words)
    os.close(fd)
    sensing.close()
    found["leaked"] = len(os.listdir("/proc/self/fd")) - descriptors
    return found


def test_packets_of_interfaces(require: Require, directory: str) -> None:
    """Of each that is named, and of no other, until the sensor is unloaded."""
    require(shutil.which("ip"), "ip (iproute2) is not installed")
    found = Role("test", in_own_system, count_frames, directory).result()
    assert found["states"] == attached(("on_packet", "packets", "xdp here:native lo:generic"))
    assert found["frames"] == found["frames after"] == 35
    assert found["held"] == [True, True, False]
    assert found["held after"] == [False, False, False]
    assert found["leaked"] == 0


def attach_to(directory: str, interfaces: tuple[str, ...]) -> tuple[list[ProgramState], list[bool]]:
    make_pair()
    sensing = Sensing(directory, Targets(interfaces=interfaces))
    held = [has_xdp(name) for name in ("here", "lo", "there")]
    sensing.close()
    return sensing.states, held


def test_an_interface_that_is_not_there(require: Require, directory: str) -> None:
    """It is named; those that are there are observed, and none that is not named."""
    require(shutil.which("ip"), "ip (iproute2) is not installed")
    states, held = Role("test", in_own_system, attach_to, directory, ("here", "elsewhere")).result()
    way, reason = "xdp here:native", "elsewhere: No such device"
    assert states == [ProgramState("on_packet", "packets", way, "attached", reason)]
    assert held == [True, False, False]
    states, held = Role("test", in_own_system, attach_to, directory, ("elsewhere",)).result()
    reason = "xdp cannot be attached: elsewhere: No such device"
    assert states == [ProgramState("on_packet", "packets", "xdp", "failed", reason)]
    assert held == [False, False, False]


def test_interfaces_that_sys_does_not_show(require: Require, directory: str) -> None:
    """Where /sys is of another network namespace, the numbers there mean other interfaces."""
    require(shutil.which("ip"), "ip (iproute2) is not installed")
    states, held = Role("test", in_own_network, attach_to, directory, ("here",)).result()
    (state,) = states
    assert state.status == "failed"
    assert state.reason.endswith("here: /sys/class/net is that of another network namespace")
    assert held == [False, False, False]


# ---------------------------------------------------------------- a cgroup


def send_datagrams(count: int) -> tuple[int, int]:
    """To a socket in a network of its own: the port, and the bytes of the packets."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))
        sender.connect(receiver.getsockname())
        for _ in range(count):
            sender.send(bytes(100))
        port: int = receiver.getsockname()[1]
    return port, count * (100 + 8 + 20)


def test_traffic_of_a_cgroup(scope: Scope, directory: str) -> None:
    """Of its sockets and of nobody else's, until the sensor is unloaded."""
    sensing = Sensing(directory, Targets(cgroup=str(scope.path)), {"flows": 4096})
    assert sensing.states == attached(("on_send", "sending", "cgroup_skb/egress"))
    total = {}
    for count in (12, 30):
        port, size = scope.act(in_own_network, send_datagrams, count)
        total[port] = [count, size]
        assert sensing.read("flows") == total
    Role("outside", in_own_network, send_datagrams, 9).result()
    assert sensing.read("flows") == total
    fd = sensing.unload("flows")
    port, _ = scope.act(in_own_network, send_datagrams, 5)
    assert port in total or look_up(fd, port.to_bytes(4, "little"), 16) == []
    for known, words in total.items():
        assert look_up(fd, known.to_bytes(4, "little"), 16) == words
    os.close(fd)
    sensing.close()


def test_a_cgroup_that_is_not_there(directory: str) -> None:
    sensing = Sensing(directory, Targets(cgroup="/no/such/cgroup"), {"flows": 16})
    sensing.close()
    (state,) = sensing.states
    assert state.status == "failed"
    words = "cannot be attached: /no/such/cgroup: No such file or directory"
    assert state.reason == f"cgroup_skb/egress {words}"


# ---------------------------------------------------------------- a sampling rate


def burn(seconds: float) -> tuple[int, float]:
    """Use up so much CPU time. The process, and how much it was."""
    before = time.process_time()
    while time.process_time() - before < seconds:
        pass
    return os.getpid(), time.process_time()


def test_samples_at_a_rate(directory: str) -> None:
    """A process is met as often as it runs, until the sensor is unloaded."""
    descriptors = len(os.listdir("/proc/self/fd"))
    sensing = Sensing(directory, Targets(rate=200))
    assert sensing.states == attached(("on_sample", "samples", sampled_by()))
    pid, seconds = Role("busy", burn, 1.0).result()
    (met,) = sensing.read("samples")[pid]
    assert 0.5 * 200 * seconds < met < 1.6 * 200 * seconds
    fd = sensing.unload("samples")
    pid, _ = Role("busy", burn, 0.2).result()
    assert look_up(fd, pid.to_bytes(4, "little"), 8) == []
    os.close(fd)
    sensing.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_all_at_once(scope: Scope, directory: str) -> None:
    """A sensor with several targets: each program has its own."""
    targets = Targets(cgroup=str(scope.path), rate=50)
    sensing = Sensing(directory, targets, {"flows": 16})
    assert sensing.states == attached(
        ("on_send", "sending", "cgroup_skb/egress"),
        ("on_sample", "samples", sampled_by()),
    )
    port, size = scope.act(in_own_network, send_datagrams, 3)
    assert sensing.read("flows") == {port: [3, size]}
    with pytest.raises(KernelError, match="there is no map protocols"):
        sensing.read("protocols")
    sensing.close()


# ---------------------------------------------------------------- through the helper


def helper_may_filter_packets() -> bool:
    """By the capabilities of the helper that this process has started."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    (pid,) = (
        one for one in children if Path(f"/proc/{one}/comm").read_text() == "streamer-helper\n"
    )
    status = dict(
        line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return bool(int(status["CapEff"], 16) >> CAP_NET_ADMIN & 1)


def ask_for_frames(directory: str) -> dict[str, Any]:
    make_pair()
    targets = Targets(interfaces=("here",), rate=50)
    sensing = Sensing(directory, targets, make=through_a_helper)
    found: dict[str, Any] = {"capable": helper_may_filter_packets(), "states": sensing.states}
    send_frames("there", 25)
    wait_for_frames(sensing, 25)
    found["held"] = [has_xdp(name) for name in ("here", "lo")]
    sensing.close()
    found["held after"] = [has_xdp(name) for name in ("here", "lo")]
    return found


def test_interfaces_named_to_the_helper(require: Require, directory: str) -> None:
    """It was told of them before anything was loaded, and keeps what it takes to attach there."""
    require(shutil.which("ip"), "ip (iproute2) is not installed")
    found = Role("test", in_own_system, ask_for_frames, directory).result()
    assert found["states"] == attached(
        ("on_packet", "packets", "xdp here:native"),
        ("on_sample", "samples", sampled_by()),
    )
    assert found["capable"]
    assert found["held"] == [True, False]
    assert found["held after"] == [False, False]


def test_a_cgroup_named_to_the_helper(scope: Scope, directory: str) -> None:
    targets = Targets(cgroup=str(scope.path))
    sensing = Sensing(directory, targets, {"flows": 64}, through_a_helper)
    assert sensing.states == attached(("on_send", "sending", "cgroup_skb/egress"))
    port, size = scope.act(in_own_network, send_datagrams, 12)
    assert sensing.read("flows") == {port: [12, size]}
    sensing.close()


def test_a_helper_without_interfaces_lacks_their_capability(directory: str) -> None:
    sensing = Sensing(directory, Targets(rate=50), make=through_a_helper)
    assert sensing.states == attached(("on_sample", "samples", sampled_by()))
    assert not helper_may_filter_packets()
    sensing.close()
