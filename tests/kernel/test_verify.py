"""`streamer verify` on what the real agent wrote: nothing is wrong, and each change to it is found.

The agent publishes the same events to a file, to Kafka and to MQTT, so that each can be read.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from streamer.verify.report import Run, VerifyReport
from tests.brokers import KafkaBroker, MosquittoBroker
from tests.kafka_helpers import create
from tests.kernel.agent import ROOT, Agent, Recording, kind_of
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import open_missing
from tests.kernel.verify_watch import DRAWN_ANEW, Watch

pytestmark = pytest.mark.kernel

OPENS = 3000
CONFIG = "[rings]\nbulk_bytes = 65536\n"


def act() -> None:
    """Opens, of which those in the middle find no room."""
    open_missing("/no/before/", OPENS // 3)
    checkpoint()
    open_missing("/no/meanwhile/", OPENS // 3)
    checkpoint()
    open_missing("/no/after/", OPENS // 3)


def lossy(agent: Agent, scope: Scope) -> Recording:
    """A run with a loss in the kernel."""
    with scope.start(act) as actor:
        actor.reached()
        agent.send(signal.SIGSTOP)
        actor.proceed()
        actor.reached()
        agent.send(signal.SIGCONT)
        agent.wait_for(b'{"event":"stream.loss"')
        actor.proceed()
        actor.result()
    # Its own check knows no losses of stage `stop`, which such a small ring can have at the end.
    return agent.stop(check=False)


def verify(*arguments: str, code: int = 0) -> VerifyReport:
    """The report of the real command."""
    command = [sys.executable, "-m", "streamer", "verify", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr + done.stdout
    return msgspec.json.decode(done.stdout, type=VerifyReport)


def only_run(report: VerifyReport) -> Run:
    ((run,),) = [host.runs for host in report.hosts.values()]
    return run


class Recorded(NamedTuple):
    recording: Recording
    lines: list[bytes]

    @property
    def lost(self) -> int:
        return sum(loss.count for loss in self.recording.losses)

    def numbered(self) -> list[int]:
        """Where the opens are, in order."""
        return [i for i, line in enumerate(self.lines) if line.startswith(b'{"event":"file.open"')]


@pytest.fixture(scope="module")
def recorded(cgroups: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    directory = tmp_path_factory.mktemp("verify")
    with Scope(cgroups) as scope, Agent(directory, *scope.options, config=CONFIG) as agent:
        recording = lossy(agent, scope)
        return Recorded(recording, agent.output.read_bytes().splitlines(keepends=True))


def count_of(recording: Recording) -> int:
    """Events, those of others' connections included."""
    return sum(not kind_of(event).startswith("stream.") for event in recording.all)


def check_against(run: Run, recording: Recording) -> None:
    """The report has what the agent says of itself, to the number."""
    assert run.whole
    assert run.end == "ended"
    assert run.events == count_of(recording)
    assert run.unexplained == run.pending == run.duplicates == 0
    places = {(place.ring, place.cpu): place for place in run.places}
    marks = {(mark.ring, mark.cpu): mark for mark in recording.heartbeat.marks}
    assert places.keys() == marks.keys()
    assert all((p.first, p.last) == (1, marks[where].seq) for where, p in places.items())
    lost = sum(loss.count for loss in recording.losses)
    assert sum(sum(place.explained.values()) for place in places.values()) == lost > 0
    for kind, counts in recording.heartbeat.counts.items():
        account = run.kinds[kind]
        assert (account.produced, account.read) == (counts.produced, counts.read)
        assert (account.there, account.missing) == (counts.read, 0)


