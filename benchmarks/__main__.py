"""The benchmarks: `python -m benchmarks [--quick] [--write] [--only PATH,…]`, as root.

Prints the streamer beside the plain alternative and the limit in C, all in one run, what an event
costs in the kernel, memory, idle CPU and latency, and what a host pays beside bpftrace and auditd.
With `--write`, docs/benchmarks.md too.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks import flows, host, kernel, net, report, runs, syscalls, xdp
from benchmarks.load import Load, Mix
from benchmarks.measure import Result
from benchmarks.report import FarRow, Measured, PathRow
from benchmarks.runs import Brokers, Machine, Who, show
from tests.brokers import KafkaBroker, MosquittoBroker, free_port

DOCUMENT = runs.ROOT / "docs" / "benchmarks.md"


class Plan(NamedTuple):
    """A row of the table: the path, its load, events per run, events of the plain alternative."""

    path: str
    name: str
    mix: Mix
    target: float
    events: int
    plain_events: int = 0
    limit: str = ""


PLANS = (
    Plan("decoded", "Structs", "mixed", 2.5e6, 2_000_000, 200_000, "libbpf"),
    Plan("decoded", "Structs", "open", 0, 2_000_000),
    Plan("decoded", "Structs", "close", 0, 2_000_000),
    Plan("ndjson", "NDJSON", "mixed", 2e6, 2_000_000, 200_000),
    Plan("kafka", "Kafka", "mixed", 1.2e6, 1_000_000, 200_000, "librdkafka"),
    Plan("mqtt", "MQTT", "mixed", 5e5, 1_000_000, 10_000),
)
FAR = {0: 0.0, 10: 5e5, 30: 2e5}
"""Round trips to Kafka through a proxy, in ms, and the events/s to reach."""

SECTIONS = (*dict.fromkeys(plan.path for plan in PLANS), "far", "kernel", "process", "host")


def measure_path(plan: Plan, rounds: int, scale: float, machine: Machine, at: Brokers) -> PathRow:
    """The streamer and its alternatives in turn, so that all meet the same machine."""
    found: dict[str, list[Result]] = {}
    for number in range(rounds):
        for who, run in contenders(plan, scale, machine, at):
            show(f"{plan.name}, {plan.mix}: {who} {number + 1}/{rounds}")
            found.setdefault(who, []).append(run())
    middle = {who: runs.median_result(results) for who, results in found.items()}
    return PathRow(
        plan.name, plan.mix, plan.target, middle["streamer"],
        middle.get("plain"), middle.get(plan.limit), plan.limit,
    )  # fmt: skip


def contenders(
    plan: Plan, scale: float, machine: Machine, at: Brokers
) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Who runs, and how."""
    many, few = max(int(plan.events * scale), 1000), max(int(plan.plain_events * scale), 1000)

    def through(who: Who, events: int) -> Callable[[], Result]:
        return partial(runs.delivery, who, plan.path, plan.mix, events, machine, at)

    yield "streamer", through("streamer", many)
    if plan.plain_events:
        yield "plain", through("plain", few)
    if plan.limit == "libbpf":
        yield plan.limit, through("C", many)
    if plan.limit == "librdkafka":
        yield plan.limit, partial(runs.librdkafka, few, machine, at)


def measure_far(rounds: int, scale: float, machine: Machine, at: Brokers) -> list[FarRow]:
    """A Kafka at some distance: what arrives in a second, in the default settings."""
    found: dict[int, list[Result]] = {milliseconds: [] for milliseconds in FAR}
    events = max(int(1_500_000 * scale), 1000)
    for number in range(rounds):
        for milliseconds, results in found.items():
            show(f"Kafka, {milliseconds} ms away: {number + 1}/{rounds}")
            there = at._replace(kafka=at.far[milliseconds])
            results.append(runs.delivery("streamer", "kafka", "mixed", events, machine, there))
    return [
        FarRow(milliseconds, FAR[milliseconds], runs.median_result(results))
        for milliseconds, results in found.items()
    ]


def measure_process(measured: Measured, seconds: float, machine: Machine) -> None:
    """Memory, idle CPU and latency."""
    show("a service with nothing to do")
    measured.idle = runs.idle(seconds, machine)
    for when, emit in (
        ("idle", partial(runs.one_by_one, seconds=seconds)),
        ("100,000/s", partial(paced, per_second=100_000, seconds=seconds)),
    ):
        show(f"latency, {when}")
        measured.latencies[when] = runs.latency(emit, seconds + 2, machine)


