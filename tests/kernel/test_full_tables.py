"""Tables that are full, as far as no other test fills them: docs/limits.md has all of them.

Filled from outside, of an agent as it is configured. Those that only much at once, or a size that
cannot be configured, can fill are in test_full_maps.py.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from streamer.kernel.objects import CONTRACT
from tests.bpf_variant import Change, Variant
from tests.conftest import Require
from tests.kernel.agent import TCP_KINDS, Agent
from tests.kernel.dns import PORT, framed, query, question, read_framed, response
from tests.kernel.pace import seconds
from tests.kernel.roles import in_own_network
from tests.kernel.scope import Scope
from tests.kernel.system import kernel_is
from tests.kernel.test_attack_net import use_up_memory
from tests.kernel.test_syscalls import SECOND, Timing, sleep_in_threads
from tests.kernel.unprivileged import more_descriptors

pytestmark = pytest.mark.kernel

FAULTS = [name for name, _, _ in CONTRACT["enum fault"]]
LISTENERS = 8192
"""Of which it is known who listens."""
MORE = LISTENERS * 3 // 2
ROOM = 1024
ACCEPTED = ROOM + 200


def push_out_a_listener() -> None:
    """One listens before so many others that nobody knows who he was, and then accepts."""
    more_descriptors(MORE + 3 * ACCEPTED)
    with socket.create_server(("127.0.0.1", 0)) as first:
        others = [socket.create_server(("127.0.0.2", 1024 + i)) for i in range(MORE)]
        accepted, clients = [], []
        for _ in range(ACCEPTED):
            clients.append(socket.create_connection(first.getsockname()))
            accepted.append(first.accept()[0])
        for one in (*accepted, *clients, *others):
            one.close()


def test_more_listeners_and_connections_than_are_remembered(
    scope: Scope, tmp_path: Path, require_kernel: Require
) -> None:
    """Connections to one that was pushed out are whose accepted, and closes, them: both counted."""
    require_kernel(kernel_is(5, 11), "before 5.11 nothing is kept with the socket")
    config = f"[kernel]\nconnections = {ROOM}\n"
    with Agent(tmp_path, *scope.options, events=TCP_KINDS, config=config) as agent:
        with scope.start(in_own_network, push_out_a_listener) as actor:
            actor.result()
        agent.wait_for(b'{"event":"net.close"', 2 * ACCEPTED)
        recording = agent.stop()
    found = Counter(event.__struct_config__.tag for event in recording.events)
    assert found == {"net.connect": ACCEPTED, "net.accept": ACCEPTED, "net.close": 2 * ACCEPTED}
    assert {(event.pid, event.owner_known) for event in recording.events} == {(actor.pid, True)}
    faults = recording.heartbeat.faults
    # Others on this machine have connections in that table, too.
    assert faults["connections_full"] >= ACCEPTED - ROOM
    assert faults["listeners_full"] >= ACCEPTED - ROOM


SLEEPERS = ROOM + 200
TASK_STORAGE = (
    "(PLAIN_LOADS && bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_storage_get))"
)


def test_more_tasks_in_calls_than_there_is_room_for(
    scope: Scope, variant: Callable[[Mapping[str, Change]], Variant]
) -> None:
    """As on kernels where nothing is kept with a task: who finds no room is counted as that.

    From 7.0 on some may have been seen by no program, which the kernel counts.
    """
    made = variant({"kprobe_syscall_latency.bpf.c": (TASK_STORAGE, "false")})
    with Timing(scope, "nanosleep", syscall_tasks=ROOM, directory=str(made.objects)) as timing:
        scope.act(sleep_in_threads, SLEEPERS, round(seconds(2) * SECOND))
        found = timing.of_all()["nanosleep"]
        left_out = timing.state.missed()
        faults = struct.unpack_from(f"<{len(FAULTS)}Q", timing.state.faults)
    full = faults[FAULTS.index("FAULT_SYSCALL_STARTS_FULL")]
    # Others on this machine sleep, too, and a CPU may not get at what is free on another.
    assert ROOM // 2 <= found.count <= ROOM
    assert full >= SLEEPERS - found.count - sum(left_out.values())
    assert not left_out or kernel_is(7, 0)


def ask_without_room() -> None:
    """Of a server over TCP, with a socket that has no room for anything else."""
    with socket.create_server(("127.0.0.1", PORT)) as listener, socket.socket() as client:

        def answer() -> None:
            server, _ = listener.accept()
            with server:
                server.sendall(framed(response(read_framed(server))))

        serving = threading.Thread(target=answer)
        serving.start()
        assert use_up_memory(client) > 10
        client.connect(("127.0.0.1", PORT))
        client.sendall(framed(query(1, question(b"a.test"))))
        read_framed(client)
        serving.join()


def test_a_connection_with_a_dns_server_without_room(scope: Scope, tmp_path: Path) -> None:
    """What it asks is in no event, and each packet of which that is so is counted."""
    with Agent(tmp_path, *scope.options, events="net.dns") as agent:
        scope.act(in_own_network, ask_without_room)
        recording = agent.stop()
    assert recording.of("net.dns") == []
    assert recording.heartbeat.faults.keys() == {"socket_storage"}
    assert recording.heartbeat.faults["socket_storage"] >= 4  # SYNs, query, response