def test_nothing_is_wrong_with_what_the_agent_writes(recorded: Recorded, tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_bytes(b"".join(recorded.lines))
    report = verify(str(path))
    assert report.ok
    assert report.malformed == 0
    assert report.records == len(recorded.lines)
    check_against(only_run(report), recorded.recording)


def changed(recorded: Recorded, tmp_path: Path, lines: list[bytes], code: int) -> VerifyReport:
    path = tmp_path / "events"
    path.write_bytes(b"".join(lines))
    report = verify(str(path), code=code)
    assert report.records == len(lines)
    return report


def test_one_that_is_removed_is_found(recorded: Recorded, tmp_path: Path) -> None:
    at = recorded.numbered()
    for index in (at[0], at[len(at) // 2], at[-1]):
        lines = recorded.lines.copy()
        gone = json.loads(lines.pop(index))
        report = changed(recorded, tmp_path, lines, 1)
        (gap,) = [
            (place.ring, place.cpu, gap.seq_from, gap.seq_to)
            for place in only_run(report).places
            for gap in place.gaps
        ]
        assert gap == (gone["ring"], gone["cpu"], gone["seq"], gone["seq"])
        assert only_run(report).kinds["file.open"].missing == report.unexplained == 1
        assert sum(report.explained.values()) == recorded.lost


def test_one_that_is_there_twice_is_found(recorded: Recorded, tmp_path: Path) -> None:
    lines = recorded.lines.copy()
    at = recorded.numbered()
    lines += [lines[at[0]], lines[at[5]]]
    report = changed(recorded, tmp_path, lines, 0)
    assert (report.duplicates, report.unexplained) == (2, 0)
    assert report.events == count_of(recorded.recording)


def test_one_that_is_behind_is_found(recorded: Recorded, tmp_path: Path) -> None:
    lines = recorded.lines.copy()
    at = recorded.numbered()
    before = sum(
        place.out_of_order for place in only_run(changed(recorded, tmp_path, lines, 0)).places
    )
    first = json.loads(lines[at[0]])
    place = first["ring"], first["cpu"]
    end = next(
        i
        for i in range(at[0] + 1, len(lines))
        if (json.loads(lines[i]).get("ring"), json.loads(lines[i]).get("cpu")) == place
    )
    lines.insert(end, lines.pop(at[0]))
    report = changed(recorded, tmp_path, lines, 0)
    assert sum(place.out_of_order for place in only_run(report).places) == before + 1


def test_a_loss_that_is_removed_is_found(recorded: Recorded, tmp_path: Path) -> None:
    lines = [line for line in recorded.lines if not line.startswith(b'{"event":"stream.loss"')]
    report = changed(recorded, tmp_path, lines, 1)
    assert report.unexplained == recorded.lost
    assert only_run(report).kinds["file.open"].missing == 0  # the kernel counts them as lost


def test_a_part_of_it_is_no_wrong(recorded: Recorded, tmp_path: Path) -> None:
    at = recorded.numbered()
    report = changed(recorded, tmp_path, recorded.lines[at[len(at) // 2] :], 0)
    assert not only_run(report).whole


def test_of_the_terminal_s_pipe(recorded: Recorded) -> None:
    command = [sys.executable, "-m", "streamer", "verify", "-"]
    text = b"".join(recorded.lines)
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, check=True)
    assert done.stdout.endswith(b"0 unexplained: all is explained\n")


def test_rotated_files(scope: Scope, tmp_path: Path) -> None:
    """Several files, compressed by the agent while it writes."""
    output = tmp_path / "events.ndjson"
    config = f"""
    [[sinks]]
    type = "file"
    path = "{output}"
    rotate_bytes = 100000
    rotate_keep = 100
    rotate_compress = "gzip"
    """
    with Agent(tmp_path, *scope.options, config=config, sinks=None, output=output) as agent:
        for _ in range(4):
            scope.act(open_missing, "/no/such/", OPENS)
            time.sleep(0.5)  # what comes at once is written at once, into one file
        agent.send(signal.SIGTERM)
        assert agent.process.wait(60) == 0
    report = verify(str(output))
    assert len(report.sources) >= 3
    assert any(name.endswith(".gz") for name in report.sources)
    assert (report.ok, report.duplicates, report.unexplained) == (True, 0, 0)
    run = only_run(report)
    assert (run.whole, run.end, run.kinds["file.open"].there) == (True, "ended", 4 * OPENS)


def test_an_agent_that_is_killed(scope: Scope, tmp_path: Path) -> None:
    """What it held is told by the run after it, in the same file; without that nothing is said."""
    agent = Agent(tmp_path, *scope.options, config="")
    with agent:
        scope.act(open_missing, "/no/first/", OPENS)
        agent.wait_for(b"/no/first/", OPENS)
        os.kill(agent.pid, signal.SIGKILL)
        agent.process.wait()
    report = verify(str(agent.output))
    assert (only_run(report).end, report.ok) == ("open", True)
    report = verify("--ended", str(agent.output), code=1)
    assert only_run(report).problems == ["it has no end, and nobody says what became of it"]
    with Agent(tmp_path, *scope.options, config="") as again:
        again.wait_for(b'{"event":"stream.manifest"', 2)
        scope.act(open_missing, "/no/second/", OPENS)
        again.send(signal.SIGTERM)
        assert again.process.wait(60) == 0
    report = verify("--ended", str(agent.output))
    (host,) = report.hosts.values()
    assert host.restarts == 1
    assert [run.end for run in host.runs] == ["killed", "ended"]
    assert [run.kinds["file.open"].there for run in host.runs] == [OPENS, OPENS]


# ---------------------------------------------------------------- brokers


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    with KafkaBroker(tmp_path_factory.mktemp("kafka")) as running:
        yield running


@pytest.mark.kafka
async def test_a_topic(kafka: KafkaBroker, scope: Scope, tmp_path: Path) -> None:
    """Of several partitions; one event less, one twice; from the middle; while it is written."""
    await create(kafka, "events")
    url = f"kafka://{kafka.address}/events"
    await asyncio.to_thread(_a_topic, kafka, url, scope, tmp_path)


def _a_topic(kafka: KafkaBroker, url: str, scope: Scope, tmp_path: Path) -> None:
    with (
        Watch("--follow", url) as watch,
        Agent(tmp_path, *scope.options, config=CONFIG, sinks=(url,)) as agent,
    ):
        scope.act(open_missing, "/no/first/", 100)  # for which there is room
        watch.until(100)  # while the agent goes on
        recording = lossy(agent, scope)
        report = verify(url)
        check_against(only_run(report), recording)
        assert watch.until(report.records).records == report.records
        code, followed = watch.end()
    assert (code, followed.records, followed.bytes) == (0, report.records, report.bytes)
    assert report.complete
    assert followed.complete
    assert not verify(url, "--duration", "1ms").complete
    check_against(only_run(followed), recording)

    records = kcat(kafka, "events")
    assert (len(records), sum(map(len, records))) == (report.records, report.bytes)
    middle = verify(url, "--from", str(len(records) // 2))
    assert (middle.ok, only_run(middle).whole) == (True, False)
    # offsets are of each partition, and all of a host are in one
    assert middle.records == len(records) - len(records) // 2
    assert verify(url, "--from", "1h").records == len(records)
    assert verify(url, "--from", "end").records == 0
    assert verify(url, "--duration", f"{seconds(5):g}s").records == len(records)

    opens = [i for i, line in enumerate(records) if line.startswith(b'{"event":"file.open"')]
    gone, twice = opens[100], opens[200]
    copy = [line for i, line in enumerate(records) if i != gone] + [records[twice]]
    produce(kafka, "changed", copy)
    report = verify(f"kafka://{kafka.address}/changed", code=1)
    assert (report.unexplained, report.duplicates) == (1, 1)
    number = json.loads(records[gone])["seq"]
    assert [g.seq_from for p in only_run(report).places for g in p.gaps] == [number]


@pytest.mark.kafka
@pytest.mark.parametrize("code", [0, 1])
async def test_a_topic_is_followed(kafka: KafkaBroker, recorded: Recorded, code: int) -> None:
    """What comes is counted while it follows; at Ctrl-C it reports. One that is missing is told."""
    topic = f"followed-{code}"
    await create(kafka, topic)
    await asyncio.to_thread(_followed, kafka, topic, recorded, code)


def _followed(kafka: KafkaBroker, topic: str, recorded: Recorded, code: int) -> None:
    records = [line.rstrip(b"\n") for line in recorded.lines]
    at = recorded.numbered()
    gone = json.loads(records.pop(at[100])) if code else None
    half = len(records) // 2
    with Watch("--follow", f"kafka://{kafka.address}/{topic}") as watch:
        assert watch.until(0).records == 0
        for end, part in ((half, records[:half]), (len(records), records[half:])):
            produce(kafka, topic, part)
            shown = watch.until(end)
            assert shown.records == end
            assert shown.megabytes == round(sum(map(len, records[:end])) / 1e6, 1)
        ended, report = watch.end(signal.SIGTERM if code else signal.SIGINT)
    assert watch.shown.endswith(DRAWN_ANEW)  # nothing of it is left on the terminal
    counts = [one.records for one in watch.lines]
    assert counts == sorted(counts)
    assert {0, half, len(records)} <= {*counts}
    assert (ended, report.records, report.unexplained) == (code, len(records), code)
    gaps = [(p.ring, p.cpu, g.seq_from, g.count) for p in only_run(report).places for g in p.gaps]
    assert gaps == ([(gone["ring"], gone["cpu"], gone["seq"], 1)] if gone else [])


@pytest.mark.kafka
def test_a_topic_for_each_category(kafka: KafkaBroker, scope: Scope, tmp_path: Path) -> None:
    """Which are one stream: numbers of a ring are in several of them."""
    url = f"kafka://{kafka.address}/by-{{category}}"
    with Agent(tmp_path, *scope.options, config=CONFIG, sinks=(url,)) as agent:
        recording = lossy(agent, scope)
    check_against(only_run(verify(url)), recording)
    alone = verify(f"kafka://{kafka.address}/by-file")
    assert (alone.ok, only_run(alone).whole) == (True, False) or alone.unexplained


def kcat(broker: KafkaBroker, topic: str) -> list[bytes]:
    command = ["kcat", "-C", "-b", broker.address, "-t", topic, "-o", "beginning", "-e", "-q"]
    return subprocess.run(command, capture_output=True, check=True).stdout.splitlines()


def produce(broker: KafkaBroker, topic: str, records: list[bytes]) -> None:
    command = ["kcat", "-P", "-b", broker.address, "-t", topic, "-p", "0", "-z", "gzip"]
    subprocess.run(command, input=b"\n".join(records), check=True)


@pytest.mark.mqtt
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_mqtt(scope: Scope, tmp_path: Path, encoding: str) -> None:
    """All that is published while it listens, from the manifest to the last account."""
    with MosquittoBroker(tmp_path / "mosquitto") as broker:
        topic = "kernel/{host}/events"
        url = f"mqtt://{broker.address}/{topic}"
        command = [sys.executable, "-m", "streamer", "verify", "--json", "--follow", url]
        watch: Any = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 30
        while "kernel/+/events" not in broker.log:
            assert time.monotonic() < deadline, broker.log
            time.sleep(0.05)
        sink = f"{url}?encoding={encoding}"
        with Agent(tmp_path, *scope.options, config=CONFIG, sinks=(sink,)) as agent:
            recording = lossy(agent, scope)
        time.sleep(seconds(3))
        watch.send_signal(signal.SIGINT)
        output, _ = watch.communicate(timeout=60)
    report = msgspec.json.decode(output, type=VerifyReport)
    assert watch.returncode == 0, output
    run = only_run(report)
    assert (report.ok, run.events, run.unexplained) == (True, count_of(recording), 0)
    assert run.end == "ended"
