"""A look at the agent as Prometheus reads it (text format 0.0.4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from streamer.operation.look import PHASES, Latency, Look

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("filtered", "shed", "lost", "read")
_STATUSES = {
    "sink": ("starting", "up", "down", "closed"),
    "kind": ("full", "partial", "missing"),
    "program": ("attached", "failed", "spare", "loaded"),
}

_process = CollectorRegistry()
ProcessCollector(registry=_process)


class _Once(Collector):
    """What a registry asks for its metrics."""

    def __init__(self, look: Look) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        yield from families(self._look)


def exposition(look: Look) -> bytes:
    """The page `/metrics`: the agent's own, and the process's as its client library has them."""
    registry = CollectorRegistry()
    registry.register(_Once(look))
    return generate_latest(registry) + generate_latest(_process)


def families(look: Look) -> Iterator[Metric]:
    """Every metric of the agent's own. docs/operation.md says what each is."""
    yield _info(look)
    yield _states("streamer_phase", "Phase of the run.", "phase", {(): look.phase}, (), PHASES)
    yield _gauge("ready", "1 if it is ready, as /readyz says.", [((), not look.not_ready)])
    yield _gauge("uptime_seconds", "Seconds since it started.", [((), look.uptime_seconds)])
    yield from _events(look)
    yield from _rings(look)
    yield from _sinks(look)
    yield from _shedding(look)
    yield from _kernel(look)


def _info(look: Look) -> Metric:
    family = GaugeMetricFamily(
        "streamer_build_info", "Version, host and run.", labels=("version", "host", "run_id")
    )
    family.add_metric((look.agent, look.host, look.run_id), 1)
    return family


def _events(look: Look) -> Iterator[Metric]:
    counts = look.counts.items()
    yield _counter(
        "produced_events",
        "Events that happened: filtered + shed + lost + read + in flight.",
        [((kind,), one.produced) for kind, one in counts],
        "kind",
    )
    yield _counter(
        "events",
        "What became of them on the way to the agent.",
        [((kind, what), getattr(one, what)) for kind, one in counts for what in OUTCOMES],
        "kind",
        "outcome",
    )
    yield _counter(
        "lost_events",
        "Events that were found lost, by place and kind; an empty kind is not known.",
        _losses(look).items(),
        "stage",
        "sink",
        "kind",
    )


def _losses(look: Look) -> dict[tuple[str, ...], int]:
    """By stage, sink and kind, with a 0 where nothing was lost yet.

    What begins with a 1 has not increased, as Prometheus sees it.
    """
    kinds = ("", *look.coverage)
    found: dict[tuple[str, ...], int] = dict.fromkeys(
        (
            *((stage, "", kind) for stage in ("kernel", "decode", "stop") for kind in kinds),
            *(("sink", sink, kind) for sink in look.sinks for kind in look.coverage),
        ),
        0,
    )
    return found | {(one.stage, one.sink, one.kind): one.count for one in look.losses}


def _rings(look: Look) -> Iterator[Metric]:
    rings = look.rings.items()
    label = "ring"
    yield _gauge(
        "ring_size_bytes", "Size.", [((ring,), one.size_bytes) for ring, one in rings], label
    )
    yield _gauge(
        "ring_used_bytes",
        "What is in it and was not read yet.",
        [((ring,), one.used_bytes) for ring, one in rings],
        label,
    )
    yield _counter(
        "ring_read_bytes",
        "Bytes that were read from it.",
        [((ring,), one.read_bytes) for ring, one in rings],
        label,
    )
    numbers = [((one.ring, str(one.cpu)), one) for one in look.marks]
    yield _counter(
        "ring_sequence",
        "Last sequence number that was taken in the kernel.",
        [(place, mark.seq) for place, mark in numbers],
        "ring",
        "cpu",
    )
    yield _counter(
        "ring_sequence_read",
        "Last sequence number that the reader has passed.",
        [(place, mark.read) for place, mark in numbers],
        "ring",
        "cpu",
    )
    yield _gauge("reading_paused", "1 while a full sink keeps rings unread.", [((), look.paused)])
    for name in ("unknown_kind", "short_record", "invalid_utf8", "truncated", "incomplete"):
        yield _counter(
            f"reader_{name}_records",
            "As `reader` in stream.heartbeat.",
            [((), getattr(look.reader, name))],
        )
    yield _counter(
        "reader_pauses", "Times that a full sink stopped the reading.", [((), look.reader.pauses)]
    )


