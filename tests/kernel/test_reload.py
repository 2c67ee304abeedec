"""SIGHUP: another configuration for a running agent, with nothing lost, repeated or half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import MosquittoBroker, subscribed
from tests.kernel.agent import ROOT, Agent, Recording, decoded, kind_of
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

EACH = 25


class Reloadable(Agent):
    """An agent whose configuration is all in its file, which changes while it runs."""

    def __init__(self, directory: Path, **config: str) -> None:
        """`config` as for `written`."""
        self.config = directory / "streamer.toml"
        self._note = ""
        super().__init__(directory, sinks=None)
        at = self._command.index("--events")
        del self._command[at : at + 2]
        self._note = self.config.read_text()
        self.write(**config)

    def write(self, events: str = "", filters: str = "", sinks: str = "", more: str = "") -> None:
        """Root's alone, and never half of it: `events` of TOML's array, the others as they are."""
        sinks = sinks or sink_of(self.output)
        text = f"{self._note}events = [{events}]\n{more}\n[filters]\n{filters}\n{sinks}\n"
        new = self.config.with_suffix(".new")
        with open(os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        new.replace(self.config)

    def reload(self, outcome: str = "was read anew: ") -> str:
        """Send SIGHUP, and wait for what comes of it. The line of the log."""
        before = self.stderr.count(outcome)
        self.send(signal.SIGHUP)
        deadline = time.monotonic() + seconds(20)
        while self.stderr.count(outcome) == before:
            assert time.monotonic() < deadline, self.stderr
            assert self.process.poll() is None, self.stderr
            time.sleep(0.01)
        return next(line for line in reversed(self.stderr.splitlines()) if outcome in line)


def sink_of(path: Path, more: str = "") -> str:
    return f'[[sinks]]\ntype = "file"\npath = "{path}"\n{more}\n'


def within(scope: Scope, more: str = "") -> str:
    return f"cgroups = [{scope.id}]\n{more}\n"


def opens(recording: Recording, base: Path) -> Counter[str]:
    """Of the test's own files, by their directory."""
    paths = [Path(event.path) for event in recording.of("file.open")]
    return Counter(path.parent.name for path in paths if path.is_relative_to(base))


def manifests(recording: Recording) -> list[Any]:
    return recording.of("stream.manifest")


# ---------------------------------------------------------------- filters


def open_pairs(base: str) -> list[tuple[int, int]]:
    """Until a file `stop` is there: `a/N` and `b/N` in turn. When each was begun and over."""
    times = []
    number = 0
    while not os.path.exists(f"{base}/stop"):
        for place in "ab":
            before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            open_missing(f"{base}/{place}/{number}-", 1)
            times.append((before, time.clock_gettime_ns(time.CLOCK_BOOTTIME)))
        number += 1
        time.sleep(0.0002)
    return times


def opens_missed(recording: Recording) -> int:
    """How often the kernel left the programs at opens out: before 7.0 it does not."""
    missed = recording.heartbeat.missed
    return sum(n for program, n in missed.items() if program.startswith(("on_open", "on_creat")))


