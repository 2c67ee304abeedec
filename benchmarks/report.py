"""The tables: for the terminal, and for docs/benchmarks.md."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec

from benchmarks.host import HostCost, Spread
from benchmarks.kernel import Cost
from benchmarks.measure import Result
from benchmarks.pipe_reader import Latencies
from benchmarks.runs import Machine
from tests.brokers import kafka_class_path

Row = tuple[str, ...]


class PathRow(msgspec.Struct, frozen=True):
    """One path through the streamer, beside its alternatives. `target` is events/s per core."""

    name: str
    load: str
    target: float
    streamer: Result
    plain: Result | None
    limit: Result | None
    limit_name: str = ""


class FarRow(msgspec.Struct, frozen=True):
    """Kafka at the end of a long way. `target` is events/s by the clock."""

    round_trip_ms: int
    target: float
    result: Result


class Measured(msgspec.Struct):
    """All that a run has measured; what was left out is None or empty."""

    paths: list[PathRow] = []
    far: list[FarRow] = []
    emission: list[Cost] = []
    observed: tuple[float, float] | None = None
    idle: Result | None = None
    latencies: dict[str, Latencies] = {}
    host: HostCost | None = None


def per_second(events: float) -> str:
    """Events per second, in millions or thousands."""
    return f"{events / 1e6:.2f} M/s" if events >= 1e6 else f"{events / 1e3:.0f} k/s"


def paths_table(paths: Sequence[PathRow]) -> list[Row]:
    """The streamer beside the plain alternative and the limit."""
    rows: list[Row] = [
        ("ring →", "events", "per core", "ns", "target", "plain", "ns", "ratio", "limit in C", "ns")
    ]
    for path in paths:
        plain, limit = path.plain, path.limit
        rows.append(
            (
                path.name,
                path.load,
                per_second(path.streamer.per_second),
                f"{path.streamer.ns_per_event:,.0f}",
                per_second(path.target) if path.target else "",
                per_second(plain.per_second) if plain else "",
                f"{plain.ns_per_event:,.0f}" if plain else "",
                f"{plain.ns_per_event / path.streamer.ns_per_event:.1f}x" if plain else "",
                f"{path.limit_name} {per_second(limit.per_second)}" if limit else "",
                f"{limit.ns_per_event:,.0f}" if limit else "",
            )
        )
    return rows


def far_table(rows: Sequence[FarRow]) -> list[Row]:
    """What a Kafka takes that is some round trip away."""
    found: list[Row] = [
        ("round trip to Kafka", "events/s", "target", "CPU of a core", "resident, most")
    ]
    for row in rows:
        result = row.result
        found.append(
            (
                f"{row.round_trip_ms} ms",
                per_second(result.events / result.wall_seconds),
                f"≥ {per_second(row.target)}" if row.target else "",
                f"{result.cpu_seconds / result.wall_seconds:.0%}",
                mebibytes(result.peak_bytes),
            )
        )
    return found


def kernel_table(measured: Measured) -> list[Row]:
    """The costs in the kernel."""
    rows: list[Row] = [("in the kernel", "ns")]
    rows += [(cost.what, f"{cost.ns:,.0f}") for cost in measured.emission]
    if measured.observed is not None:
        alone, watched = measured.observed
        rows.append(("open() and close() of a program, unobserved", f"{alone:,.0f}"))
        rows.append(("the same, with file.open observed", f"{watched:,.0f}"))
    return rows


def service_table(measured: Measured) -> list[Row]:
    """Memory, idle CPU and latency."""
    rows: list[Row] = [("the process", "measured", "target")]
    if measured.idle is not None:
        share = measured.idle.cpu_seconds / measured.idle.wall_seconds
        rows.append(("CPU with nothing to do", f"{share:.2%}", "< 1%"))
        rows.append(("resident, idle", mebibytes(measured.idle.resident_bytes), "< 150 MB"))
    if measured.paths:
        name, peak = max(
            ((path.name, path.streamer.peak_bytes) for path in measured.paths),
            key=lambda pair: pair[1],
        )
        rows.append((f"resident, most of all runs (→ {name})", mebibytes(peak), "< 150 MB"))
    for when, ages in measured.latencies.items():
        rows.append((f"event to pipe, {when}: p50", f"{ages.p50:.1f} ms", ""))
        rows.append((f"event to pipe, {when}: p99", f"{ages.p99:.1f} ms", "< 20 ms"))
    return rows


def host_table(cost: HostCost | None) -> list[Row]:
    """What a host pays for an operation, and where it is spent."""
    rows: list[Row] = [
        ("what a host pays, CPU per", "observed by", "µs", "half of all between",
         "the caller", "the observer", "kernel threads", "target"),
    ]  # fmt: skip
    for row in cost.operations if cost else ():
        sign = "+" if row.observer else ""
        rows.append(
            (
                row.operation,
                row.observer or "nothing",
                *spread(row.total, sign, 1000),
                *(f"{part / 1000:{sign},.2f}" for part in row.parts),
                f"≤ +{row.target / 1000:.1f}" if row.target else "",
            )
        )
    for name, reason in cost.reasons.items() if cost else ():
        rows.append((f"{name} is left out: {reason}", *[""] * 7))
    return rows


def unrelated_table(cost: HostCost | None) -> list[Row]:
    """What a system call pays that nobody observes."""
    rows: list[Row] = [("a system call that nobody observes", "ns", "half of all between")]
    for row in cost.unrelated if cost else ():
        sign = "+" if row.observer else ""
        rows.append((f"getppid(), {row.observer or 'nothing'}", *spread(row.ns, sign, 1)))
    return rows


def spread(found: Spread, sign: str, unit: int) -> tuple[str, str]:
    """The median, and the quartiles, in units of so many ns."""
    middle, low, high = (f"{value / unit:{sign},.{2 if unit > 1 else 1}f}" for value in found)
    return middle, f"{low} to {high}"


def mebibytes(size: int) -> str:
    """A size, the mappings of the rings included."""
    return f"{size / 1e6:.0f} MB"


def as_text(rows: Sequence[Row]) -> str:
    """Aligned columns, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_markdown(rows: Sequence[Row]) -> str:
    """The same as a table in Markdown."""
    head, *rest = rows
    rule = ("---", *("---:" for _ in head[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rest))


def tables(measured: Measured) -> list[list[Row]]:
    """All tables that have something to say."""
    found = [
        paths_table(measured.paths),
        far_table(measured.far),
        kernel_table(measured),
        service_table(measured),
        host_table(measured.host),
        unrelated_table(measured.host),
    ]
    return [table for table in found if len(table) > 1]


def machine_lines(machine: Machine, measured: Measured) -> list[str]:
    """Where and with what this was measured."""
    kernel = platform.uname()
    packages = ("msgspec", "uvloop", "aiokafka", "aiomqtt", "cramjam", "isal")
    return [
        f"- {time.strftime('%Y-%m-%d')}",
        f"- {cpu_model()}, {len(machine.others) + 1} CPUs used: the measured process on one, "
        "generator and brokers on the rest",
        f"- Linux {kernel.release} {kernel.machine}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages),
        f"- Apache Kafka {kafka_version()}; {version_line('mosquitto', '-h')}; "
        f"kcat {version_line('kcat', '-V')}; {version_line('clang', '--version')}",
        *observer_versions(measured.host),
    ]


def observer_versions(cost: HostCost | None) -> list[str]:
    """Those of what the streamer was compared with."""
    commands = {"bpftrace": ("bpftrace", "--version"), "auditd": ("auditctl", "-v")}
    ran = {row.observer for row in cost.unrelated} if cost else set()
    told = [
        subprocess.run(command, capture_output=True, text=True).stdout.strip()
        for name, command in commands.items()
        if name in ran
    ]
    return ["- " + "; ".join(told)] if told else []


def cpu_model() -> str:
    """What the kernel calls the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "CPU implementer"):
            return value.strip()
    return platform.machine()


def version_line(*command: str) -> str:
    """The line in which a tool says its version."""
    told = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    found = next((line.strip() for line in told if "version" in line.lower()), command[0])
    return found.partition(" builtin.features")[0]


def kafka_version() -> str:
    """The version of the Kafka that ran, from the name of its archive."""
    archives = Path(kafka_class_path()).parent.glob("kafka_2.13-*.jar")
    return min(archive.stem.removeprefix("kafka_2.13-") for archive in archives)


def document(measured: Measured, machine: Machine, command: str) -> str:
    """docs/benchmarks.md."""
    body = "\n\n".join(as_markdown(table) for table in tables(measured))
    lines = "\n".join(machine_lines(machine, measured))
    return _DOCUMENT.format(machine=lines, command=command, tables=body)


_DOCUMENT = """\
# Benchmarks

Written by `make bench ARGS=--write`; what is measured, and how, is below the tables.

{machine}
- `{command}`

{tables}

## What the numbers are

**Events per second per core** are events divided by the CPU time of the measured process, user and
system, all its threads. The process is pinned to one CPU; the generator and the brokers have the
others, so that neither a slow broker nor a waiting process counts, and nothing that the process
does is left out. Each number is the median of several runs, in which the streamer and its
alternatives take turns. A run in which an event was lost, or not delivered, is an error and gives
no number: produced, lost and delivered are compared, and for Kafka the broker is asked how many
records the topic has.

**The load** is a BPF program (`bpf/bench.bpf.c`) that fills the service's own rings, of the default
sizes, through the helpers that the hooks use: `file.open` with 64 different paths of 17 to 54
bytes, and `net.close`, from 16 processes; `mixed` is one of each in turn. No system call is in the
way. It runs in bursts of 4,096 events, when less than half of the ring is unread.

**The streamer** is the code that runs in production. Decoded is `RingReader` alone, with the events
counted and let go. The others are a whole `Service` with one sink in its default settings: NDJSON
into `/dev/null`; Kafka with acks=all, idempotent, keyed, one record per event, gzip; MQTT v5 at
QoS 1. An event counts when the sink says that it was delivered, for the brokers when they have
acknowledged it. Kafka is Apache Kafka, one node; both brokers are plain processes on loopback.

**Plain** (`benchmarks/plain.py`) is what one writes first: libbpf calls a Python function for each
record, which unpacks it with one precompiled `struct` into a dict of the same fields, msgspec
encodes it, and each event is sent by itself: aiokafka `send()`, with the same guarantees, codec,
batch size and linger, or aiomqtt `publish()` at QoS 1.

**Limit in C** is, for the ring, libbpf's own consumer counting records and bytes
(`benchmarks/consumer.c`); for Kafka, librdkafka (kcat) sending lines that are encoded already,
with the same guarantees, codec and batch size: it neither reads a ring nor encodes.

**A round trip** is made by a proxy (`benchmarks/delay.py`, a process of its own) before the broker,
which passes on everything half of it later, in both directions. What counts is the time by the
clock from the first event to the last acknowledgement, in the default settings: requests are under
way one behind the other, and grow with the backlog. Generator, proxy and broker share the CPUs
that the measured process leaves, and bound it as well.

**In the kernel** is the best of several runs of 8,192 events, the empty loop taken off. The first
lines are the price of a record with the identity of its task; the hook of `openat()` does all that
it does at a real call, the walk up the path included. Ring and perf buffers
([20](adr/0020-perf-buffers.md)) take turns in one run. What an observed program pays is measured
on a program that opens and closes a file, with the hooks attached and without. What timing system
calls costs is measured on a program that makes `getppid()`, in the fastest of twenty parts: timed,
beside another call that is, and the same with a histogram of bpftrace (`benchmarks/syscalls.py`).

**Event to pipe** is the age of an event, from the time in its record to the return of the `read()`
that brings it to whoever reads the streamer's standard output. Idle means single events at random
times. Resident memory counts the pages of the rings, once for each of the two mappings.

**What a host pays** is measured on a program that runs another one, opens files, or connects to
itself over loopback (four events: connect, accept, two closes), thousands of times in a row, on one
CPU; who observes it has the others, and writes to a file in memory. Each turn of an observer comes
right after one with nothing, and the table has the median of the differences, and the two values
between which half of them lie. The parts have medians of their own, so they need not add up.

The CPU time is what the scheduler has counted, to the nanosecond: for the cgroup of the program
(*the caller*, with the BPF programs and audit rules that run in its system calls), for that of all
processes of the observer, and for all threads of the kernel, which is where audit queues its
records. What else runs on the machine is not in it, nor are interrupts that find a CPU idle. The
program has a real-time priority, so that others cannot slow it down, but they take its caches; and
where others trace system calls, nothing is not nothing: measure on a quiet machine.

All record who (pid, parent, user, command) and what: arguments, path and result, or addresses. The
streamer and bpftrace (`benchmarks/host.bt`, tracepoints) record all four events of a connection,
auditd connect and accept alone. The streamer also says where it was, resolves the path, and
accounts for losses. auditd has Debian's configuration, which resolves names (`ENRICHED`), and one
rule. A turn in which records are missing gives no number; of bpftrace's one in a hundred may, since
to it a state that changes late in a softirq is another user's. With the default events, exec is
recorded together with the fork before and the exit after it.

**A system call that nobody observes** is `getppid()`, in the fastest of twenty parts of each turn.
What the streamer takes from it is the price of tracepoints of system calls: once one of them is in
use, every call of every process takes the slow way through the kernel. It uses them for results
of `connect()`, `accept()`, `bind()`, `listen()` and opens, where programs at functions do not
load, as on the kernel of this table (`streamer check`: rung 2 of 2). Stock kernels take them, and
then nothing pays but the observed call ([10](adr/0010-several-ways-to-a-hook.md)).
Nothing and all others but auditd are measured on tasks that audit exempts: once enabled, it makes
every new task slower until the next boot, even when it is disabled again. For that reason the
benchmark leaves the rule `task,never` behind where audit was off; `auditctl -d task,never` removes
it.
"""
