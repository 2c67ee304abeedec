"""The runs: a load, a measured process, and the check that nothing was lost between them."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from benchmarks.load import Load, Mix
from benchmarks.measure import WARM_EVENTS, Result, Subject, Task, python_command
from benchmarks.pipe_reader import Latencies
from streamer.config.settings import KafkaSink
from streamer.events.kinds import HEADER

ROOT = Path(__file__).parent.parent
CONSUMER = ROOT / "build" / "bench_consumer"
PARTITIONS = 3
CODEC = KafkaSink(bootstrap=("",)).compression

Who = Literal["streamer", "plain", "C"]


class Machine(NamedTuple):
    """Where things run: the measured process on `subject`, all else on `others`."""

    subject: int
    others: frozenset[int]

    @classmethod
    def split(cls) -> Machine:
        """The CPUs of this process: the last for what is measured, the rest for all else."""
        *others, subject = sorted(os.sched_getaffinity(0))
        return cls(subject, frozenset(others or [subject]))


class Brokers(NamedTuple):
    """Addresses of the brokers, which run on the other CPUs too, and room for files.

    `far` are addresses of the same Kafka behind proxies that delay, by round trip in ms.
    """

    kafka: str
    mqtt_port: int
    directory: Path
    far: dict[int, str]


def build_consumer() -> None:
    """Compile the consumer in C.

    Raises:
        CalledProcessError: it cannot be compiled.
    """
    compile_c("consumer.c", CONSUMER, "-lbpf")


def compile_c(source: str, program: Path, *options: str) -> None:
    """Compile a source of this package, unless `program` is newer.

    Raises:
        CalledProcessError: it cannot be compiled.
    """
    path = ROOT / "benchmarks" / source
    if program.exists() and program.stat().st_mtime > path.stat().st_mtime:
        return
    program.parent.mkdir(exist_ok=True)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-Wall", "-o", program, path, *options], check=True)


def delivery(who: Who, path: str, mix: Mix, events: int, machine: Machine, at: Brokers) -> Result:
    """Bring so many events through `path`; all of them, or it is an error.

    Raises:
        RuntimeError: events are missing, or a process failed.
    """
    load = Load()
    topic = f"bench-{who}-{time.monotonic_ns()}"
    warm = min(WARM_EVENTS, events)
    task = Task(
        path, events, load.shared, machine.subject,
        kafka=at.kafka, mqtt_port=at.mqtt_port, topic=topic, warm=warm,
    )  # fmt: skip
    subject = Subject(command(who, task), load.shared)
    try:
        subject.expect("ready")
        load.emit(mix, warm, subject.alive)
        subject.expect("warm")
        load.emit(mix, events, subject.alive)
        result = subject.result()
        check_all_there(load, result, warm + events, events)
        if path == "kafka":
            check_topic(at.kafka, topic, warm + events)
        return result
    finally:
        subject.kill()
        load.close()


def command(who: Who, task: Task) -> list[str]:
    """What runs as the measured process."""
    if who == "C":
        ring = task.shared.rings["bulk"][0]
        counts = (ring, HEADER["kind"], task.warm, task.events)
        return ["taskset", "-c", str(task.cpu), str(CONSUMER), *map(str, counts)]
    return python_command("subject" if who == "streamer" else "plain", task)


def check_all_there(load: Load, result: Result, produced: int, delivered: int) -> None:
    """Raise RuntimeError unless all was produced, nothing lost, and all delivered."""
    found = (load.produced(), load.lost(), result.events)
    if found != (produced, 0, delivered):
        raise RuntimeError(
            f"produced, lost and delivered are {found}, not {(produced, 0, delivered)}"
        )


def check_topic(kafka: str, topic: str, events: int) -> None:
    """Ask the broker how many records the topic has: the events, and a few about the stream.

    Raises:
        RuntimeError: another number.
    """
    asked = [f"{topic}:{partition}:-1" for partition in range(PARTITIONS)]
    options = [part for where in asked for part in ("-t", where)]
    answer = subprocess.run(
        ["kcat", "-b", kafka, "-Q", *options], capture_output=True, text=True, check=True
    )
    records = sum(int(line.split()[-1]) for line in answer.stdout.splitlines())
    if not events <= records <= events + 100:
        raise RuntimeError(f"topic {topic} has {records} records, and {events} were sent")


@contextmanager
def delaying_proxy(port: int, target: str, milliseconds: int) -> Iterator[None]:
    """A process meanwhile delays what goes through a loopback port, by that round trip.

    Raises:
        RuntimeError: it does not come up.
    """
    arguments = [str(port), target, str(milliseconds)]
    command = [sys.executable, "-m", "benchmarks.delay", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as proxy:
        try:
            if proxy.stdout is None or proxy.stdout.readline() != b"ready\n":
                raise RuntimeError("the proxy that delays does not come up")
            yield
        finally:
            proxy.kill()


def librdkafka(events: int, machine: Machine, at: Brokers) -> Result:
    """What librdkafka, in C, needs to send events that lie in a file, encoded already."""
    path, topic = at.directory / "events.ndjson", f"bench-kcat-{time.monotonic_ns()}"
    write_lines(path, events, machine)
    properties = ("enable.idempotence=true", "acks=all", "linger.ms=50", "batch.size=524288")
    options = [part for one in properties for part in ("-X", one)]
    kcat = ["kcat", "-P", "-b", at.kafka, "-t", topic, "-k", os.uname().nodename, "-z", CODEC]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        ["taskset", "-c", str(machine.subject), *kcat, *options, "-l", str(path)],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
    path.unlink()
    check_topic(at.kafka, topic, events)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Result(events, cpu, wall, 0, 0)


def write_lines(path: Path, events: int, machine: Machine) -> None:
    """Write so many events of the mixed load to a file, one per line."""
    load = Load()
    task = Task("file", events, load.shared, machine.subject, topic=str(path), warm=0)
    subject = Subject(command("streamer", task), load.shared)
    try:
        subject.expect("ready")
        subject.expect("warm")
        load.emit("mixed", events, subject.alive)
        subject.result()
    finally:
        subject.kill()
        load.close()
    # Records about the stream itself are in there too: leave as many lines as events.
    lines = [line for line in path.read_bytes().splitlines(True) if b'"event":"stream.' not in line]
    path.write_bytes(b"".join(lines[:events]))


def idle(seconds: float, machine: Machine) -> Result:
    """A service with nothing to do."""
    load = Load()
    task = Task("ndjson", 0, load.shared, machine.subject, seconds=seconds)
    subject = Subject(command("streamer", task), load.shared)
    try:
        subject.expect("ready")
        subject.expect("warm")
        return subject.result()
    finally:
        subject.kill()
        load.close()


def latency(emit: Callable[[Load], None], seconds: float, machine: Machine) -> Latencies:
    """Ages of events when the reader of a pipe gets them, while `emit` emits for some time."""
    load = Load()
    output, end = os.pipe()
    reader = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.pipe_reader"],
        stdin=output,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    task = Task("stdout", 0, load.shared, machine.subject, out_fd=end, seconds=seconds)
    subject = Subject(command("streamer", task), load.shared, output=end)
    os.close(output)
    os.close(end)
    try:
        subject.expect("ready")
        subject.expect("warm")
        emit(load)
        subject.result()
        answer, _ = reader.communicate(timeout=30)
        if load.lost():
            raise RuntimeError(f"{load.lost()} events were lost")
        return msgspec.json.decode(answer, type=Latencies)
    finally:
        subject.kill()
        reader.kill()
        reader.wait()
        load.close()


def one_by_one(load: Load, seconds: float) -> None:
    """Single events, at times that have nothing to do with the reader's."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        load.run("mixed", 1)
        time.sleep(random.uniform(0.003, 0.08))


def show(text: str) -> None:
    """Say what goes on, on standard error."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def median_result(results: Sequence[Result]) -> Result:
    """The result in the middle, by CPU time per event."""
    return sorted(results, key=lambda result: result.ns_per_event)[len(results) // 2]