def _sinks(look: Look) -> Iterator[Metric]:
    sinks = look.sinks.items()
    for what in ("received", "delivered", "dropped"):
        yield _counter(
            f"sink_{what}_events",
            f"Events that a sink has {what}.",
            [
                ((sink, kind), getattr(one, what).get(kind, 0))
                for sink, one in sinks
                for kind in one.received
            ],
            "sink",
            "kind",
        )
    yield _counter(
        "sink_delivered_bytes",
        "Bytes of encoded events that were delivered.",
        [((sink,), one.delivered_bytes) for sink, one in sinks],
        "sink",
    )
    for what, name, text in (
        ("pending", "pending_events", "Events that are neither delivered nor dropped."),
        ("held_bytes", "held_bytes", "Bytes held for it."),
        ("budget_bytes", "budget_bytes", "From how many held bytes on it is full."),
        ("lag_seconds", "lag_seconds", "How long a batch has been under way."),
        ("spooled", "spooled_events", "Pending events that wait on disk."),
        ("spool_filled", "spool_filled_ratio", "Share of its spool that is used."),
    ):
        values = [((sink,), getattr(one, what)) for sink, one in sinks]
        yield _gauge(f"sink_{name}", text, values, "sink")
    statuses: dict[tuple[str, ...], str] = {(sink,): one.status for sink, one in sinks}
    yield _states(
        "streamer_sink_status", "Status.", "status", statuses, ("sink",), _STATUSES["sink"]
    )
    latency = HistogramMetricFamily(
        "streamer_sink_latency_seconds", "How long batches were under way.", labels=("sink",)
    )
    for sink, one in sinks:
        latency.add_metric((sink,), buckets(one.latency), one.latency.sum_seconds)
    yield latency


def buckets(latency: Latency) -> list[tuple[str, float]]:
    """Upper bounds with how many samples are not above them, as Prometheus wants them."""
    found: list[tuple[str, float]] = []
    total = 0
    names = [*map(repr, latency.bounds), "+Inf"]
    for name, count in zip(names, latency.counts, strict=True):
        total += count
        found.append((name, total))
    return found


def _shedding(look: Look) -> Iterator[Metric]:
    shedding = look.shedding
    yield _gauge(
        "pressure_level",
        "Level of pressure, from 0 to 3: from 1 on events are shed.",
        [((), shedding.level)],
    )
    yield _gauge(
        "shedding_rate",
        "One in how many events is reported now, of the kinds that may be shed.",
        [((kind,), rate) for kind, rate in shedding.rates.items()],
        "kind",
    )


def _kernel(look: Look) -> Iterator[Metric]:
    yield _counter(
        "faults",
        "What went wrong in the kernel apart from numbered losses.",
        [((name,), count) for name, count in look.faults.items()],
        "fault",
    )
    yield _counter(
        "skipped_runs",
        "Runs of programs that the kernel left out.",
        [((name,), count) for name, count in look.missed.items()],
        "program",
    )
    tables = look.tables.items()
    yield _gauge(
        "table_used", "Entries in use.", [((name,), one.used) for name, one in tables], "table"
    )
    yield _gauge(
        "table_size", "Entries at most.", [((name,), one.size) for name, one in tables], "table"
    )
    kinds: dict[tuple[str, ...], str] = {(k,): one.status for k, one in look.coverage.items()}
    yield _states(
        "streamer_coverage",
        "How far a kind is observed.",
        "status",
        kinds,
        ("kind",),
        _STATUSES["kind"],
    )
    programs: dict[tuple[str, ...], str] = {
        (one.name, one.sensor, one.hook, one.way): one.status for one in look.programs
    }
    yield _states(
        "streamer_program_status",
        "What became of a program.",
        "status",
        programs,
        ("program", "sensor", "hook", "way"),
        _STATUSES["program"],
    )


Samples = Iterable[tuple[tuple[str, ...], float]]


def _gauge(name: str, text: str, samples: Samples, *labels: str) -> Metric:
    family = GaugeMetricFamily(f"streamer_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, samples: Samples, *labels: str) -> Metric:
    family = CounterMetricFamily(f"streamer_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _states(
    name: str,
    text: str,
    label: str,
    found: Mapping[tuple[str, ...], str],
    labels: tuple[str, ...],
    states: tuple[str, ...],
) -> Metric:
    """A series for each state, which is 1 for the one that it is in."""
    family = GaugeMetricFamily(name, text, labels=(*labels, label))
    for values, current in found.items():
        for state in states:
            family.add_metric((*values, state), state == current)
    return family
