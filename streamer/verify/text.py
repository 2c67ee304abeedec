"""What `streamer verify` prints for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from streamer.events.clock import rfc3339
from streamer.terminal.lines import printable
from streamer.verify.holes import DELETED
from streamer.verify.report import Deleted, Place, Run, ShedPeriod, Span, VerifyReport

MOST_GAPS = 10
"""Ranges of unexplained numbers that are shown for each ring and CPU; the JSON has a hundred."""

_ENDS = {
    "ended": "ended with its account",
    "left": "goes on without this sink",
    "undelivered": "ended, and could not deliver all",
    "killed": "was killed",
    "open": "no end",
}


def progress_text(records: int, size: int, seconds: float) -> str:
    """How far it has come, in one line."""
    return f"{records:,} records, {size / 1e6:,.1f} MB, {records / max(seconds, 1e-9):,.0f}/s"


def report_text(report: VerifyReport) -> str:
    """The report for people: each host, run, ring and CPU, and at the end what it comes to."""
    return "\n".join(_lines(report))


def _lines(report: VerifyReport) -> Iterator[str]:
    yield f"{', '.join(map(printable, report.sources))}: {report.records:,} records"
    for bad in report.malformed_first:
        yield f"  malformed: {printable(bad.where)}: {printable(bad.reason)}"
    for one in report.deleted[:MOST_GAPS]:
        yield f"  deleted by the broker before they were read: {_deleted(one)}"
    if len(report.deleted) > MOST_GAPS:
        yield f"  so it is of {len(report.deleted) - MOST_GAPS:,} more partitions"
    for name, host in report.hosts.items():
        restarts = _counted(host.restarts, "restart")
        yield f"{printable(name)}: {_counted(len(host.runs), 'run')}, {restarts}"
        for run in host.runs:
            yield from _run(run)
    yield _verdict(report)


def _run(run: Run) -> Iterator[str]:
    begin = "from its beginning" if run.whole else "its beginning is not there"
    agent = f", streamer {printable(run.agent)}" if run.agent else ""
    yield f"  run {printable(run.run_id)}{agent}: {begin}; {_ENDS[run.end]}"
    yield f"    {_moment(run.first_ns)} to {_moment(run.last_ns)}"
    beats = _counted(run.heartbeats, "heartbeat")
    counts = f"{run.events:,} events, {run.duplicates:,} duplicates, {beats}"
    yield f"    {counts}{_shed(run)}"
    for place in run.places:
        yield from _place(place)
    for step in run.clock_steps:
        yield f"    the clock was set by {step.step_ns / 1e9:+,.3f} s to {_moment(step.time_ns)}"
    yield from map(_shed_period, run.shed_periods[:MOST_GAPS])
    if run.shed_periods_total > MOST_GAPS:
        yield f"    shed under pressure {run.shed_periods_total - MOST_GAPS:,} times more"
    for problem in run.problems:
        yield f"    WRONG: {printable(problem)}"


def _shed(run: Run) -> str:
    totals = {
        name: sum(getattr(one, name) for one in run.kinds.values()) for name in ("filtered", "shed")
    }
    return "".join(f", {count:,} {name}" for name, count in totals.items() if count)


def _shed_period(period: ShedPeriod) -> str:
    kinds = ", ".join(f"{count:,} {printable(kind)}" for kind, count in period.kinds.items())
    end = _moment(period.to_ns) if period.to_ns else "no end"
    why = f", because {printable(period.reason)}" if period.reason else ""
    said = f"shed under pressure (up to level {period.level}{why})"
    return f"    {said}, {_moment(period.from_ns)} to {end}: {kinds or 'nothing left out'}"


def _place(place: Place) -> Iterator[str]:
    said = [f"{place.events:,} events of {place.first:,} to {place.last:,}"]
    said += _explained("lost", place.explained)
    for name in ("duplicates", "pending", "unexplained", "out_of_order", "late"):
        if count := getattr(place, name):
            said.append(f"{count:,} {name.replace('_', ' ')}")
    if place.given_up_but_there:
        said.append(f"{place.given_up_but_there:,} given up, and there")
    if place.watermark_ns:
        said.append(f"watermark {place.watermark_ns}")
    yield f"    {printable(place.ring)} cpu {place.cpu}: {'; '.join(said)}"
    for gap in place.gaps[:MOST_GAPS]:
        yield f"      unexplained: {_span(gap)}"
    if len(place.gaps) > MOST_GAPS:
        yield f"      unexplained: {len(place.gaps) - MOST_GAPS} more ranges"


def _span(gap: Span) -> str:
    if gap.seq_from == gap.seq_to:
        return f"{gap.seq_from:,}"
    return f"{gap.seq_from:,} to {gap.seq_to:,}: {gap.count:,}"


def _verdict(report: VerifyReport) -> str:
    said = [f"{report.events:,} events", f"{report.duplicates:,} duplicates"]
    said += _explained("lost and told:", report.explained)
    if report.pending:
        said.append(f"{report.pending:,} too recent to say")
    if report.malformed:
        said.append(f"{report.malformed:,} malformed")
    if not report.complete:
        said.append("not read to the end")
    said.append(f"{report.unexplained:,} unexplained")
    if report.malformed and not report.hosts:
        end = "THIS IS NO STREAM OF EVENTS"
    elif not report.ok:
        end = "NOT ALL IS EXPLAINED"
    else:
        end = "all that was read is explained" if report.deleted else "all is explained"
    return f"{'; '.join(said)}: {end}"


def _explained(how: str, counts: Mapping[str, int]) -> Iterator[str]:
    if lost := {stage: count for stage, count in counts.items() if stage != DELETED}:
        yield f"{how} {_stages(lost)}"
    if gone := counts.get(DELETED):
        yield f"{gone:,} cannot be verified, as the broker deleted records"


def _deleted(one: Deleted) -> str:
    return f"{_counted(one.offsets, 'offset')} of {printable(one.where)}"


def _stages(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{printable(stage)} {count:,}" for stage, count in counts.items())


def _moment(time_ns: int) -> str:
    try:
        return rfc3339(time_ns)
    except (ValueError, OverflowError):
        return str(time_ns)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