def test_filters_change_under_load(scope: Scope, tmp_path: Path) -> None:
    """Of each pair of opens one is left out by the old filters, and the other by the new ones.

    The lists differ in many entries, in several maps, so that changing them takes long.
    """
    base = tmp_path / "files"
    base.mkdir()

    def filters(number: int) -> str:
        pids = [4_000_000 + number * 1000 + i for i in range(300)]
        more = f'exclude_path_prefixes = ["{base}/{"ba"[number % 2]}/"]\nexclude_pids = {pids}\n'
        more += f"exclude_uids = [{10_000_000 + number}]\n" if number % 3 else ""
        return within(scope, more)

    turns, pause = 12, seconds(0.15)
    moment = seconds(0.05) * 1e9  # a manifest says since when it holds, which is once it does
    with Reloadable(tmp_path, events='"file.open"', filters=filters(0)) as agent:
        with scope.start(open_pairs, str(base)) as actor:
            for number in range(1, turns):
                time.sleep(pause)
                agent.write(events='"file.open"', filters=filters(number))
                agent.reload()
            time.sleep(pause)
            (base / "stop").touch()
            times = actor.result()
        recording = agent.stop()
    since = [one.since_boot_ns for one in manifests(recording)]
    assert len(since) == turns
    assert since == sorted(set(since))
    assert since[0] == 0
    paths = [e.path for e in recording.of("file.open") if e.path.startswith(f"{base}/")]
    kept = Counter(paths)
    assert set(kept.values()) == {1}
    missed = opens_missed(recording)
    judged, unseen = 0, 0
    for index, (before, after) in enumerate(times):
        number, place = divmod(index, 2)
        turn = bisect_right(since, before) - 1
        if turn + 1 < turns and after > since[turn + 1] - moment:
            continue
        judged += 1
        path = f"{base}/{'ab'[place]}/{number}-0"
        wanted = (turn + place) % 2 == 0
        assert kept[path] <= wanted, (path, turn)
        unseen += wanted - kept[path]
    assert unseen <= missed
    assert judged > len(times) // 4
    # In between, too: of a pair both, or neither, only where the change was between the two.
    assert abs(len(paths) - len(times) // 2) < turns + missed
    told = [one.filters["exclude_path_prefixes"] for one in manifests(recording)]
    assert told == [[f"{base}/{'ba'[number % 2]}/"] for number in range(turns)]


# ---------------------------------------------------------------- kinds


def open_and_run(base: str, program: str) -> None:
    open_missing(f"{base}/", EACH)
    for _ in range(5):
        subprocess.run([program], check=False)


def test_kinds_go_off_and_on(scope: Scope, subject: Path, tmp_path: Path) -> None:
    """Their programs are loaded when they are needed, and unloaded when they are not."""
    base = tmp_path / "files"
    execs = []
    turns = (
        '"process.exec"',
        '"process.exec", "file.open"',
        '"file.open"',
        '"process.exec", "process.exit", "net.connect"',
        '"file.open", "process.exec"',
    )
    with Reloadable(tmp_path, events=turns[0], filters=within(scope)) as agent:
        for turn, events in enumerate(turns):
            if turn:
                agent.write(events=events, filters=within(scope))
                agent.reload()
            scope.act(open_and_run, str(base / str(turn)), str(subject))
            execs.append(time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        recording = agent.stop()
    assert opens(recording, base) == {"1": EACH, "2": EACH, "4": EACH}
    started = Counter(bisect_right(execs, event.boot_ns) for event in recording.of("process.exec"))
    assert started == {0: 5, 1: 5, 3: 5, 4: 5}
    assert len({e.pid for e in recording.of("process.exit") if e.comm == subject.name}) == 5
    told = manifests(recording)
    assert [sorted(one.coverage) for one in told] == [sorted(eval(f"[{one}]")) for one in turns]
    sensors = [sorted({program.sensor for program in one.programs}) for one in told]
    assert sensors[0] == ["process"]
    assert sensors[3] == ["net", "process"]
    assert "net.connect" not in {k for p in told[4].programs for k in p.kinds}
    assert told[1].changes == ["events: file.open on"]


def test_what_a_kind_needs_and_is_not_there_is_refused(scope: Scope, tmp_path: Path) -> None:
    with Reloadable(tmp_path, events='"net.bind"', filters=within(scope)) as agent:
        for events, reason in (
            ('"net.bind", "net.dns"', "net.dns: it attaches by cgroup"),
            ('"net.bind", "net.drop"', "net.drop: its programs are part of tracepoint_net"),
        ):
            agent.write(events=events, filters=within(scope))
            assert reason in agent.reload("the configuration stays as it was: ")
        recording = agent.stop()
    assert len(manifests(recording)) == 1


def test_sampling_changes(scope: Scope, tmp_path: Path) -> None:
    base = tmp_path / "files"
    with Reloadable(tmp_path, events='"file.open"', filters=within(scope)) as agent:
        scope.act(open_missing, f"{base}/all/", EACH)
        more = 'kernel.sample = { "file.open" = 1048576 }'
        agent.write(events='"file.open"', filters=within(scope), more=more)
        agent.reload()
        scope.act(open_missing, f"{base}/few/", EACH)
        agent.write(events='"file.open"', filters=within(scope))
        agent.reload()
        scope.act(open_missing, f"{base}/again/", EACH)
        recording = agent.stop()
    found = opens(recording, base)
    shed = recording.heartbeat.counts["file.open"].shed
    assert (found["all"], found["again"]) == (EACH, EACH)
    assert found["few"] + shed >= EACH
    assert found["few"] <= 1


# ---------------------------------------------------------------- sinks


def of_file(path: Path) -> list[Any]:
    return [decoded(line) for line in path.read_bytes().splitlines()]


def verified(*paths: Path) -> str:
    command = [sys.executable, "-m", "streamer", "verify", "--no-progress", "--ended"]
    command += map(str, paths)
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_a_sink_goes_and_comes_back(scope: Scope, tmp_path: Path) -> None:
    """It has all until it goes, and all from its return; it is told what was in between."""
    base, other = tmp_path / "files", tmp_path / "other.ndjson"
    both = sink_of(tmp_path / "events.ndjson") + sink_of(other)
    name = f"file:{other}"
    # The heartbeats are those that a change brings.
    wanted = {"events": '"file.open"', "filters": within(scope), "more": "heartbeat_seconds = 3600"}
    with Reloadable(tmp_path, sinks=both, **wanted) as agent:
        scope.act(open_missing, f"{base}/first/", EACH)
        agent.wait_for(b"/first/", EACH)  # what is not read yet would come after it has gone
        agent.write(**wanted)
        line = agent.reload()
        assert f"sinks: {name} gone" in line
        scope.act(open_missing, f"{base}/second/", 2 * EACH)
        agent.wait_for(b"/second/", 2 * EACH)
        agent.wait_for(b'{"event":"stream.heartbeat"')
        assert "goes on without this sink" in verified(other)
        agent.write(sinks=both, **wanted)
        assert f"sinks: {name} new" in agent.reload()
        scope.act(open_missing, f"{base}/third/", 3 * EACH)
        recording = agent.stop(check=False)
    recording._check_ids()
    recording.check_sequence()
    recording.check_watermarks()
    assert opens(recording, base) == {"first": EACH, "second": 2 * EACH, "third": 3 * EACH}
    its = of_file(other)
    assert len({event.id for event in its}) == len(its)
    mine = [Path(event.path).parent.name for event in its if kind_of(event) == "file.open"]
    mine = [one for one in mine if one in ("first", "second", "third")]
    assert Counter(mine) == {"first": EACH, "third": 3 * EACH}
    kinds = [kind_of(event) for event in its if kind_of(event) != "file.open"]
    assert kinds == [
        *("stream.manifest", "stream.manifest", "stream.heartbeat"),
        *("stream.manifest", "stream.loss", "stream.heartbeat"),
    ]
    (loss,) = [event for event in its if kind_of(event) == "stream.loss"]
    missing = {e.id for e in recording.of("file.open")} - {e.id for e in its}
    assert (loss.stage, loss.count) == ("sink", len(missing))
    assert [one.sinks for one in manifests(recording)] == [
        [f"file:{agent.output}", name],
        [f"file:{agent.output}"],
        [f"file:{agent.output}", name],
    ]
    beats = [name in one.sink_counts for one in recording.of("stream.heartbeat")]
    # When it had delivered all, and after it had come back.
    assert beats[0]
    assert beats[-1]
    first = recording.of("stream.heartbeat")[0].sink_counts[name]
    assert (first.pending, first.dropped) == (0, 0)
    assert first.received == first.delivered == kinds_before(its, "stream.loss")
    verified(agent.output)
    verified(other)


def kinds_before(events: list[Any], kind: str) -> int:
    """How many records a sink got before it left: all before its third manifest."""
    at = [i for i, event in enumerate(events) if kind_of(event) == "stream.manifest"]
    assert kind in map(kind_of, events)
    return at[2]


def test_a_sink_changes_under_load(scope: Scope, tmp_path: Path) -> None:
    """One after the other writes to the same file: nothing is missing, twice, or out of order."""
    base = tmp_path / "files"
    base.mkdir()
    wanted = {"events": '"file.open"', "filters": within(scope)}
    output = tmp_path / "events.ndjson"
    with Reloadable(tmp_path, **wanted) as agent:
        with scope.start(open_pairs, str(base)) as actor:
            for more in ('fsync = "batch"', "budget_bytes = 100000", 'fsync = "interval"', ""):
                time.sleep(0.2)
                agent.write(sinks=sink_of(output, more), **wanted)
                agent.reload()
            (base / "stop").touch()
            times = actor.result()
        recording = agent.stop()
    assert sum(opens(recording, base).values()) == len(times)
    verified(output)


def test_a_broker_is_added_and_taken_out(scope: Scope, tmp_path: Path) -> None:
    """It begins with a manifest, and what it has when it goes is delivered."""
    base, heard = tmp_path / "files", tmp_path / "heard"
    wanted = {"events": '"file.open"', "filters": within(scope)}
    file = sink_of(tmp_path / "events.ndjson")
    with MosquittoBroker(tmp_path / "broker") as broker:
        mqtt = f'[[sinks]]\ntype = "mqtt"\nhost = "127.0.0.1"\nport = {broker.port}\n'
        mqtt += 'topic = "kernel"\nlinger_ms = 3000\n'
        with subscribed(broker, "kernel", heard), Reloadable(tmp_path, **wanted) as agent:
            scope.act(open_missing, f"{base}/before/", EACH)
            agent.wait_for(b"/before/", EACH)
            agent.write(sinks=file + mqtt, **wanted)
            agent.reload()
            scope.act(open_missing, f"{base}/with/", EACH)
            agent.wait_for(b"/with/", EACH)
            agent.write(**wanted)
            agent.reload()
            scope.act(open_missing, f"{base}/after/", EACH)
            agent.wait_for(b'{"event":"stream.heartbeat"', timeout=seconds(20))
            recording = agent.stop(check=False)
    recording._check_ids()
    recording.check_sequence()
    assert opens(recording, base) == {"before": EACH, "with": EACH, "after": EACH}
    its = [decoded(line) for line in heard.read_bytes().splitlines() if line]
    assert kind_of(its[0]) == "stream.manifest"
    paths = [Path(event.path).parent.name for event in its if kind_of(event) == "file.open"]
    assert Counter(one for one in paths if one in ("before", "with", "after")) == {"with": EACH}
    assert f"mqtt://127.0.0.1:{broker.port}/kernel is taken out: " in agent.stderr


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"more": "x = "}, "line 4, column 5: invalid value"),
        ({"more": "heartbeat_second = 1"}, "heartbeat_second"),
        ({"more": "rings.bulk_bytes = 8388608"}, "rings.bulk_bytes: the rings were made"),
        ({"more": 'user = "daemon"\nhost = "x"'}, "user: it takes privileges"),
        ({"filters": 'exes = ["/no/such"]'}, 'streamer.toml: filters.exes[0]: found "/no/such"'),
        ({"sinks": sink_of(Path("/tmp/streamer-not-told"))}, "not /tmp/streamer-not-told"),
    ],
)
def test_what_cannot_be_leaves_all_as_it_was(
    scope: Scope, tmp_path: Path, change: dict[str, str], reason: str
) -> None:
    """Also what is possible, and in the same file: here, another kind."""
    base = tmp_path / "files"
    with Reloadable(tmp_path, events='"file.open"', filters=within(scope)) as agent:
        agent.write(**{"filters": within(scope), **change, "events": '"process.exec"'})
        line = agent.reload("the configuration stays as it was: ")
        assert reason in line
        assert f"{agent.config}: " in line or "exes" in reason
        scope.act(open_missing, f"{base}/", EACH)
        recording = agent.stop()
    assert opens(recording, base) == {"files": EACH}
    assert not recording.of("process.exec")
    assert len(manifests(recording)) == 1
    assert not Path("/tmp/streamer-not-told").exists()


