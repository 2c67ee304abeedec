"""Makes the golden records anew, on the running kernel: `python -m tests.golden.make` (root).

Runs `golden.c`, compiled, in a cgroup of its own, takes the raw records of what it did out of
the rings, and writes them with the events that they are decoded to. Look at the difference
before it is committed: the decoder that is to be tested by them has made the events.
"""

from __future__ import annotations

import importlib
import mmap
import os
import shutil
import socket
import subprocess
from pathlib import Path

from streamer.config.settings import Filters, Kernel, Settings
from streamer.events.kinds import HEADER, KINDS, RECORDS
from streamer.kernel import state as kernel
from streamer.kernel.state import KernelState
from streamer.ring.records_py import Decoder, Ring
from tests.golden.cases import CLOCK_OFFSET_NS, ID_PREFIX, PLACE, Case, constants, published, save
from tests.kernel.roles import (
    Role,
    bring_up_loopback,
    leave_mounts,
    leave_network,
    show_network,
)
from tests.kernel.scope import Scope, cgroup_mount

SOURCE = Path(__file__).parent / "golden.c"
COMM = "golden"
NOBODY = "127.9.9.9"


class RecordKeeper(Decoder):
    """A decoder that keeps the raw records."""

    def __init__(self, ring: str) -> None:
        super().__init__(HEADER, RECORDS, constants(ring), f"{ID_PREFIX}-{ring}")
        self.clock_offset_ns = CLOCK_OFFSET_NS
        self.records: list[bytes] = []

    def decode_kind(self, record: bytes) -> tuple[str, object] | None:
        self.records.append(record)
        return super().decode_kind(record)


def run_program(program: str) -> None:
    os.chdir(os.path.dirname(program))
    os.waitpid(os.posix_spawn(program, [COMM.encode()], {}), 0)


def drained(state: KernelState, name: str) -> list[Case]:
    """Everything that is in a ring."""
    page, size, fd = mmap.PAGESIZE, state.ring_bytes[name], state.ring_fds[name]
    keeper = RecordKeeper(name)
    with (
        mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as consumer,
        mmap.mmap(fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page) as producer,
    ):
        ring = Ring(consumer, producer, page)
        events = ring.drain(keeper, 1 << 20).events
        ring.close()
    return [
        Case(name, record, published(event))
        for record, event in zip(keeper.records, events, strict=True)
    ]


def is_own(case: Case) -> bool:
    """Whether it is about the program alone, and not about the process that started it."""
    if "comm" not in case.event:  # a packet's, to an address that nobody else uses
        return bool(case.event["destination_addr"] == NOBODY)
    parent: str = case.event.get("parent_exe", str(PLACE / COMM))
    comm: str = case.event["comm"]
    return comm == COMM and parent == str(PLACE / COMM)


def record(program: Path, scope: Scope) -> list[Case]:
    """Run the program and take what it did out of the rings."""
    settings = Settings(
        filters=Filters(cgroups=(scope.id,)),
        kernel=Kernel(syscalls=("nanosleep",), syscall_slow_ms=1, dns_timeout_seconds=1),
    )
    state = kernel.load(settings, frozenset(KINDS))
    try:
        state.attach()
        scope.act(run_program, str(program))
        state.run_timed()
        state.detach()
        cases = [case for ring in state.ring_fds for case in drained(state, ring)]
    finally:
        state.close()
    return [case for case in cases if is_own(case)]


def record_flows() -> list[Case]:
    """Of a conversation of a process with itself and a datagram, over both versions of IP."""
    leave_mounts()
    leave_network()
    show_network()
    bring_up_loopback()
    settings = Settings(kernel=Kernel(interfaces=("lo",)))
    state = kernel.load(settings, frozenset({"net.flow"}))
    try:
        state.attach()
        for address in ("127.0.0.1", "::1"):
            Role(COMM, talk, address).result()
        state.detach()
        assert state.flows is not None
        while not state.flows.flush():
            pass
        return [case for case in drained(state, "bulk") if case.event["protocol"] != 58]
    finally:
        state.close()


def talk(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        socket.create_server((address, 7000), family=family) as listener,
        socket.create_connection((address, 7000), source_address=(address, 5000)) as client,
        socket.socket(family, socket.SOCK_DGRAM) as datagrams,
    ):
        server, _ = listener.accept()
        client.sendall(bytes(100))
        server.sendall(server.recv(100))
        client.recv(100)
        client.close()
        server.close()
        datagrams.bind((address, 5000))
        datagrams.sendto(b"x", (address, 5000))


def main() -> None:
    mount = cgroup_mount()
    assert mount is not None, "no cgroup v2 hierarchy is mounted"
    PLACE.mkdir()
    try:
        program = PLACE / COMM
        subprocess.run(["cc", "-O1", "-static", "-o", str(program), str(SOURCE)], check=True)
        with Scope(mount) as scope:
            cases = record(program, scope)
    finally:
        shutil.rmtree(PLACE)
    cases += Role("golden", record_flows).result()
    save(cases)
    print(f"{len(cases)} records")


if __name__ == "__main__":
    # By its name, under which the actor finds `run_program`.
    importlib.import_module("tests.golden.make").main()
