"""A broker that becomes slow has bulk kinds sampled, and nothing else; all is accounted for.

The broker is a real one, behind a proxy of the test's own that is slow when it is told to be.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from streamer.config.settings import LEVELS, SHED_BY_DEFAULT
from streamer.events.stream import StreamHeartbeat, StreamManifest, StreamShed
from streamer.operation.look import Look
from streamer.verify.report import VerifyReport
from tests.brokers import KafkaBroker
from tests.kernel.agent import ROOT, Agent, decoded, kind_of
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import open_missing
from tests.throttle import Throttle

pytestmark = [pytest.mark.kernel, pytest.mark.kafka]

TOPIC = "kernel-events"
SLOW = 40_000
"""Bytes a second that the broker takes when it is slow: a hundred events, or less."""
EACH = 250
"""Opens of a turn."""
QUIET = 200
RATES = (1, *SHED_BY_DEFAULT["file.open"])
BUDGET = 1 << 20
RECOVERED = 5.0
"""Seconds after the end of the pressure, by when nothing is shed any more."""


class Done(NamedTuple):
    """What the actor did while the broker was slow."""

    opens: int
    execs: int


def act(program: str, over: str) -> Done:
    """Opens and executions: some, then as many as there is time for until `over` is there; some."""
    open_missing("/no/before/", QUIET)
    checkpoint()
    opens = execs = 0
    while not os.path.exists(over):
        open_missing("/no/during/", EACH)
        opens += EACH
        os.waitpid(os.posix_spawn(program, [b"during", str(execs).encode()], {}), 0)
        execs += 1
        time.sleep(0.02)
    checkpoint(Done(opens, execs))
    open_missing("/no/after/", QUIET)
    return Done(opens, execs)


def config(address: str) -> str:
    return f"""heartbeat_seconds = 1
