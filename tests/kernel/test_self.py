"""The agent leaves itself out, its brokers' side of its connections included."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import MosquittoBroker
from tests.kernel.agent import ALL, TCP_KINDS, UNDELIVERED, Agent, Recording
from tests.kernel.roles import enter_netns, netns_inode, two_namespaces
from tests.kernel.scope import Scope
from tests.kernel.unprivileged import CLONE_NEWNET, UID, become, own_namespaces

pytestmark = [pytest.mark.kernel, pytest.mark.mqtt]


def connect_to(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        own: int = connection.getsockname()[1]
        return own


def await_clients(broker: MosquittoBroker, count: int) -> None:
    deadline = time.monotonic() + 30
    while broker.log.count("New client connected") < count:
        assert time.monotonic() < deadline, broker.log
        time.sleep(0.05)


def with_port(recording: Recording, port: int) -> list[Any]:
    kinds = ("net.connect", "net.accept", "net.close")
    events = [event for kind in kinds for event in recording.of(kind)]
    return [event for event in events if port in (event.local_port, event.remote_port)]


def test_neither_the_agent_nor_a_broker_serving_it(scope: Scope, tmp_path: Path) -> None:
    """What others do with the same broker is observed, at both ends."""
    with MosquittoBroker(tmp_path / "broker") as broker:
        sink = f"mqtt://{broker.address}/events"
        events = f"{ALL},-file.open"  # of which others may make more than the broker takes
        with Agent(tmp_path / "agent", events=events, sinks=(sink,)) as agent:
            await_clients(broker, 1)
            own_port = scope.act(connect_to, broker.port)
            agent.wait_for(b'{"event":"net.close"')
            recording = agent.stop()
            agent.output.unlink()  # it holds what others on this machine did
        broker_pid = broker.pid
    (delivered,) = re.findall(r"mqtt:\S+ ([\d,]+) delivered, 0 dropped", recording.account)
    # The recording leaves out others' connections, whose owner nobody knows.
    read = sum(counts.read for counts in recording.heartbeat.counts.values())
    assert int(delivered.replace(",", "")) == read
    assert agent.pid not in {event.pid for event in recording.events}
    seen = with_port(recording, broker.port)
    assert {own_port} == {p for e in seen for p in (e.local_port, e.remote_port)} - {broker.port}
    assert Counter((type(e).__name__, e.pid == broker_pid) for e in seen) == {
        ("NetConnect", False): 1,
        ("NetClose", False): 1,
        ("NetAccept", True): 1,
        ("NetClose", True): 1,
    }


ADDRESS = "192.0.2.1"
CONFIG = "grace_seconds = 1\n"


def listen_in(netns: str) -> socket.socket:
    """A listening socket in another network namespace than the test's."""

    def listen() -> socket.socket:
        enter_netns(netns)
        return socket.create_server((ADDRESS, 0))

    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(listen).result()


def take_the_agents_addresses(own: int, port: int) -> int:
    """As a user, in a network of his own: between the same addresses and ports as the agent."""
    become(UID)
    own_namespaces(CLONE_NEWNET)
    subprocess.run(["ip", "address", "add", f"{ADDRESS}/32", "dev", "lo"], check=True)
    with socket.create_server((ADDRESS, port)) as listener:
        client = socket.create_connection((ADDRESS, port), source_address=(ADDRESS, own))
        server, _ = listener.accept()
        client.close()
        server.close()
    return netns_inode()


def test_nobody_hides_behind_the_addresses_of_the_agent(scope: Scope, tmp_path: Path) -> None:
    """They are the agent's in its own network namespace only."""
    with two_namespaces() as (netns, _), listen_in(netns) as broker:
        port = broker.getsockname()[1]
        agent = Agent(
            tmp_path,
            *scope.options,
            sinks=(f"mqtt://{ADDRESS}:{port}/events",),
            events=TCP_KINDS,
            config=CONFIG,
            prefix=("nsenter", f"--net=/run/netns/{netns}"),
        )
        with agent:
            connection, (_, own) = broker.accept()
            theirs = scope.act(take_the_agents_addresses, own, port)
            agent.wait_for(b'{"event":"net.close"', 2)
            recording = agent.stop(code=UNDELIVERED)
        connection.close()
    ports = own, port
    found = Counter((type(e).__name__, e.local_port, e.remote_port) for e in recording.events)
    assert found == {
        ("NetConnect", *ports): 1,
        ("NetAccept", *ports[::-1]): 1,
        ("NetClose", *ports): 1,
        ("NetClose", *ports[::-1]): 1,
    }
    assert {event.netns for event in recording.events} == {theirs}
