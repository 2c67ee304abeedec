"""Independent clients: how fast events arrive meanwhile, and what is there in the end.

`kcat` (librdkafka) and `mosquitto_sub`: neither shares code with the agent.
"""

from __future__ import annotations

import math
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import msgspec

from tests.brokers import MosquittoBroker
from tests.faults.load import Counts

LOOK_SECONDS = 0.05
QUICK = (
    *("-X", "reconnect.backoff.ms=50", "-X", "reconnect.backoff.max.ms=200"),
    *("-X", "fetch.wait.max.ms=50", "-X", "fetch.error.backoff.ms=50"),
    *("-X", "topic.metadata.refresh.interval.ms=500", "-X", "session.timeout.ms=6000"),
    *("-X", "socket.timeout.ms=2000", "-X", "topic.metadata.refresh.fast.interval.ms=100"),
)
"""That it is back at once, and what is measured is the agent and not kcat."""


class Arrivals:
    """How many lines a file had when: it is looked at 20 times a second, until `end`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._points = [(time.monotonic(), 0)]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        with self._path.open("rb") as file:
            lines = 0
            while not self._ended.wait(LOOK_SECONDS):
                while data := file.read(1 << 20):
                    lines += data.count(b"\n")
                self._points.append((time.monotonic(), lines))

    def end(self) -> None:
        self._ended.set()
        self._thread.join(30)

    @property
    def lines(self) -> int:
        return self._points[-1][1]

    def by_second(self, zero: float) -> dict[int, int]:
        """Lines in each second, counted from the moment `zero`: to see what happened."""
        found: dict[int, int] = {}
        for (_, before), (at, lines) in pairwise(self._points):
            second = math.floor(at - zero)
            found[second] = found.get(second, 0) + lines - before
        return found

    def at_rate_after(self, moment: float, rate: float) -> float | None:
        """Seconds from `moment` on until a second begins in which lines come at `rate`, and at half
        of it in its first quarter; None: there is none.
        """
        points = [point for point in self._points if point[0] >= moment]
        last = quarter = 0
        for at, lines in points:
            while last < len(points) and points[last][0] < at + 1:
                last += 1
            if last == len(points):
                return None
            while points[quarter][0] < at + 0.25:
                quarter += 1
            later, more = points[last]
            sooner, some = points[quarter]
            whole = more - lines >= rate * (later - at)
            if whole and some - lines >= rate / 2 * (sooner - at):
                return at - moment
        return None


class KafkaFollower:
    """kcat, which reads a topic from its beginning as it is written: a line for each record."""

    def __init__(self, address: str, topic: str, directory: Path) -> None:
        path = directory / "arrived"
        command = ["kcat", "-C", "-E", "-b", address, "-t", topic, "-o", "beginning", "-q", "-u"]
        with path.open("wb") as file, (directory / "kcat.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *QUICK, "-f", r"%T\n"], stdout=file, stderr=log
            )
        self.arrivals = Arrivals(path)

    def end(self) -> None:
        self.arrivals.end()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()


class MosquittoFollower:
    """mosquitto_sub, whose session outlives the broker: what it gets is in `path`."""

    def __init__(self, broker: MosquittoBroker, topic: str, directory: Path) -> None:
        self.path = directory / "arrived"
        # At QoS 0, which the broker keeps for the session as well: see tests/integration/test_mqtt.
        name = f"witness-{time.monotonic_ns()}"
        command = ["mosquitto_sub", "-V", "mqttv5", "-h", "127.0.0.1", "-p", str(broker.port)]
        command += ["-q", "0", "-c", "-x", "86400", "-i", name, "-t", topic, "-N"]
        with self.path.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while f"{name} 0 {topic}" not in broker.log:
            assert time.monotonic() < deadline, broker.log
            time.sleep(0.05)
        self.arrivals = Arrivals(self.path)

    def end(self) -> None:
        self.arrivals.end()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()


class FileFollower:
    """Watches a file that the agent writes itself."""

    def __init__(self, path: Path) -> None:
        self.arrivals = Arrivals(path)

    def end(self) -> None:
        self.arrivals.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()


# ---------------------------------------------------------------- what is there


class Seen(msgspec.Struct, gc=False):
    """The fields of a record that the tests count by."""

    event: str
    id: str
    uid: int = -1
    argv: list[str] = []
    stage: str = ""
    ring: str | None = None
    weight: int = 1
    level: int = 0
    since_boot_ns: int = 0
    count: int = 0
    kinds: dict[str, int] = {}
    sink: str | None = None
    refused: list[dict[str, Any]] = []
    final: bool = False
    previous: dict[str, Any] | None = None


class Found(msgspec.Struct):
    """What a topic holds."""

    records: int = 0
    delivered: Counts = msgspec.field(default_factory=Counter)
    """Events per kind, each id once."""
    duplicates: int = 0
    told: Counts = msgspec.field(default_factory=Counter)
    """Events per kind in records of losses."""
    shed: Counts = msgspec.field(default_factory=Counter)
    """Events per kind that were left out under pressure, as the stream tells."""
    levels: list[tuple[int, int]] = []
    """Levels of pressure, each with the nanoseconds since boot from which it held."""
    weights: Counter[tuple[str, int]] = msgspec.field(default_factory=Counter)
    """Events of each kind and weight, of those that stand for more than one."""
    skipped: int = 0
    """Runs of programs that the kernel has left out, as it does now and then where it is emulated:
    the stream tells how many, and not of which kind.
    """
    stages: Counts = msgspec.field(default_factory=Counter)
    """Events told as lost, per stage."""
    by_root: Counts = msgspec.field(default_factory=Counter)
    """Events of processes per kind, of those that root did."""
    named: dict[str, list[int]] = msgspec.field(default_factory=dict)
    """The numbers of the execs of each word of `load.c spawns`."""
    refused: Counts = msgspec.field(default_factory=Counter)
    """Events per kind that somebody was refused for having his share, by the last account."""
    payers: set[tuple[str, int]] = msgspec.field(default_factory=set)


def count(lines: Iterable[bytes], words: Iterable[str]) -> Found:
    """Count records, of which any may come twice."""
    found = Found()
    wanted = frozenset(words)
    decode = msgspec.json.Decoder(Seen).decode
    known: set[str] = set()
    for line in lines:
        seen = decode(line)
        found.records += 1
        if seen.id in known:
            found.duplicates += 1
            continue
        known.add(seen.id)
        if not seen.event.startswith("stream."):
            found.delivered[seen.event] += 1
            if not seen.uid and seen.event.startswith("process."):
                found.by_root[seen.event] += 1
            if seen.weight != 1:
                found.weights[seen.event, seen.weight] += 1
            if seen.event == "process.exec" and seen.argv[:1] and seen.argv[0] in wanted:
                found.named.setdefault(seen.argv[0], []).append(int(seen.argv[1]))
        elif seen.event == "stream.loss":
            found.told.update(seen.kinds)
            found.stages[seen.stage] += seen.count
            if seen.stage == "kernel" and seen.ring is None:
                found.skipped += seen.count
        elif seen.event == "stream.shed":
            found.shed.update(seen.kinds)
            found.levels.append((seen.since_boot_ns, seen.level))
        elif seen.final:
            found.refused = sum((Counter(one["kinds"]) for one in seen.refused), Counter())
            found.payers = {(one["payer"], one["id"]) for one in seen.refused}
    return found


def by_kcat(address: str, topic: str) -> Iterator[bytes]:
    """All records of a topic."""
    command = ["kcat", "-C", "-b", address, "-t", topic, "-o", "beginning", "-e", "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0


def by_mosquitto(path: Path, quiet: float = 10.0) -> list[bytes]:
    """All that a subscriber has written to `path`, once nothing has come for `quiet` seconds."""
    size, since = -1, time.monotonic()
    while time.monotonic() < since + quiet:
        if (now := path.stat().st_size) != size:
            size, since = now, time.monotonic()
        time.sleep(0.1)
    return path.read_bytes().splitlines()
