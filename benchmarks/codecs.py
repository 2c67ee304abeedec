"""The codecs of record batches, side by side: `python -m benchmarks.codecs`, as root.

For the benchmark's own mix of events: what compressing costs the producer, what a broker stores,
and the CPU time of a consumer (kcat, which is librdkafka) and of the broker, once its Java is warm,
which takes and serves them. Prints the table of docs/kafka.md. All in one run; the median of
several turns.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from aiokafka.codec import lz4_encode  # type: ignore[import-untyped]

from benchmarks.report import as_markdown
from benchmarks.runs import Machine, write_lines
from streamer.sinks.kafka.codecs import CODECS, Codec
from streamer.sinks.kafka.record_batch import Laid, compress, lay_out, record_batch
from tests.brokers import KafkaBroker

EVENTS = 200_000
BATCH_EVENTS = 1200
"""About 512 KiB, the default size of a record batch."""
TURNS = 5
WARM_TURNS = 4

ALL = {**CODECS, "lz4, level 9 (aiokafka)": Codec(3, lz4_encode)}


class Turn(NamedTuple):
    """What was measured of one codec: CPU time per event, and bytes of all record batches."""

    producer_ns: float
    size: int
    broker_ns: float
    consumer_ns: float


def batches(lines: list[bytes]) -> Iterator[Laid]:
    """The events laid out as the sink does, before compressing."""
    now = time.time_ns()
    for start in range(0, len(lines), BATCH_EVENTS):
        part = lines[start : start + BATCH_EVENTS]
        yield lay_out([(b"".join(part), array("q", [now] * len(part)))], b"bench-host")


def producer_ns(codec: Codec, laid: list[Laid]) -> tuple[float, int]:
    """CPU time per event, and bytes of all record batches."""
    before, size = time.process_time_ns(), 0
    for one in laid:
        size += sum(map(len, record_batch(compress(one, codec), (-1, -1, -1))))
    return (time.process_time_ns() - before) / EVENTS, size


def consumer_ns(address: str, topic: str) -> float:
    """CPU time per event of kcat, which reads and counts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["kcat", "-C", "-b", address, "-t", topic, "-o", "beginning", "-e", "-q", "-f", ""]
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1e9 * cpu / EVENTS


def fill(address: str, topic: str, path: Path, codec: str) -> None:
    """Write the events to a topic, in one partition, with a codec."""
    properties = ("linger.ms=50", "batch.size=524288", "batch.num.messages=1200")
    options = [part for one in properties for part in ("-X", one)]
    command = ["kcat", "-P", "-b", address, "-t", topic, "-p", "0", "-k", "h", "-z", codec]
    subprocess.run([*command, *options, "-l", str(path)], check=True, stderr=subprocess.DEVNULL)


def cpu_of(pid: int) -> float:
    """Seconds of CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def take_turn(
    name: str, codec: Codec, laid: list[Laid], broker: KafkaBroker, topic: str, path: Path
) -> Turn:
    """Measure one codec, all three sides."""
    cost, size = producer_ns(codec, laid)
    before = cpu_of(broker.pid)
    fill(broker.address, topic, path, name.partition(",")[0])
    consumer = consumer_ns(broker.address, topic)
    return Turn(cost, size, 1e9 * (cpu_of(broker.pid) - before) / EVENTS, consumer)


def measure(directory: Path) -> list[tuple[str, ...]]:
    """The rows of the table."""
    path = directory / "events.ndjson"
    write_lines(path, EVENTS, Machine.split())
    lines = path.read_bytes().splitlines(True)
    plain = sum(map(len, lines))
    laid = list(batches(lines))
    rows: list[tuple[str, ...]] = [
        ("codec", "producer, ns per event", "stored, bytes per event", "ratio",
         "broker, ns per event", "consumer, ns per event"),
    ]  # fmt: skip
    found: dict[str, list[Turn]] = {name: [] for name in ALL}
    with KafkaBroker(directory / "kafka") as broker:
        for turn in range(-WARM_TURNS, TURNS):  # the first ones are for Java to compile in
            for name, codec in ALL.items():
                topic = f"codec-{len(name)}-{name.partition(',')[0]}-{turn}"
                one = take_turn(name, codec, laid, broker, topic, path)
                if turn >= 0:
                    found[name].append(one)
    for name, turns in found.items():
        costs, sizes, brokers, consumers = map(statistics.median, zip(*turns, strict=True))
        rows.append(
            (name, f"{costs:,.0f}", f"{sizes / EVENTS:,.1f}", f"{plain / sizes:.1f}",
             f"{brokers:,.0f}", f"{consumers:,.0f}")
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        print(as_markdown(measure(Path(directory))))


if __name__ == "__main__":
    main()
