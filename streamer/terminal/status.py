"""What `streamer status` prints of a look at a running agent, and its exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from streamer.operation.look import Latency, Look, SheddingLook, SinkLook
from streamer.terminal.lines import duration, printable, rate, size
from streamer.terminal.tables import table

NOT_READY = 1
"""Exit code of `status` when the agent answers and is not ready."""


def status_code(look: Look) -> int:
    """0 when it is ready, as /readyz says, else 1."""
    return NOT_READY if look.not_ready else 0


def status_text(look: Look) -> str:
    """The look for people. Nothing in it is acted upon by a terminal."""
    sections = [
        "\n".join(_head(look)),
        table(
            ["kind", "a second", "produced", "filtered", "shed", "lost", "observed"], _kinds(look)
        ),
        table(["kind", "attached to"], _ways(look)),
        table(["ring", "full", "size", "read", "unread"], _rings(look)),
        "\n".join(_sinks(look)),
        "\n".join(_rest(look)),
    ]
    return "\n\n".join(filter(None, sections))


def _head(look: Look) -> Iterator[str]:
    up = duration(round(look.uptime_seconds * 1e9))
    yield printable(
        f"streamer {look.agent} on {look.host}: {look.phase}, up {up}, pid {look.pid}, "
        f"run {look.run_id}"
    )
    yield "ready" if not look.not_ready else f"not ready: {printable('; '.join(look.not_ready))}"
    lost = sum(one.count for one in look.losses)
    read = sum(look.rates.values())
    paused = "; reading is paused" if look.paused else ""
    yield f"{rate(read)} events a second, {lost:,} lost since the start{paused}"
    if look.shedding.level:
        yield printable(shedding_text(look.shedding))


def shedding_text(shedding: SheddingLook) -> str:
    """What is shed, and why."""
    rates = ", ".join(f"{kind} 1 in {n:,}" for kind, n in shedding.rates.items() if n > 1)
    return f"shedding, level {shedding.level}, because {shedding.reason}: {rates}"


def _kinds(look: Look) -> list[list[str]]:
    rows = []
    for kind in sorted(look.coverage.keys() | look.counts.keys()):
        counts = look.counts.get(kind)
        numbers = (
            (counts.produced, counts.filtered, counts.shed, counts.lost) if counts else (0,) * 4
        )
        coverage = look.coverage.get(kind)
        said: str = coverage.status if coverage else ""
        if coverage and coverage.reason:
            said += f": {coverage.reason}"
        events = rate(look.rates.get(kind, 0.0))
        rows.append([kind, events, *(f"{number:,}" for number in numbers), printable(said)])
    return rows


def _ways(look: Look) -> list[list[str]]:
    ways: dict[str, dict[str, None]] = {kind: {} for kind in sorted(look.coverage)}
    for program in look.programs:
        for kind in program.kinds if program.status == "attached" else ():
            if kind in ways:
                ways[kind][program.way] = None
    return [[kind, printable(", ".join(found)) or "nothing"] for kind, found in ways.items()]


def _rings(look: Look) -> list[list[str]]:
    unread = Counter[str]()
    for mark in look.marks:
        unread[mark.ring] += max(mark.seq - mark.read, 0)
    return [
        [
            name,
            f"{one.used_bytes / one.size_bytes:.0%}" if one.size_bytes else "",
            size(one.size_bytes),
            size(one.read_bytes),
            f"{unread[name]:,}",
        ]
        for name, one in look.rings.items()
    ]


def _sinks(look: Look) -> Iterator[str]:
    for name, one in look.sinks.items():
        yield f"{printable(name)} is {one.status}: {_numbers(one)}"


def _numbers(one: SinkLook) -> str:
    delivered, dropped = sum(one.delivered.values()), sum(one.dropped.values())
    parts = [f"{delivered:,} delivered, {dropped:,} dropped, {one.pending:,} pending"]
    if one.spooled or one.spool_filled:
        parts.append(f"{one.spooled:,} on disk, spool {one.spool_filled:.0%} full")
    parts.append(f"{one.held_bytes / one.budget_bytes:.0%} of its budget held")
    parts.append(f"lag {duration(round(one.lag_seconds * 1e9))}")
    if sum(one.latency.counts):
        shares = [f"{share:.0%} within {within(one.latency, share)}" for share in (0.5, 0.99)]
        parts.append(", ".join(shares))
    return "; ".join(parts)


def within(latency: Latency, share: float) -> str:
    """The bound that so large a share of the samples is not above."""
    wanted, found = share * sum(latency.counts), 0
    for bound, count in zip(latency.bounds, latency.counts, strict=False):
        found += count
        if found >= wanted:
            return duration(round(bound * 1e9))
    return f"more than {duration(round(latency.bounds[-1] * 1e9))}"


def _rest(look: Look) -> Iterator[str]:
    for one in look.losses:
        where = one.sink or {
            "kernel": "the kernel",
            "decode": "the decoder",
            "stop": "the rings",
        }.get(one.stage, one.stage)
        yield f"lost in {printable(where)}: {one.count:,} {one.kind or 'of unknown kind'}"
    yield from _counted("fault in the kernel", look.faults.items())
    yield from _counted("not run", look.missed.items())
    for name, table_ in look.tables.items():
        yield f"table {name}: {table_.used:,} of {table_.size:,}"
    attached = {(one.sensor, one.hook) for one in look.programs if one.status == "attached"}
    for program in look.programs:
        if program.status == "failed" and (program.sensor, program.hook) not in attached:
            text = f"{program.name} of {program.sensor} is not attached: {program.reason}"
            yield printable(text)


def _counted(what: str, counts: Iterable[tuple[str, int]]) -> Iterator[str]:
    yield from (f"{what}: {printable(name)} {count:,} times" for name, count in counts)
