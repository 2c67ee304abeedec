"""Runs the real agent as a process, and checks what it recorded against its own account.

Tracing sees the whole machine, so a test narrows the agent down to a cgroup of its own
(`scope.py`), and everything that is recorded is the test's own doing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Self

import msgspec
from msgspec.structs import astuple

from streamer.events.batch import inert
from streamer.events.catalogue import PUBLISHED
from streamer.events.kinds import KINDS
from streamer.events.stream import (
    KindCounts,
    SinkCounts,
    StreamHeartbeat,
    StreamLoss,
    StreamManifest,
    StreamRecord,
)
from streamer.events.summaries import SUMMARIES
from streamer.sinks.base import Cell
from tests.kernel.pace import seconds

ROOT = Path(__file__).resolve().parent.parent.parent
ALL = "*,-net.drop"
"""Drops are of packets, which are in nobody's cgroup: those of the whole machine would come."""
TCP_KINDS = "net.connect,net.accept,net.close"
START_SECONDS = seconds(60)
HOST_NETNS = os.stat("/proc/self/ns/net").st_ino
STOP_SECONDS = seconds(60)
UNDELIVERED = 5
TYPES: dict[str, type] = {kind: info.struct for kind, info in PUBLISHED.items()}
DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(cls, strict=True) for kind, cls in TYPES.items()
}


@cache
def schema_of(kind: str) -> Any:
    return json.loads((ROOT / "schemas" / f"{kind}.json").read_text())


def decoded(line: bytes) -> Any:
    """The Struct of a line; it must have exactly the fields of its schema, of their types."""
    raw = json.loads(line)
    schema = schema_of(raw["event"])
    optional = {"time", "replayed"}
    assert raw.keys() | optional == schema["properties"].keys() >= set(schema["required"])
    event = DECODERS[raw["event"]].decode(line)
    assert inert(msgspec.json.encode(event)) == line
    return event


def kind_of(event: Any) -> str:
    return str(type(event).__struct_config__.tag)


def is_stray(event: Any) -> bool:
    """Whether it is of a connection that others had before the agent started.

    Nobody knows its owner, so no filter keeps it back. The tests' own are in networks of their own.
    """
    return not getattr(event, "owner_known", True) and event.netns == HOST_NETNS


