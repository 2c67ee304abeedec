"""Files that others rename, remove or truncate, or the agent rotates, while events come.

Every line of every file is counted: together they are exactly what the account says.
"""

from __future__ import annotations

import gzip
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.kernel.agent import Agent, Recording
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

BURST = 300
BURSTS = 12


def bursts(count: int = BURSTS, size: int = BURST) -> int:
    """Open missing files, with a pause after each burst. How many."""
    for number in range(count):
        open_missing(f"/no/{number}-", size)
        time.sleep(seconds(0.1))
    return count * size


def bursts_until(done: str) -> int:
    """The same, until that file is there."""
    opened = 0
    while not os.path.exists(done):
        opened += bursts(1)
    return opened


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A file in a directory of root's: the process that writes cannot look into it."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    return private / "events.ndjson"


def agent(directory: Path, scope: Scope, output: Path, settings: str = "") -> Agent:
    """An agent whose only sink is the file, with further `settings` of it."""
    config = f'[[sinks]]\ntype = "file"\npath = "{output}"\non_full = "pause"\n{settings}\n'
    events = "file.open"
    return Agent(directory, *scope.options, events=events, config=config, sinks=None, output=output)


def siblings(output: Path) -> list[Path]:
    """The rotated files, the oldest first."""
    found = output.parent.glob(f"{output.name}.[0-9]*")
    return sorted(found, key=lambda path: -int(path.name.split(".")[2]))


def content(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def check(parts: list[bytes], recording: Recording, opened: int) -> Recording:
    """The parts are whole lines, and together one stream in which nothing is missing or twice."""
    for part in parts:
        assert part.endswith(b"\n") or not part
    whole = Recording(b"".join(parts), recording.stderr, 0)
    whole.check()
    assert len(whole.events) == opened
    return whole


def test_renamed_as_logrotate_does_it(scope: Scope, tmp_path: Path, output: Path) -> None:
    """Renamed and made anew, several times, without any signal."""
    with agent(tmp_path, scope, output) as running:
        done = tmp_path / "done"
        with scope.start(bursts_until, str(done)) as actor:
            for number in range(3, 0, -1):
                time.sleep(seconds(0.7))
                output.rename(output.with_suffix(f".ndjson.{number}"))
                output.touch(0o640)
                running.wait_for(b'{"event":"file.open"')
            done.touch()
            opened = actor.result()
        recording = running.stop(check=False)
    parts = [content(path) for path in (*siblings(output), output)]
    assert all(part.count(b'{"event":"file.open"') >= BURST for part in parts[:3])
    check(parts, recording, opened)


def test_removed(scope: Scope, tmp_path: Path, output: Path) -> None:
    """What was written before is gone with it, and nothing else: a descriptor still shows it."""
    with agent(tmp_path, scope, output) as running:
        with scope.start(bursts) as actor:
            running.wait_for(b'{"event":"file.open"', BURST)
            descriptor = os.open(output, os.O_RDONLY)
            output.unlink()
            running.wait_for(b'{"event":"file.open"')
            opened = actor.result()
        recording = running.stop(check=False)
    with open(descriptor, "rb") as file:
        removed = file.read().splitlines(keepends=True)
    kept = output.read_bytes()
    # What went into the file without a name did not count, and was written once more.
    again = set(removed) & set(kept.splitlines(keepends=True))
    assert removed[len(removed) - len(again) :] == [line for line in removed if line in again]
    check([b"".join(line for line in removed if line not in again), kept], recording, opened)


def test_truncated_after_a_copy(scope: Scope, tmp_path: Path, output: Path) -> None:
    """As `copytruncate` of logrotate does it, between two bursts: it loses what comes meanwhile."""
    copies: list[Path] = []
    with agent(tmp_path, scope, output) as running:
        for number in range(3):
            scope.act(bursts, 1)
            running.wait_for(b'{"event":"file.open"', BURST)
            copies.append(Path(shutil.copy(output, output.with_suffix(f".copy{number}"))))
            os.truncate(output, 0)
        recording = running.stop(check=False)
    parts = [path.read_bytes() for path in (*copies, output)]
    assert b"\0" not in b"".join(parts)
    check(parts, recording, 3 * BURST)


@pytest.mark.parametrize("fsync", ["never", "interval", "batch"])
def test_rotated_under_load(scope: Scope, tmp_path: Path, output: Path, fsync: str) -> None:
    """By the helper, into a directory where the process that writes can do nothing; compressed."""
    settings = (
        'rotate_bytes = 200_000\nrotate_keep = 100\nrotate_compress = "gzip"\n'
        f'mode = "0600"\nfsync = "{fsync}"\nfsync_seconds = 0.2'
    )
    with agent(tmp_path, scope, output, settings) as running:
        opened = scope.act(bursts, 20, 1000)
        recording = running.stop(check=False)
    files = siblings(output)
    names = [path.name.removeprefix("events.ndjson.").split(".")[0] for path in files]
    assert names == [str(number) for number in range(len(files), 0, -1)]
    assert len(files) > 20
    assert any(path.suffix == ".gz" for path in files)
    assert {path.stat().st_mode & 0o7777 for path in (*files, output)} == {0o600}
    check([content(path) for path in (*files, output)], recording, opened)


def test_the_rest_is_compressed_by_the_next_run(scope: Scope, tmp_path: Path, output: Path) -> None:
    """Also what an agent that was killed left half done; its part is removed."""
    output.with_suffix(".ndjson.3").write_bytes(b"older\n")
    output.with_suffix(".ndjson.gz.part").write_bytes(b"half")
    settings = 'rotate_seconds = 86400\nrotate_compress = "gzip"'
    with agent(tmp_path, scope, output, settings) as running:
        time.sleep(seconds(1.2))
        scope.act(bursts, 1)
        running.wait_for(b'{"event":"file.open"', BURST)
        packed = output.with_suffix(".ndjson.3.gz")
        deadline = time.monotonic() + seconds(20)
        while not packed.exists() or output.with_suffix(".ndjson.3").exists():
            assert time.monotonic() < deadline, running.stderr
            time.sleep(0.05)
        running.stop()
    assert gzip.decompress(packed.read_bytes()) == b"older\n"
    assert sorted(os.listdir(output.parent)) == ["events.ndjson", "events.ndjson.3.gz"]


def test_a_directory_that_vanishes(scope: Scope, tmp_path: Path, output: Path) -> None:
    """It is said, nothing counts as delivered meanwhile, and all is there when it is back."""
    with agent(tmp_path, scope, output) as running:
        scope.act(bursts, 1)
        running.wait_for(b'{"event":"file.open"', BURST)
        before = output.read_bytes()
        shutil.rmtree(output.parent)
        with scope.start(bursts) as actor:
            wait_for_line(running, "file:", "is down: was removed")
            output.parent.mkdir(mode=0o700)
            opened = BURST + actor.result()
        recording = running.stop(check=False)
    assert "cannot be opened again: No such file or directory; trying again" in recording.stderr
    assert "is up: writing works again" in recording.stderr
    check([before, output.read_bytes()], recording, opened)


def wait_for_line(running: Agent, *words: str) -> None:
    """Wait until a line of the log has all the words."""
    deadline = time.monotonic() + seconds(20)
    while not any(all(word in line for word in words) for line in running.stderr.splitlines()):
        assert time.monotonic() < deadline, running.stderr
        time.sleep(0.02)
