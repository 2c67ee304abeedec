"""For tests of the spool under the real agent: its configuration, and what came of a run."""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from streamer.spool.place import LOG, NAME
from streamer.spool.store import Item, Store
from tests.kernel.agent import Agent, decoded, kind_of
from tests.kernel.pace import repetitions, seconds
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing

TOPIC = "kernel-events"
KILLS = repetitions(4, 2)
FLOOD = repetitions(20_000, 5_000)


def agent_with(
    tmp_path: Path,
    scope: Scope,
    sinks: str,
    name: str,
    *,
    events: str = "file.open",
    spool: Path | None = None,
    most: int = 1 << 28,
) -> Agent:
    """With a file sink, and `sinks`, in TOML, of which some have a spool."""
    directory = tmp_path / name
    config = f"""heartbeat_seconds = 1
grace_seconds = 5
[spool]
directory = "{spool or tmp_path / "state" / "spool"}"
max_bytes = {most}
[[sinks]]
type = "file"
path = "{directory / "events.ndjson"}"
{sinks}
"""
    made = Agent(directory, *scope.options, events=events, config=config, sinks=None)
    # The note is of all runs, as the spool is.
    toml = directory / "streamer.toml"
    text = toml.read_text().replace(str(directory / "run.json"), str(tmp_path / "run.json"))
    toml.write_text(text)
    return made


def numbered(events: list[Any]) -> list[Any]:
    return [event for event in events if not kind_of(event).startswith("stream.")]


def plain(event: Any) -> bytes:
    """An event but for whether it was replayed."""
    return msgspec.json.encode(msgspec.structs.replace(event, replayed=msgspec.UNSET))


def heartbeats(running: Agent) -> list[bytes]:
    lines = running.output.read_bytes().splitlines()
    return [line for line in lines if line.startswith(b'{"event":"stream.heartbeat"')]


def wait_until_empty(running: Agent) -> None:
    """Until the sinks with a spool have all that they were given."""
    deadline = time.monotonic() + seconds(60)
    before = len(heartbeats(running))
    while time.monotonic() < deadline:
        time.sleep(0.3)
        beats = heartbeats(running)[before:]
        if beats and all(
            not counts.spooled and counts.pending <= 3
            for name, counts in decoded(beats[-1]).sink_counts.items()
            if not name.startswith("file")
        ):
            return
    raise AssertionError(f"not emptied: {decoded(beats[-1]).sink_counts}: {running.stderr}")


def check_order(events: list[Any]) -> None:
    """In order for each run, ring and CPU, but for what was sent again."""
    last: dict[tuple[str, ...], int] = defaultdict(int)
    known: set[str] = set()
    for event in numbered(events):
        if event.id in known:
            continue
        known.add(event.id)
        place = tuple(event.id.split("-")[:3])
        assert event.seq > last[place], event.id
        last[place] = event.seq


def open_until(flag: str, prefix: str) -> int:
    """On one CPU, until there is a file `flag`: numbers are in the order of the paths."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    count = 0
    while not os.path.exists(flag):  # not of the kind that is observed
        for _ in range(20):
            open_missing(f"{prefix}{count}/", 1)
            count += 1
        time.sleep(0.002)
    return count


def spooled_after_kill(tmp_path: Path) -> list[Any]:
    """The events that are on disk."""
    place, copy = tmp_path / "state" / "spool", tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in (NAME, LOG):
        shutil.copy(place / name, copy / name)
    store = Store(str(copy / NAME), 1 << 30, new=False)
    store.use()
    items = [one for sink in store.found() for one in store.next(sink, 1 << 40)]
    store.close()
    assert all(isinstance(one, Item) for one in items)
    return [
        decoded(line) for one in items if isinstance(one, Item) for line in one.data.splitlines()
    ]
