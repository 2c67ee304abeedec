"""What net.flow costs for each packet, beside an empty program and bpftrace's count of the same."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.kernel import Cost, cost_of_runs, statistics
from benchmarks.load import OBJECT
from streamer.config.settings import Kernel, Settings
from streamer.kernel import state
from streamer.kernel.libbpf import Object, run_program, time_program
from streamer.kernel.loader import Loader, ensure_tracefs
from streamer.kernel.state import KernelState
from streamer.kernel.targets import targets_of
from tests.kernel.packets import FRAMES
from tests.kernel.roles import (
    Role,
    bring_up_loopback,
    leave_mounts,
    leave_network,
    show_network,
)

_PACKETS = 200_000
_DATAGRAMS = 30_000
_ADDRESS = "127.0.0.1", 7000
_BPFTRACE = """
tracepoint:net:net_dev_queue {
  $skb = (struct sk_buff *)args->skbaddr;
  $ip = (struct iphdr *)($skb->head + $skb->network_header);
  $ports = (struct udphdr *)($skb->head + $skb->transport_header);
  @packets[$ip->saddr, $ip->daddr, $ip->protocol, $ports->source, $ports->dest] = count();
  @bytes[$ip->saddr, $ip->daddr, $ip->protocol, $ports->source, $ports->dest] = sum($skb->len);
}
"""


def packets(rounds: int) -> list[Cost]:
    """In a network of its own, of which the loopback device is observed."""
    return in_own_network(_measure, rounds)


def in_own_network(measure: Callable[[int], list[Cost]], rounds: int) -> list[Cost]:
    """What a function measures in a process of its own, where /sys shows that network."""
    made: list[Cost] = Role("bench", _enter, measure, rounds).result()
    return made


def _enter(measure: Callable[[int], list[Cost]], rounds: int) -> list[Cost]:
    leave_mounts()
    leave_network()
    show_network()
    bring_up_loopback()
    return measure(rounds)


def _measure(rounds: int) -> list[Cost]:
    found = _in_turns(rounds)
    with statistics():
        found.append(Cost("a packet that begins a flow, as the kernel measures", _new_flows()))
        found.append(Cost("a datagram at the loopback device, likewise", _observed()))
        if shutil.which("bpftrace"):
            found.append(Cost("the same by bpftrace, in one direction", by_bpftrace(_BPFTRACE)))
    return found


def _load(flows: int = 65536) -> KernelState:
    settings = Settings(kernel=Kernel(interfaces=("lo",), flows=flows))
    kernel = state.load(settings, {"net.flow"}, Loader(targets=targets_of(settings.kernel)))
    kernel.attach()
    return kernel


def _in_turns(rounds: int) -> list[Cost]:
    """In runs of the programs, which take turns, as the kernel measures them; the best of some."""
    kernel = _load()
    bare = Object(OBJECT)
    try:
        for program in bare.programs.values():
            program.autoload(program.name == "tc_pass")
        for one in bare.maps.values():
            one.leave_out()
        bare.load()
        fds = {"nothing": bare.programs["tc_pass"].fd}
        fds |= dict.fromkeys(("TCP", "IPv6, UDP"), kernel.program_fds["flow_egress"])
        found = dict.fromkeys(fds, float("inf"))
        for _ in range(rounds):
            for name, fd in fds.items():
                frame = FRAMES.get(name, FRAMES["TCP"])[0]
                found[name] = min(found[name], time_program(fd, _PACKETS, frame))
    finally:
        bare.close()
        kernel.close()
    alone = found.pop("nothing")
    costs = [
        Cost(f"a packet of a flow of net.flow: {name}", ns - alone) for name, ns in found.items()
    ]
    return [Cost("a packet, an empty tc program", alone), *costs]


def _new_flows() -> float:
    """Each packet of another one, in a table that is full of such by then."""
    frame, _ = FRAMES["TCP"]
    kernel = _load(flows=8192)
    try:
        fd = kernel.program_fds["flow_egress"]
        for number in range(2 * 8192):
            run_program(fd, 1, frame[:34] + number.to_bytes(2, "big") + frame[36:])
        return cost_of_runs(info_of(fd))
    finally:
        kernel.close()


def _observed() -> float:
    kernel = _load()
    try:
        send()
        return cost_of_runs(info_of(kernel.program_fds["flow_egress"]))
    finally:
        kernel.close()


def info_of(fd: int) -> Path:
    """What the kernel shows of a descriptor."""
    return Path(f"/proc/self/fdinfo/{fd}")


def send() -> None:
    """Send datagrams through the loopback device, to a socket there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(_ADDRESS)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(_DATAGRAMS):
                sender.sendto(b"x", _ADDRESS)


def by_bpftrace(program: str) -> float:
    """Nanoseconds for one run of bpftrace's `program`, which has one probe, while they are sent."""
    if trouble := ensure_tracefs():
        raise RuntimeError(trouble)
    command = ["bpftrace", "-e", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # that it attaches
            time.sleep(1)
            send()
            infos = Path(f"/proc/{process.pid}/fdinfo").iterdir()
            (info,) = (one for one in infos if "run_cnt" in one.read_text())
            return cost_of_runs(info)
        finally:
            process.kill()
