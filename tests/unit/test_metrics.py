"""Metrics of a service over a kernel in memory: the same numbers as its last heartbeat's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamer.agent.losses import LossTotals, Lost
from streamer.config.settings import Limits, Settings
from streamer.operation import http
from streamer.operation.look import Latency, Look
from streamer.operation.metrics import buckets, exposition
from streamer.sinks.latency import BOUNDS, LatencySamples
from streamer.sinks.memory import MemorySink
from tests.unit.test_service import TINY, Run, until

Values = dict[tuple[str, ...], float]


def parsed(page: bytes) -> dict[str, Values]:
    """By sample, then by the values of the labels in the order of their names."""
    found: dict[str, Values] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            key = tuple(sample.labels[name] for name in sorted(sample.labels))
            values = found.setdefault(sample.name, {})
            assert key not in values, sample
            values[key] = sample.value
    return found


def metrics_of(run: Run) -> dict[str, Values]:
    return parsed(exposition(run.service.look()))


@pytest.fixture
def runs() -> Iterator[Any]:
    made: list[Run] = []

    def make(*sinks: MemorySink, **options: Any) -> Run:
        made.append(Run(*sinks, **options))
        return made[-1]

    yield make
    for run in made:
        run.kernel.close()
        run.programs.release()


async def test_every_number_is_that_of_the_account(runs: Any) -> None:
    """Filtered and lost events, garbage, faults and skipped runs, at two sinks of which one
    drops.
    """
    good, bad = MemorySink("good:"), MemorySink("bad:", budget_bytes=3000)
    run = runs(good, bad, settings=Settings(rings=TINY), on_full="drop")
    await run.start()
    bad.hold = True
    for _ in range(20):
        run.programs.emit("process.exec", 5)
        run.programs.emit("file.open", 5, 1)
        run.programs.emit("net.connect", 2, filtered=True)
        await asyncio.sleep(0.02)
    run.programs.garbage("bulk")
    run.programs.emit("file.open", 200)  # more than there is room for
    run.programs.fault("FAULT_LISTENERS_FULL", 3)
    run.kernel.runs_missed["on_exec"] = 4
    await until(lambda: not run.service.reader.sources[1].ring.pending)
    await run.stop()
    last = run.of("stream.heartbeat", good)[-1]
    found = metrics_of(run)
    for kind, counts in last.counts.items():
        assert found["streamer_produced_events_total"][kind,] == counts.produced
        assert [
            found["streamer_events_total"][kind, what]
            for what in ("filtered", "shed", "lost", "read")
        ] == [counts.filtered, counts.shed, counts.lost, counts.read]
    assert last.counts["file.open"].lost > 0
    assert last.counts["net.connect"].filtered == 40
    assert found["streamer_faults_total"] == {(k,): n for k, n in last.faults.items()}
    assert found["streamer_skipped_runs_total"] == {("on_exec",): 4}
    assert found["streamer_reader_unknown_kind_records_total"][()] == 1
    lost = {key: n for key, n in found["streamer_lost_events_total"].items() if n}
    told = total_by_place(run.of("stream.loss", good), "good:")
    told |= total_by_place(run.of("stream.loss", bad), "bad:")
    at_bad = {key[0]: n for key, n in lost.items() if key[1] == "bad:"}
    assert {key: n for key, n in lost.items() if key[1] != "bad:"} == {
        key: n for key, n in told.items() if key[1] != "bad:"
    }
    dropped = {k: n for k, n in bad.account.dropped.items() if not k.startswith("stream.")}
    assert at_bad == dropped
    assert dropped
    for sink in (good, bad):
        for what in ("received", "delivered", "dropped"):
            values = found[f"streamer_sink_{what}_events_total"]
            account = getattr(sink.account, what)
            assert {key[0]: n for key, n in values.items() if key[1] == sink.name and n} == +account
    assert found["streamer_sink_latency_seconds_count"]["good:",] > 0


async def test_losses_in_the_decoder_and_at_the_end_are_scraped(runs: Any) -> None:
    """Records that no reader knows, and those that are in the rings when a limit ends the run."""
    sink = MemorySink()
    run = runs(sink, limits=Limits(max_events=7))
    pages = http.Pages(run.service.look, itertools.count().__next__)
    await run.start()
    for ring in ("critical", "bulk", "bulk"):
        run.programs.garbage(ring)
    await until(lambda: run.service.look().losses)

    def lost() -> Values:
        _, page = pages.answer(b"GET /metrics HTTP/1.1\r\n\r\n").split(b"\r\n\r\n", 1)
        return {key: n for key, n in parsed(page)["streamer_lost_events_total"].items() if n}

    assert lost() == {("", "", "decode"): 3}
    run.programs.emit("process.exec", 10)
    await run.end()
    assert lost() == {("", "", "decode"): 3, ("", "", "stop"): 3}
    assert lost() == total_by_place(run.of("stream.loss", sink), sink.name)


def total_by_place(losses: list[Any], sink: str) -> Values:
    found: Values = {}
    for loss in losses:
        if "was not run" in loss.reason:
            continue
        kinds = dict(loss.kinds)
        if rest := loss.count - sum(kinds.values()):
            kinds[""] = rest
        for kind, count in kinds.items():
            key = (kind, sink if loss.stage == "sink" else "", loss.stage)
            found[key] = found.get(key, 0) + count
    return found


async def test_what_is_ready(runs: Any) -> None:
    sink = MemorySink()
    run = runs(sink)
    pages = http.Pages(run.service.look, itertools.count().__next__)
    ask = b"GET /readyz HTTP/1.1\r\n\r\n"
    assert pages.answer(ask).endswith(b"the agent is starting\nmemory: is starting\n")
    assert b" 503 " in pages.answer(ask)
    await run.start()
    assert b" 200 OK" in pages.answer(ask)
    sink._set_status("down", "nobody is there:\n ask later")
    assert pages.answer(ask).endswith(b"\r\n\r\nmemory: is down: nobody is there: ask later\n")
    sink._set_status("up")
    await run.stop()
    assert b"the agent is stopping\n" in pages.answer(ask)


async def test_who_asks_again_at_once_gets_the_same(runs: Any) -> None:
    run = runs()
    await run.start()
    now = [0.0]
    pages = http.Pages(run.service.look, lambda: now[0])
    ask = b"GET /metrics HTTP/1.1\r\n\r\n"
    first = pages.answer(ask)
    assert pages.answer(ask) is first
    now[0] = http.KEPT_SECONDS
    assert pages.answer(ask) is not first
    await run.stop()


async def test_names_with_quotes_and_line_ends_are_escaped(runs: Any) -> None:
    run = runs(MemorySink('a"b\nc\\d:'))
    await run.start()
    found = metrics_of(run)
    assert ('a"b\nc\\d:',) in found["streamer_sink_held_bytes"]
    await run.stop()


async def test_a_look_is_what_its_schema_says(runs: Any) -> None:
    run = runs()
    await run.start()
    data = msgspec.json.encode(run.service.look())
    assert msgspec.json.decode(data, type=Look).phase == "streaming"
    await run.stop()


def test_one_batch_at_a_time_is_followed() -> None:
    now = [0.0]
    samples = LatencySamples(lambda: now[0])
    samples.taken(10)
    now[0] = 0.2
    samples.taken(5)  # not followed
    assert samples.lag_seconds == 0.2
    samples.settled(9)
    assert not any(samples.counts)
    now[0] = 0.3
    samples.settled(3)
    assert samples.counts[BOUNDS.index(0.5)] == 1
    assert samples.sum_seconds == 0.3
    assert samples.lag_seconds == 0.0
    samples.taken(1)
    now[0] = 100.3
    samples.settled(4)
    assert samples.counts[-1] == 1
    assert buckets(Latency(BOUNDS, tuple(samples.counts), 0.0))[-1] == ("+Inf", 2)


def test_totals_of_losses() -> None:
    totals = LossTotals()
    totals.add(Lost("kernel", "no room", 5, {"file.open": 3}))
    totals.add(Lost("kernel", "no room", 1, {"file.open": 1}))
    totals.add(Lost("sink", "refused", 2, {"file.open": 2}), "s:")
    assert totals.counts == {
        ("kernel", "", "file.open"): 4,
        ("kernel", "", ""): 2,
        ("sink", "s:", "file.open"): 2,
    }