class Recording:
    """What one run of the agent wrote."""

    def __init__(self, output: bytes, stderr: str, returncode: int) -> None:
        self.all = [decoded(line) for line in output.splitlines()]
        self._published = [e for e in self.all if not kind_of(e).startswith("stream.")]
        self.events = [event for event in self._published if not is_stray(event)]
        self.stderr = stderr
        self.returncode = returncode

    def of(self, kind: str) -> list[Any]:
        """The events of a kind, in the order of the output."""
        return [event for event in self.all if kind_of(event) == kind and not is_stray(event)]

    @property
    def manifest(self) -> StreamManifest:
        (manifest,) = self.of("stream.manifest")
        assert isinstance(manifest, StreamManifest)
        return manifest

    @property
    def heartbeat(self) -> StreamHeartbeat:
        """The last one: the final account."""
        last = self.of("stream.heartbeat")[-1]
        assert isinstance(last, StreamHeartbeat)
        return last

    @property
    def ways(self) -> dict[str, str]:
        """Where the program of each hook is attached."""
        return {p.hook: p.way for p in self.manifest.programs if p.status == "attached"}

    @property
    def losses(self) -> list[StreamLoss]:
        """Of events, whose numbers or kinds are known."""
        return [loss for loss in self.of("stream.loss") if not is_skipped_runs(loss)]

    @property
    def skipped(self) -> int:
        """Runs of programs that the kernel left out: up to so many events may be missing."""
        return sum(loss.count for loss in self.of("stream.loss") if is_skipped_runs(loss))

    @property
    def account(self) -> str:
        """The line that the agent ends with."""
        return self.stderr.splitlines()[-1]

    def filtered(self, kind: str) -> int:
        counts = self.heartbeat.counts.get(kind)
        return counts.filtered if counts else 0

    def check(self) -> None:
        """Nothing is missing, nothing is twice, and every event is in the account."""
        self._check_ids()
        self.check_sequence()
        self.check_watermarks()
        self._check_account()

    def check_watermarks(self) -> None:
        """No event is older than what a heartbeat before it has said of its ring and CPU."""
        marks: dict[tuple[str, int], int] = {}
        for event in self.all:
            if isinstance(event, StreamHeartbeat):
                marks = {(mark.ring, mark.cpu): mark.watermark_ns for mark in event.marks}
            elif not isinstance(event, StreamRecord):
                assert event.boot_ns >= marks.get((event.ring, event.cpu), 0), event.id

    def _check_ids(self) -> None:
        assert len({event.id for event in self.all}) == len(self.all)
        assert len({event.boot_id for event in self.all}) == 1
        own = [event for event in self.all if isinstance(event, StreamRecord)]
        assert all(event.id == f"{event.run_id}-stream-{event.seq}" for event in own)

    def check_sequence(self) -> None:
        """Delivered and lost numbers are disjoint, and together all that were taken.

        Where many gaps were joined, their ranges have delivered numbers as well, and their counts
        say how many are lost.
        """
        taken: dict[tuple[str, int], list[int]] = {}
        for event in self._published:
            if isinstance(event, StreamRecord):  # a summary
                continue
            assert event.id.endswith(f"-{event.ring}-{event.cpu}-{event.seq}")
            taken.setdefault((event.ring, event.cpu), []).append(event.seq)
        lost: dict[tuple[str, int], set[int]] = {}
        for place, span in self._lost_numbers():
            lost.setdefault(place, set()).update(span)
        for place, found in lost.items():
            delivered = taken.setdefault(place, [])
            count = sum(one.count for one in self.losses if (one.ring, one.cpu) == place)
            gone = found.difference(delivered) if len(found) > count else found
            assert len(gone) == count, place
            delivered.extend(gone)
        marks = {(mark.ring, mark.cpu): mark for mark in self.heartbeat.marks}
        assert taken.keys() <= marks.keys()
        for place, mark in marks.items():
            numbers = sorted(taken.get(place, []))
            assert len(set(numbers)) == len(numbers), f"{place}: a number is there twice"
            if not mark.skipped:
                assert numbers == list(range(1, mark.seq + 1))

    def _lost_numbers(self) -> Iterator[tuple[tuple[str, int], range]]:
        for loss in self.losses:
            if loss.stage == "kernel":
                first, last = loss.ranges[0], loss.ranges[-1]
                assert (loss.seq_from, loss.seq_to) == (first.seq_from, last.seq_to)
                for one in loss.ranges:
                    assert (one.ring, one.cpu) == (loss.ring, loss.cpu)
                    yield (one.ring, one.cpu), range(one.seq_from, one.seq_to + 1)

    def check_numbers(self) -> None:
        """At each heartbeat the account of every ring, CPU and kind closes, and is all there is."""
        for beat in self.of("stream.heartbeat"):
            sums: dict[str, list[tuple[int, ...]]] = {}
            for mark in beat.marks:
                place = mark.ring, mark.cpu
                cells = [KindCounts(*cell) for cell in mark.kinds.values()]
                assert all(KINDS[kind].ring == mark.ring for kind in mark.kinds), place
                assert all(c.produced >= c.filtered + c.shed + c.lost + c.read for c in cells)
                numbered = sum(c.produced - c.filtered - c.shed for c in cells)
                assert numbered == mark.seq - mark.skipped, place
                for kind, cell in mark.kinds.items():
                    sums.setdefault(kind, []).append(cell)
            assert {
                kind: astuple(c) for kind, c in beat.counts.items() if kind not in SUMMARIES
            } == {kind: tuple(map(sum, zip(*rows, strict=True))) for kind, rows in sums.items()}
            for name, sink in beat.sink_counts.items():
                totals = tuple(map(sum, zip(*sink.kinds.values(), strict=True))) or (0, 0, 0)
                assert totals == (sink.received, sink.delivered, sink.dropped), name
                dropped = Counter[str]()
                for cell, count in cells_dropped(sink).items():
                    assert 0 < count <= read_of(beat, cell), (name, cell)
                    dropped[cell[2]] += count
                assert all(n <= sink.kinds[kind][2] for kind, n in dropped.items()), name

    def _check_cells(self) -> None:
        """In the final one all of each ring, CPU and kind is delivered, filtered, shed or lost."""
        there = Counter(
            (event.ring, event.cpu, kind_of(event))
            for event in self._published
            if not isinstance(event, StreamRecord)
        )
        cells = {
            (mark.ring, mark.cpu, kind): KindCounts(*cell)
            for mark in self.heartbeat.marks
            for kind, cell in mark.kinds.items()
        }
        assert there.keys() <= cells.keys()
        for cell, counts in cells.items():
            assert counts.read == there[cell], cell
            known = counts.filtered + counts.shed + counts.lost + counts.read
            assert counts.produced == known, cell

    def _check_account(self) -> None:
        self.check_numbers()
        self._check_cells()
        delivered = Counter(kind_of(event) for event in self._published)
        lost = Counter[str]()
        for loss in self.losses:
            lost.update(loss.kinds)
            assert loss.count == sum(loss.kinds.values())
        assert self.skipped == sum(self.heartbeat.missed.values())
        counts = self.heartbeat.counts
        for kind in delivered | lost:
            assert kind in counts
        for kind, found in counts.items():
            assert found.produced == found.read + found.filtered + found.shed + found.lost, kind
            assert found.read == delivered[kind], kind
            assert found.lost == lost[kind], kind
        for sink in self.heartbeat.sink_counts.values():
            assert sink.received == sink.delivered + sink.dropped + sink.pending
        self._check_account_line(delivered.total(), lost.total())

    def _check_account_line(self, delivered: int, lost: int) -> None:
        counts = self.heartbeat.counts.values()
        produced = sum(found.produced for found in counts)
        filtered = sum(found.filtered for found in counts)
        line = self.account
        assert line.startswith(f"streamer: {produced:,} events in ")
        assert f" {delivered:,} delivered, 0 dropped; " in line
        shed = sum(found.shed for found in counts)
        more = f"; {shed:,} shed" if shed else ""
        if self.skipped:
            more += f"; {self.skipped:,} times a program was not run"
        assert line.endswith(f"; {filtered:,} filtered, {lost:,} lost{more}")


