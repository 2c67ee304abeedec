"""One fault: the agent under a steady load, what happens to it, and what has to hold after it.

What is the same for all faults is checked here: `streamer verify` explains everything, an
independent client's count agrees with what the test did, nothing critical is lost but of who
floods, memory, and how soon events arrive at the full rate again.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import msgspec

from streamer.errors import NoAnswer
from streamer.operation.control import ask
from streamer.operation.look import Look
from streamer.verify.report import VerifyReport
from tests.faults import consumers
from tests.faults.consumers import Arrivals, Found
from tests.faults.load import Counts, Load, build
from tests.faults.table import Row
from tests.kernel.agent import ROOT, START_SECONDS, Agent
from tests.kernel.pace import repetitions, seconds
from tests.kernel.scope import Scope

RATE = repetitions(5_000, 100)
"""Opens a second of the load that is always there."""
SPAWNS = repetitions(20, 1)
"""Its processes a second: what is critical."""
MINE = "mine"
CRITICAL = ("process.exec", "process.fork", "process.exit")
EVENTS = "process.*,file.open"
MOST_MB = 150.0
FURTHER_MB = 50.0
"""Of each further worker."""
MOST_RECOVERY = seconds(5.0)
LEAST_RATE = 0.9
"""Of the offered rate, as what counts as the full one: both are of a second at a time."""
DRAIN_SECONDS = seconds(120.0)
END_SECONDS = seconds(60.0)


class Memory:
    """The most memory of some processes together, looked at ten times a second.

    The kernel keeps the most of each (VmHWM), which is set back first: while it loads its programs
    the helper takes what it gives back before there is any event, and so before the worker has its
    most. Until then is looked at by itself.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._most = dict.fromkeys(self._pids, 0)
        self.note()
        self._before = sum(self._most.values())
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
            self._most[pid] = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.1):
            self.note()

    def note(self) -> None:
        """Look, as long as they are there."""
        for pid in self._pids:
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            for line in status.splitlines():
                if line.startswith("VmHWM:"):
                    self._most[pid] = max(self._most[pid], int(line.split()[1]))

    def end(self) -> float:
        """Megabytes (of 10^6 bytes)."""
        self._ended.set()
        self._thread.join(5)
        return max(self._before, sum(self._most.values())) * 1024 / 1e6


class Faulty(Agent):
    """The agent with one sink, a broker; its control socket says how it is."""

    def launch(self) -> None:
        """Start it, and wait for nothing."""
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=stderr
            )

    def start(self) -> Self:
        """Start it, and wait until it has attached and says so."""
        self.launch()
        deadline = time.monotonic() + START_SECONDS
        while " streaming " not in self.stderr:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the agent does not start: {self.stderr}")
            time.sleep(0.02)
        return self

    @property
    def children(self) -> list[int]:
        """Its helper, and further workers."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def look(self) -> Look:
        """What `streamer status` would say. Raises NoAnswer."""
        path = str(self.output.parent / "control.sock")
        return msgspec.json.decode(ask(path, "status", 30), type=Look)

    def drain(self, timeout: float = DRAIN_SECONDS) -> None:
        """Wait until its sink has delivered, or given up, all that was read."""
        deadline = time.monotonic() + timeout
        while True:
            assert self.process.poll() is None, f"the agent ended: {self.stderr}"
            try:
                look = self.look()
            except NoAnswer as error:
                found = str(error)
            else:
                (sink,) = look.sinks.values()
                # Its own records, of which there is one now and then, are among them.
                if sink.pending <= 5 and not any(ring.used_bytes for ring in look.rings.values()):
                    return
                found = f"{sink}"
            assert time.monotonic() < deadline, f"not delivered: {found}: {self.stderr}"
            time.sleep(0.1)


def configured(
    scope: Scope,
    directory: Path,
    sink: str,
    *,
    spool: str | None = "spill",
    place: Path | None = None,
    top: str = "",
    more: str = "",
    events: str = EVENTS,
    prefix: tuple[str, ...] = (),
) -> Faulty:
    """An agent that observes the scope alone. `sink` are its lines of TOML; `place`: see spool.

    A file has no spool (None).
    """
    config = f"""heartbeat_seconds = 1
