"""The values of the metrics, against what the agent says elsewhere, and what the test did."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamer.operation.look import Look, SinkLook
from tests.brokers import MosquittoBroker, free_port
from tests.kernel.agent import ROOT, UNDELIVERED, Agent, Recording, kind_of
from tests.kernel.flows import CONFIG as FLOWS_CONFIG
from tests.kernel.flows import Near, in_netns, observe
from tests.kernel.pace import seconds
from tests.kernel.roles import Role
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing
from tests.kernel.test_metrics import metrics_at
from tests.kernel.test_status import command

pytestmark = pytest.mark.kernel

OPENS = 4000
PATH = "/no/such/file/of/this/test/"
"""And four digits: so that all records of them are of one size."""


class Page:
    """A scrape: values by name and labels."""

    def __init__(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        self._found = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self._found[f"streamer_{name}", frozenset(labels.items())]

    def ring(self, name: str) -> list[float]:
        """Of the ring `bulk`, on each CPU."""
        return [n for labels, n in self.all(name).items() if ("ring", "bulk") in labels]

    def sink(self, what: str, sink: str) -> float:
        """Over all kinds."""
        found = self.all(f"sink_{what}_events_total").items()
        return sum(n for labels, n in found if ("sink", sink) in labels)

    def all(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        """Of all labels."""
        return {labels: n for (one, labels), n in self._found.items() if one == f"streamer_{name}"}


def looked(agent: Agent) -> Look:
    done = subprocess.run(command(agent, "status", "--json"), cwd=ROOT, capture_output=True)
    found = msgspec.json.decode(done.stdout, type=Look)
    assert done.returncode == bool(found.not_ready), done.stderr
    return found


class At(NamedTuple):
    """A scrape, what `streamer status` said before and after it, and the times around it."""

    before: Look
    page: Page
    after: Look
    times: tuple[float, float]

    def sink(self, name: str) -> tuple[SinkLook, SinkLook]:
        return self.before.sinks[name], self.after.sinks[name]


def scraped(agent: Agent, port: int) -> At:
    before, begun = looked(agent), time.monotonic()
    page, end = Page(port), time.monotonic()
    return At(before, page, looked(agent), (begun, end))


def check_against_status(at: At) -> None:
    """Every value lies between those of the two looks, which are the same where nothing moves."""
    for ring, one in at.before.rings.items():
        then, page = at.after.rings[ring], at.page
        assert page("ring_size_bytes", ring=ring) == one.size_bytes == then.size_bytes
        assert one.read_bytes <= page("ring_read_bytes_total", ring=ring) <= then.read_bytes
    # Those of other CPUs come when anybody opens something there.
    marks = {(mark.ring, mark.cpu): mark for mark in at.after.marks}
    for mark in at.before.marks:
        later, place = marks[mark.ring, mark.cpu], {"ring": mark.ring, "cpu": str(mark.cpu)}
        assert mark.seq <= at.page("ring_sequence_total", **place) <= later.seq
        assert mark.read <= at.page("ring_sequence_read_total", **place) <= later.read
    for kind, counts in at.before.counts.items():
        later_counts = at.after.counts[kind]
        assert counts.produced <= at.page("produced_events_total", kind=kind)
        assert at.page("produced_events_total", kind=kind) <= later_counts.produced
        for outcome in ("filtered", "shed", "lost", "read"):
            value = at.page("events_total", kind=kind, outcome=outcome)
            assert getattr(counts, outcome) <= value <= getattr(later_counts, outcome)
    for name in at.before.sinks:
        check_sink(at, name)


def check_sink(at: At, name: str) -> None:
    one, then = at.sink(name)
    for what in ("received", "delivered", "dropped"):
        for kind, count in getattr(one, what).items():
            value = at.page(f"sink_{what}_events_total", sink=name, kind=kind)
            assert count <= value <= getattr(then, what)[kind]
    assert at.page("sink_budget_bytes", sink=name) == one.budget_bytes
    for state in ("starting", "up", "down", "closed"):
        assert at.page("sink_status", sink=name, status=state) == (state == one.status)
    count = at.page("sink_latency_seconds_count", sink=name)
    assert sum(one.latency.counts) <= count <= sum(then.latency.counts)
    total = at.page("sink_latency_seconds_sum", sink=name)
    assert one.latency.sum_seconds <= total <= then.latency.sum_seconds


def config(agent_output: Path, broker: MosquittoBroker, port: int) -> str:
    """A file, and a broker for which reading waits when it has 64 KiB of events to come."""
    return metrics_at(
        port,
        f"""
        [rings]
        bulk_bytes = 65536
        [[sinks]]
        type = "file"
        path = "{agent_output}"
        [[sinks]]
        type = "mqtt"
        host = "127.0.0.1"
        port = {broker.port}
        topic = "values"
        budget_bytes = 65536
        on_full = "pause"
        """,
    )


def until(agent: Agent, condition: Callable[[Look], bool]) -> None:
    deadline = time.monotonic() + seconds(60)
    while not condition(found := looked(agent)):
        assert time.monotonic() < deadline, (found.marks, found.counts, found.losses, found.sinks)
        time.sleep(0.2)


def is_still(look: Look) -> bool:
    """All opens have happened, and reading waits."""
    one = look.counts.get("file.open")
    return look.paused and one is not None and one.produced - one.filtered == OPENS


def is_done(look: Look) -> bool:
    """All was read and delivered, and what is missing was found."""
    lost = sum(one.count for one in look.losses)
    return (
        not look.paused
        and lost == look.counts["file.open"].lost
        and not any(sink.pending for sink in look.sinks.values())
        and not any(ring.used_bytes for ring in look.rings.values())
    )


def opens_in(output: Path) -> int:
    return output.read_bytes().count(b'"event":"file.open"')


@pytest.mark.mqtt
def test_rings_queues_lag_and_losses(scope: Scope, tmp_path: Path) -> None:
    """A broker that is not there: one sink is full, a ring too, and events are lost. Then it is."""
    port, output = free_port(), tmp_path / "events.ndjson"
    broker = MosquittoBroker(tmp_path / "mosquitto")
    before = time.monotonic()
    given = config(output, broker, port)
    agent = Agent(
        tmp_path, *scope.options, events="file.open", config=given, sinks=None, output=output
    )
    with agent:
        told = time.monotonic()  # the manifest is there
        scope.act(open_missing, PATH, OPENS, 4)
        until(agent, is_still)
        still = scraped(agent, port)
        check_against_status(still)
        check_still(still, f"file:{output}", f"mqtt://{broker.address}/values", output)
        lag = still.page("sink_lag_seconds", sink=f"mqtt://{broker.address}/values")
        assert still.times[0] - told <= lag <= still.times[1] - before
        with broker:
            until(agent, is_done)
            done = scraped(agent, port)
            check_against_status(done)
            check_done(done, f"file:{output}", f"mqtt://{broker.address}/values", output)
            total = done.page("sink_latency_seconds_sum", sink=f"mqtt://{broker.address}/values")
            assert total >= lag  # it was that batch which was followed
            recording = agent.stop()
    check_states(done.page, recording)
    last = recording.heartbeat.counts["file.open"]
    for outcome in ("lost", "read", "shed"):
        value = done.page("events_total", kind="file.open", outcome=outcome)
        assert value == getattr(last, outcome)


def test_what_is_left_in_the_rings_at_the_end(scope: Scope, tmp_path: Path) -> None:
    """A broker that is not there until then: what is not read by half of the grace is lost."""
    port, output = free_port(), tmp_path / "events.ndjson"
    given = config(output, MosquittoBroker(tmp_path / "mosquitto"), port)
    given = given.replace("grace_seconds = 8", "grace_seconds = 10")
    agent = Agent(
        tmp_path, *scope.options, events="file.open", config=given, sinks=None, output=output
    )
    with agent:
        scope.act(open_missing, PATH, OPENS, 4)
        until(agent, is_still)
        agent.send(signal.SIGTERM)
        while "stop" not in (lost := lost_by_stage(port)):
            time.sleep(0.1)  # until it ends: then there is nobody to ask
        recording = agent.wait()
    assert recording.returncode == UNDELIVERED
    told = Counter[str]()
    for loss in recording.losses:
        told[loss.stage] += loss.count
    assert lost == told  # where a CPU has nothing in the ring, what it lost was lost in the kernel
    assert lost.total() == OPENS - opens_in(output)


def lost_by_stage(port: int) -> Counter[str]:
    """Where anything was lost that is not a sink's."""
    found = Counter[str]()
    for labels, number in Page(port).all("lost_events_total").items():
        found[dict(labels)["stage"]] += int(number)
    return +Counter({stage: n for stage, n in found.items() if stage != "sink"})