[shedding]
enabled = true
[[sinks]]
type = "kafka"
bootstrap = ["{address}"]
topic = "{TOPIC}"
compression = "none"
batch_bytes = 16384
budget_bytes = {BUDGET}
"""


class Asked(Agent):
    """An agent with no sink but the broker: how it is, it is asked. That opens files, but not in
    the actor's cgroup.
    """

    def look(self) -> Look | None:
        """By the real command; None: it does not answer yet."""
        control = str(self.output.parent / "control.sock")
        command = [sys.executable, "-m", "streamer", "status", "--json", "--socket", control]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return msgspec.json.decode(done.stdout, type=Look) if done.stdout else None

    def until(self, condition: Callable[[Look], bool], limit: float) -> Look:
        deadline = time.monotonic() + seconds(limit)
        while (found := self.look()) is None or not condition(found):
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found

    def wait_for(self, marker: bytes, count: int = 1, timeout: float = 60) -> None:
        """Until it is ready: there is no file that a marker could be in."""
        self.until(lambda look: not look.not_ready, timeout)


class Shed(NamedTuple):
    """A run with a slow broker, and what is in its topic afterwards."""

    events: list[Any]
    done: Done
    pressed: Look
    over: Look
    fast_ns: int
    """When the broker was fast again, since boot."""
    verified: VerifyReport
    text: str
    stderr: str

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.events if kind_of(event) == kind]

    def opens(self, when: str) -> list[Any]:
        return [event for event in self.of("file.open") if event.path.startswith(f"/no/{when}/")]

    @property
    def heartbeat(self) -> StreamHeartbeat:
        (found,) = (one for one in self.of("stream.heartbeat") if one.final)
        assert isinstance(found, StreamHeartbeat)
        return found

    @property
    def records(self) -> list[StreamShed]:
        return self.of("stream.shed")


def by_kcat(address: str) -> list[Any]:
    command = ["kcat", "-C", "-b", address, "-t", TOPIC, "-o", "beginning", "-e", "-q"]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    return [decoded(line) for line in output.splitlines()]


def verify(*arguments: str) -> str:
    command = [sys.executable, "-m", "streamer", "verify", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shed(cgroups: Path, subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shed]:
    directory = tmp_path_factory.mktemp("shedding")
    with Throttle() as throttle:
        # The broker sends its clients to the proxy.
        own = (f"advertised.listeners=PLAINTEXT://127.0.0.1:{throttle.port}",)
        broker = KafkaBroker(directory / "kafka", own)
        throttle.target = broker.port
        with broker, Scope(cgroups) as scope:
            yield record(directory, subject, throttle, broker, scope)


def record(
    directory: Path, subject: Path, throttle: Throttle, broker: KafkaBroker, scope: Scope
) -> Shed:
    address = f"127.0.0.1:{throttle.port}"
    agent = Asked(
        directory / "agent",
        *scope.options,
        events="file.open,process.*",
        config=config(address),
        sinks=None,
    )
    over = directory / "over"
    with agent, scope.start(act, str(subject), str(over)) as actor:
        actor.reached()
        # Level 0, and all of it is delivered.
        agent.until(lambda look: all(not one.pending for one in look.sinks.values()), 20)
        throttle.rate = SLOW
        actor.proceed()
        pressed = agent.until(lambda look: look.shedding.level == LEVELS, 60)
        time.sleep(seconds(3))
        over.touch()
        done = actor.reached()
        throttle.rate = None
        fast_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        calm = agent.until(lambda look: look.shedding.level == 0, 20)
        time.sleep(1)  # the record of it follows with the next look
        actor.proceed()
        actor.result()
        agent.stop(check=False)
        url = f"kafka://{address}/{TOPIC}"
        report = msgspec.json.decode(verify("--json", url), type=VerifyReport)
        return Shed(
            by_kcat(address), done, pressed, calm, fast_ns, report, verify(url), agent.stderr
        )


def test_all_executions_are_there(shed: Shed) -> None:
    """What is critical is never shed."""
    words = [event.argv for event in shed.of("process.exec")]
    assert words == [["during", str(i)] for i in range(shed.done.execs)]
    assert {event.weight for event in shed.of("process.exec")} == {1}
    for kind in ("process.exec", "process.fork", "process.exit"):
        counts = shed.heartbeat.counts[kind]
        assert (counts.read, counts.shed, counts.lost) == (shed.done.execs, 0, 0)


def test_the_account_is_exact(shed: Shed) -> None:
    counts = shed.heartbeat.counts["file.open"]
    assert counts.produced - counts.filtered == shed.done.opens + 2 * QUIET
    assert counts.produced == counts.read + counts.filtered + counts.shed + counts.lost
    assert counts.read == len(shed.of("file.open"))
    assert counts.lost == 0
    assert counts.shed > shed.done.opens // 2


def test_what_came_before_and_after_is_whole(shed: Shed) -> None:
    for when in ("before", "after"):
        opens = shed.opens(when)
        assert len(opens) == QUIET
        assert {event.weight for event in opens} == {1}


def test_the_weights_are_those_of_the_levels(shed: Shed) -> None:
    weights = Counter(event.weight for event in shed.of("file.open"))
    assert weights.keys() <= {*RATES}
    assert weights[RATES[-1]] > 0


def test_the_weights_add_up_to_what_happened(shed: Shed) -> None:
    """Within six standard deviations: of n events, one in r, the sum has a variance of n(r - 1)."""
    opens = shed.of("file.open")
    total = shed.done.opens + 2 * QUIET
    variance = sum(event.weight * (event.weight - 1) for event in opens)
    assert abs(sum(event.weight for event in opens) - total) < 6 * variance**0.5


def test_the_stream_says_what_was_shed_and_why(shed: Shed) -> None:
    records = shed.records
    assert (records[0].before, records[-1].level) == (0, 0)
    assert [one.before for one in records[1:]] == [one.level for one in records[:-1]]
    assert max(one.level for one in records) == LEVELS
    for one in records:
        assert one.rates == {"file.open": RATES[one.level]}
        assert one.since_boot_ns <= one.boot_ns
    told = sum(one.kinds.get("file.open", 0) for one in records)
    assert told == shed.heartbeat.counts["file.open"].shed
    worst = next(one for one in records if one.level == LEVELS)
    assert worst.causes[0].where.startswith("kafka://")
    assert worst.causes[0].measure in ("budget", "lag")
    assert "of its budget" in worst.reason or "under way" in worst.reason


def test_each_event_bears_the_rate_of_its_time(shed: Shed) -> None:
    """That is told with the moment from which it holds."""
    changes = [(0, 0)]
    changes += [(one.since_boot_ns, one.level) for one in shed.records if one.level != one.before]
    for event in shed.of("file.open"):
        # The word was set just before the moment was taken.
        near = {level for at, level in changes if abs(at - event.boot_ns) < 50_000_000}
        last = max(at for at, _ in changes if at <= event.boot_ns)
        level = next(level for at, level in changes if at == last)
        assert event.weight in {RATES[one] for one in near | {level}}


def test_all_of_it_is_reported_again_within_five_seconds(shed: Shed) -> None:
    (end,) = (one for one in shed.records if one.level == 0)
    assert (end.since_boot_ns - shed.fast_ns) / 1e9 < seconds(RECOVERED)


def test_the_manifest_says_what_can_be_shed(shed: Shed) -> None:
    manifest = shed.of("stream.manifest")[0]
    assert isinstance(manifest, StreamManifest)
    assert manifest.shedding == {"file.open": list(RATES[1:])}


def test_verify_finds_nothing_unexplained(shed: Shed) -> None:
    report = shed.verified
    assert report.ok
    assert (report.unexplained, report.pending) == (0, 0)
    ((run,),) = [host.runs for host in report.hosts.values()]
    (period,) = run.shed_periods
    assert run.shed_periods_total == 1
    assert period.level == LEVELS
    assert period.kinds == {"file.open": shed.heartbeat.counts["file.open"].shed}
    assert period.from_ns < period.to_ns
    assert f"{period.kinds['file.open']:,} file.open" in shed.text
    assert "shed under pressure (up to level 3" in shed.text


def test_status_says_it(shed: Shed) -> None:
    found = shed.pressed.shedding
    assert (found.enabled, found.level) == (True, LEVELS)
    assert found.rates == {"file.open": RATES[LEVELS]}
    assert found.reason
    assert shed.over.shedding.rates == {"file.open": 1}
    assert shed.over.shedding.reason == ""


def test_the_log_says_when_it_begins_and_ends(shed: Shed) -> None:
    assert shed.stderr.count("under pressure, events are sampled") == 1
    assert shed.stderr.count("the pressure is over") == 1