grace_seconds = {seconds(10):.0f}
{top}
[spool]
directory = "{place or directory / "state" / "spool"}"
[[sinks]]
{sink}
{f'spool = "{spool}"' if spool else ""}
{more}
"""
    return Faulty(
        directory, *scope.options, events=events, config=config, sinks=None, prefix=prefix
    )


class Experiment:
    """Load, agent and witness from the beginning of the block on; `finish` checks and says."""

    def __init__(
        self,
        fault: str,
        agent: Faulty,
        scope: Scope,
        follow: Callable[[], Any],
        read: Callable[[], Iterable[bytes]],
        source: Callable[[], str],
        *,
        rate: int = RATE,
    ) -> None:
        """`follow` starts a follower, `read` gives all that is at the broker, `source` is what
        `streamer verify` is to read.
        """
        self.fault = fault
        self.agent = agent
        self.scope = scope
        self.rate = rate
        self._follow, self._read, self._source = follow, read, source
        self._stack = ExitStack()
        self._loads: list[Load] = []
        self.healed: float | None = None
        self.follower: Any = None
        self.topic = ""
        self.healed_boot_ns = 0
        self.found: Found | None = None
        """What is at the broker, once it is finished."""
        self.report: VerifyReport | None = None
        """What `streamer verify` says, once it is finished."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.follower = stack.enter_context(self._follow())
            stack.enter_context(self.agent)
            self.memory = Memory((self.agent.pid, *self.agent.children))
            stack.callback(self.memory.end)
            self._stack = stack
            if self.rate:
                self.load("opens", "/no/steady/", str(self.rate))
            self.load("spawns", MINE, "0", str(SPAWNS))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def load(self, *arguments: str, **options: Any) -> Load:
        """More that is offered, until the end at most: see `Load`."""
        made = self._stack.enter_context(Load(build(), self.scope, *arguments, **options))
        self._loads.append(made)
        return made

    @property
    def arrivals(self) -> Arrivals:
        return self.follower.arrivals  # type: ignore[no-any-return]

    def steady(self, duration: float = 2.0) -> None:
        """Let it run until all arrives at the rate at which it is offered."""
        deadline = time.monotonic() + duration + seconds(20)
        time.sleep(duration)
        while self.arrivals.at_rate_after(time.monotonic() - 1.5, LEAST_RATE * self.rate) is None:
            arrived = self.arrivals.lines
            assert time.monotonic() < deadline, f"{arrived} have arrived: {self.agent.stderr}"
            time.sleep(0.1)

    def heal(self) -> None:
        """The fault ends now."""
        self.healed = time.monotonic()
        self.healed_boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def finish(
        self,
        *,
        flooder: int | None = None,
        drops: bool = False,
        after: float = 6.0,
        note: str = "",
        recovers: bool = True,
        most_mb: float = MOST_MB,
    ) -> Row:
        """What came of it, all of which is checked. `flooder` is a user whose own events may be
        lost, and `drops` whether the sink loses them; `after`: for so long the load goes on after
        the fault; `most_mb`: of all processes.
        """
        if self.healed is None:
            self.heal()
        assert self.healed is not None
        time.sleep(after)
        for load in self._loads:
            load.stop(END_SECONDS)
        self.agent.drain()
        self.memory.note()
        self.agent.process.terminate()
        assert self.agent.process.wait(END_SECONDS) == 0, self.agent.stderr
        peak = self.memory.end()
        found = self.found = consumers.count(self._read(), [MINE])
        self.follower.end()
        report = self.report = verify(self._source(), found.records)
        offered = sum((load.expected for load in self._loads), Counts())
        recovery = self.arrivals.at_rate_after(self.healed, LEAST_RATE * self.rate)
        self.check(found, report, offered, flooder, drops)
        row = Row(
            self.fault,
            offered.total(),
            found.delivered.total(),
            found.duplicates,
            (offered - found.delivered).total(),
            report.unexplained,
            peak,
            recovery if recovers else None,
            note,
        )
        # Shown if it fails.
        print(row.line, self.arrivals.by_second(self.healed), self.agent.stderr, sep="\n")
        assert peak <= most_mb, row.line
        if recovers:
            assert recovery is not None, row.line
            assert recovery <= MOST_RECOVERY, row.line
        return row

    def check(
        self,
        found: Found,
        report: VerifyReport,
        offered: Counts,
        flooder: int | None,
        drops: bool = False,
    ) -> None:
        """All is there or told, by the client's count and by `streamer verify`."""
        skipped = missing(found, offered)
        assert report.ok, report
        assert (report.unexplained, report.malformed) == (0, 0), report
        assert report.events == found.delivered.total()
        assert report.duplicates == found.duplicates
        mine = next(load.done for load in self._loads if load.word == MINE)
        there, known = found.named[MINE], set(found.named[MINE])
        assert len(there) == mine - skipped["process.exec"]
        assert there == [number for number in range(mine) if number in known]
        lost = Counts({kind: found.told[kind] for kind in CRITICAL if found.told[kind]})
        assert not {kind for kind, _ in found.weights} & {*CRITICAL}, found.weights
        if flooder is None:
            assert not lost, f"critical events were lost: {found.told} {found.stages}"
        elif drops:
            gone = self._by_root - found.by_root
            assert found.by_root <= self._by_root
            assert gone <= skipped, f"of root's {self._by_root}: {gone} are missing"
        else:
            assert found.payers <= {("user", flooder)}
            assert lost <= found.refused, f"{lost} were lost, and {found.refused} refused"

    @property
    def _by_root(self) -> Counts:
        """What root did of what is critical: all loads begin as root, and some become a user."""
        spawned = next(load.done for load in self._loads if load.word == MINE)
        ended = sum(load.uid is None for load in self._loads)
        return Counts(
            {
                "process.fork": spawned,
                "process.exec": spawned + len(self._loads),
                "process.exit": spawned + ended,
            }
        )


def missing(found: Found, offered: Counts) -> Counts:
    """What is neither there nor told by its kind, as lost or shed: no more than the kernel has left
    out.
    """
    what = f"offered {offered}, delivered {found.delivered}, told {found.told} {found.stages}"
    what += f", shed {found.shed}"
    there = found.delivered + found.told + found.shed
    assert there <= offered, what
    gone = offered - there
    assert gone.total() <= found.skipped, what
    return gone


def verify(source: str, records: int) -> VerifyReport:
    """The report of the real command."""
    command = [sys.executable, "-m", "streamer", "verify", "--json", "--ended", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds(300))
    assert done.stdout, done.stderr
    report = msgspec.json.decode(done.stdout, type=VerifyReport)
    assert report.records == records
    return report