def check_still(at: At, written: str, held: str, output: Path) -> None:
    page = at.page
    read, lost = (
        page("events_total", kind="file.open", outcome=outcome) for outcome in ("read", "lost")
    )
    assert read == opens_in(output) > 0
    waiting = OPENS - read - lost
    assert waiting > 0
    assert lost > 0
    numbers = [sum(page.ring(name)) for name in ("ring_sequence_total", "ring_sequence_read_total")]
    assert numbers == [OPENS, read]
    # All records are of one size.
    size = page("ring_read_bytes_total", ring="bulk") / read
    assert page("ring_used_bytes", ring="bulk") == waiting * size
    assert waiting * size < page("ring_size_bytes", ring="bulk") == 65536
    assert (page("reading_paused"), page("ready")) == (1, 0)
    for sink, pending in ((written, 0.0), (held, read)):
        assert page("sink_received_events_total", sink=sink, kind="file.open") == read
        delivered = page("sink_delivered_events_total", sink=sink, kind="file.open")
        assert read - delivered == pending
    assert page("sink_pending_events", sink=held) >= read  # with the stream's own records
    assert page("sink_pending_events", sink=held) == page.sink("received", held)
    assert page("sink_held_bytes", sink=held) >= page("sink_budget_bytes", sink=held) == 65536
    assert page("sink_latency_seconds_count", sink=held) == 0
    one, then = at.sink(held)
    assert one.lag_seconds <= page("sink_lag_seconds", sink=held) <= then.lag_seconds
    assert page("sink_status", sink=held, status="up") == 0
    assert page("sink_status", sink=written, status="up") == 1