def cells_dropped(sink: SinkCounts) -> Counter[Cell]:
    """What it gave up, per ring, CPU and kind."""
    found = {
        (one.ring, one.cpu, kind): n for one in sink.dropped_of for kind, n in one.kinds.items()
    }
    assert len(found) == sum(len(one.kinds) for one in sink.dropped_of)
    return Counter(found)


def read_of(beat: StreamHeartbeat, cell: Cell) -> int:
    ring, cpu, kind = cell
    (mark,) = (one for one in beat.marks if (one.ring, one.cpu) == (ring, cpu))
    return KindCounts(*mark.kinds[kind]).read


def is_skipped_runs(loss: StreamLoss) -> bool:
    """Whether it tells of runs of a program, and not of events with a number."""
    return loss.stage == "kernel" and loss.ring is None


class Agent:
    """`streamer run` with a file sink, between its manifest and a signal."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        events: str = ALL,
        config: str = "",
        sinks: tuple[str, ...] | None = (),
        prefix: tuple[str, ...] = (),
        python: str = sys.executable,
        program: tuple[str, ...] = ("-m", "streamer"),
        output: Path | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        """`config` is TOML, `sinks` are further ones, `prefix` is put before the command.

        Without any (None) the `config` has them all, that of `output` included. `program` is
        what `python` runs, `output` where the events go in place of `directory`.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.output = output or directory / "events.ndjson"
        self._pass_fds = pass_fds
        self._stderr = directory / "stderr"
        # No settings of a table, so they are first.
        note = f'state_file = "{directory / "run.json"}"\n'
        note += f'control = {{ socket = "{directory / "control.sock"}" }}\n'
        (directory / "streamer.toml").write_text(note + config)
        command = [*prefix, python, *program, "run", "--no-status"]
        command += ["--config", str(directory / "streamer.toml"), "--events", events]
        for sink in () if sinks is None else (f"file:{self.output}", *sinks):
            command += ["--sink", sink]
        self._command = [*command, *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self) -> Self:
        """Start it, and wait until it has attached and says so."""
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=self._pass_fds,
            )
        try:
            self.wait_for(b'{"event":"stream.manifest"')
        except BaseException:
            self.kill()
            raise
        return self

    def wait_for(self, marker: bytes, count: int = 1, timeout: float = START_SECONDS) -> None:
        """Wait until the output holds `marker` so often."""
        deadline = time.monotonic() + timeout
        while not self.output.exists() or self.output.read_bytes().count(marker) < count:
            if self.process.poll() is not None:
                raise AssertionError(f"the agent ended: {self.stderr}")
            assert time.monotonic() < deadline, f"no {marker!r} in time: {self.stderr}"
            time.sleep(0.02)

    @property
    def helper_pid(self) -> int:
        """The privileged helper: the only child of the agent."""
        (pid,) = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(pid)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Recording:
        """What it recorded, after it ended by itself."""
        returncode = self.process.wait(STOP_SECONDS)
        output = self.output.read_bytes() if self.output.exists() else b""
        return Recording(output, self.stderr, returncode)

    def stop(
        self, number: signal.Signals = signal.SIGTERM, *, check: bool = True, code: int = 0
    ) -> Recording:
        """End it, and check its exit code, and its account unless told not to."""
        self.send(number)
        recording = self.wait()
        assert recording.returncode == code, recording.stderr
        if check:
            recording.check()
        return recording

    def kill(self) -> None:
        """Harmless when it has ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.kill()