def paced(load: Load, per_second: int, seconds: float) -> None:
    """A steady rate."""
    load.emit_paced("mixed", per_second, seconds)


def measure(only: frozenset[str], quick: bool, machine: Machine) -> Measured:
    """All that was asked for."""
    os.sched_setaffinity(0, machine.others)  # inherited by the brokers
    rounds, scale = (1, 0.1) if quick else (3, 1.0)
    measured = Measured()
    plans = [plan for plan in PLANS if plan.path in only]
    with ExitStack() as stack:
        at = start_brokers(stack, only)
        for plan in plans:
            measured.paths.append(measure_path(plan, rounds, scale, machine, at))
        if "far" in only:
            measured.far = measure_far(rounds, scale, machine, at)
    if "kernel" in only:
        show("emission in the kernel")
        measured.emission = kernel.emission(10 if quick else 40)
        measured.emission += kernel.transports(10 if quick else 40)
        measured.emission += kernel.contention(10 if quick else 40)
        measured.emission += xdp.packets(3 if quick else 10)
        measured.emission += flows.packets(3 if quick else 10)
        measured.emission += syscalls.taxes(2 if quick else 5)
        measured.emission += net.costs(1 if quick else 5)
        measured.emission += kernel.samples(2 if quick else 10)
        measured.observed = kernel.observed(3 if quick else 9)
    if "process" in only:
        measure_process(measured, 3 if quick else 8, machine)
    if "host" in only:  # the last: audit, once enabled, leaves its mark on the kernel
        measured.host = host.measure(1 if quick else 11, scale, machine)
    return measured


def start_brokers(stack: ExitStack, only: frozenset[str]) -> Brokers:
    """Those that are needed, until the stack ends."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    kafka, port, far = "", 0, dict[int, str]()
    if only & {"kafka", "far"}:
        show("starting Kafka")
        broker, far = far_broker(directory / "kafka", stack)
        kafka = stack.enter_context(broker).address
    if "mqtt" in only:
        show("starting Mosquitto")
        port = stack.enter_context(MosquittoBroker(directory / "mosquitto")).port
    return Brokers(kafka, port, directory, far)


def far_broker(directory: Path, stack: ExitStack) -> tuple[KafkaBroker, dict[int, str]]:
    """A Kafka, not started, with a listener for each distance, which a proxy stands before."""
    listeners = {f"FAR{milliseconds}": "PLAINTEXT" for milliseconds in FAR}
    broker = KafkaBroker(directory, listeners=listeners)
    far, advertised = {}, [f"PLAINTEXT://{broker.address}"]
    for milliseconds in FAR:
        name, port = f"FAR{milliseconds}", free_port()
        stack.enter_context(runs.delaying_proxy(port, broker.addresses[name], milliseconds))
        far[milliseconds] = f"127.0.0.1:{port}"
        advertised.append(f"{name}://{far[milliseconds]}")
    broker.config = (f"advertised.listeners={','.join(advertised)}",)
    return broker, far


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few events, one round: a check")
    parser.add_argument("--write", action="store_true", help="rewrite docs/benchmarks.md")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    return parser.parse_args()


def main() -> int:
    """Measure and print; 2 for an unknown section, 3 without root."""
    chosen = arguments()
    only = frozenset(chosen.only.split(","))
    if unknown := only - set(SECTIONS):
        print(f"bench: no section {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("bench: the programs are loaded by root: sudo make bench", file=sys.stderr)
        return 3
    # Ended by a signal, too, it takes away what it has put on the host: cgroups, mounts, rules.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    subprocess.run([sys.executable, runs.ROOT / "bpf" / "build.py", "--all"], check=True)
    runs.build_consumer()
    host.build_load()
    machine = Machine.split()
    measured = measure(only, chosen.quick, machine)
    print("\n\n".join(report.as_text(table) for table in report.tables(measured)))
    if chosen.write:
        command = " ".join(["python -m benchmarks", *sys.argv[1:]])
        DOCUMENT.write_text(report.document(measured, machine, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