def check_done(at: At, written: str, sent: str, output: Path) -> None:
    page = at.page
    read = opens_in(output)
    missing = OPENS - read
    assert missing > 0
    found = {labels: n for labels, n in page.all("lost_events_total").items() if n}
    place = {"stage": "kernel", "sink": "", "kind": "file.open"}
    assert found == {frozenset(place.items()): missing}
    assert page("events_total", kind="file.open", outcome="lost") == missing
    assert page("events_total", kind="file.open", outcome="read") == read
    # Behind the last that was read are those that were lost at the end: nothing passes them.
    assert read <= sum(page.ring("ring_sequence_read_total")) <= OPENS
    assert sum(page.ring("ring_sequence_total")) == OPENS
    assert page("ring_used_bytes", ring="bulk") == 0
    assert (page("reading_paused"), page("ready")) == (0, 1)
    for sink in (written, sent):
        assert page("sink_delivered_events_total", sink=sink, kind="file.open") == read
        assert page("sink_status", sink=sink, status="up") == 1
        assert page("sink_latency_seconds_count", sink=sink) > 0


def check_states(page: Page, recording: Recording) -> None:
    """Programs and kinds are in the state that the manifest says, and in no other."""
    manifest = recording.manifest
    assert {labels for labels, is_so in page.all("program_status").items() if is_so} == {
        frozenset(
            {
                "program": one.name,
                "sensor": one.sensor,
                "hook": one.hook,
                "way": one.way,
                "status": one.status,
            }.items()
        )
        for one in manifest.programs
    }
    assert {labels for labels, is_so in page.all("coverage").items() if is_so} == {
        frozenset({"kind": kind, "status": one.status}.items())
        for kind, one in manifest.coverage.items()
    }


FLOWS = 25


def test_the_table_of_flows(tmp_path: Path) -> None:
    """As many are in use as are reported at the end, among them each that was made here."""
    port = free_port()

    def act(near: Near) -> tuple[set[int], float, float]:
        ports = broadcast(FLOWS)
        near.settle()
        page = Page(port)
        table = {"table": "flows"}
        return ports, page("table_used", **table), page("table_size", **table)

    told = metrics_at(port, f"{FLOWS_CONFIG}flows = 1000\n")
    seen = observe(tmp_path, act, config=told, prepare=without_ipv6)
    ports, used, size = seen.result
    flows = seen.recording.of("net.flow")
    assert {kind_of(one) for one in flows} == {"net.flow"}
    ours = Counter(one.client_port for one in flows if one.client_port in ports)
    assert ours == Counter(ports)
    assert (used, size) == (len(flows), 1000)


def without_ipv6(_: str, far: str) -> None:
    """At both ends: its addresses are looked for, and routers, while the test runs."""
    disable_ipv6("veth1")
    Role("far", in_netns, far, disable_ipv6, ("veth2",)).result()


def disable_ipv6(device: str) -> None:
    Path(f"/proc/sys/net/ipv6/conf/{device}/disable_ipv6").write_text("1")


def broadcast(count: int) -> set[int]:
    """Send a packet from each of so many ports, to all, so that nobody answers."""
    found, opened = set(), []
    for _ in range(count):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        made.sendto(b"x", ("192.0.2.255", 9))
        found.add(made.getsockname()[1])
        opened.append(made)
    for one in opened:
        one.close()
    return found