def test_signals_in_quick_succession(scope: Scope, tmp_path: Path) -> None:
    """Each asks for what the file says after it; while one is answered, the next one waits."""
    base = tmp_path / "files"
    base.mkdir()
    with Reloadable(tmp_path, events='"file.open"', filters=within(scope)) as agent:
        with scope.start(open_pairs, str(base)) as actor:
            for number in range(60):
                kinds = '"file.open", "process.exit"' if number % 2 else '"file.open"'
                agent.write(events=kinds, filters=within(scope, f"exclude_pids = [{number + 1}]"))
                agent.send(signal.SIGHUP)
                time.sleep(0.005)
            agent.wait_for(b'"exclude_pids":["60"]')
            (base / "stop").touch()
            times = actor.result()
        recording = agent.stop()
    assert sum(opens(recording, base).values()) == len(times)
    told = manifests(recording)
    assert 2 < len(told) <= 61
    assert told[-1].filters["exclude_pids"] == ["60"]
    assert "stays as it was" not in recording.stderr


def test_the_end_during_a_reload(scope: Scope, tmp_path: Path) -> None:
    with Reloadable(tmp_path, events='"file.open"', filters=within(scope)) as agent:
        agent.write(events='"file.open", "net.connect", "process.*"', filters=within(scope))
        agent.send(signal.SIGHUP)
        agent.stop()
