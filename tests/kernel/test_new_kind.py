"""The kind of the example in CONTRIBUTING.md, from its struct to the published event.

With number 200: nothing is made for numbers below 64 alone. And in a sensor of its own, which is
nothing but a file in bpf/.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.bpf_variant import ROOT, Variant, example_of_a_kind
from tests.kernel.agent import STOP_SECONDS, Agent
from tests.kernel.scope import Scope
from tests.kernel.test_loss import stop_reading

pytestmark = pytest.mark.kernel

KIND, NUMBER = "process.chdir", 200
GOOD, BAD = 30, 12
SENSOR = """
#include "core/filter.bpf.h"

char LICENSE[] SEC("license") = "GPL";

"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree with the kind in it, for which `make gen` was run."""
    changes = example_of_a_kind(NUMBER)
    _, hook = changes.pop("process.bpf.c")
    sensor = {"chdir.bpf.c": SENSOR + str(hook).removesuffix("struct exit_key {")}
    directory = tmp_path_factory.mktemp("kind") / "tree"
    made = Variant(directory, changes, ("core", "process"), sensor)
    ours = shutil.ignore_patterns("bpf", "__pycache__")
    shutil.copytree(ROOT / "streamer", made.root / "streamer", ignore=ours, dirs_exist_ok=True)
    subprocess.run([sys.executable, "-m", "tools.gen"], cwd=made.root, check=True)
    return made.root


def change_directory() -> None:
    directory = os.open(".", os.O_RDONLY)
    for _ in range(GOOD):
        os.fchdir(directory)
    os.close(directory)
    for _ in range(BAD):
        with suppress(OSError):
            os.fchdir(directory)
    for _ in range(GOOD):
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def recorded(agent: Agent) -> list[dict[str, Any]]:
    agent.process.terminate()
    assert agent.process.wait(STOP_SECONDS) == 0, agent.stderr
    return [json.loads(line) for line in agent.output.read_bytes().splitlines()]


def test_events_of_a_new_kind(scope: Scope, tree: Path, tmp_path: Path) -> None:
    """They come whole, and the counters of this kind and of others are right."""
    there = ("env", "-C", str(tree))
    with Agent(tmp_path, *scope.options, events=f"{KIND},process.exec", prefix=there) as agent:
        scope.act(change_directory)
        records = recorded(agent)
    manifest, heartbeat = records[0], records[-1]
    assert manifest["coverage"].keys() == {KIND, "process.exec"}
    assert {kind["status"] for kind in manifest["coverage"].values()} == {"full"}
    sensors = {program["sensor"] for program in manifest["programs"]}
    assert sensors == {"chdir", "process"}
    events = [record for record in records if not record["event"].startswith("stream.")]
    assert Counter(event["event"] for event in events) == {KIND: GOOD + BAD, "process.exec": GOOD}
    numbers = [event["errno"] for event in events if event["event"] == KIND]
    assert numbers == [0] * GOOD + [errno.EBADF] * BAD
    assert {event["cgroup_id"] for event in events} == {scope.id}
    for kind, read in ((KIND, GOOD + BAD), ("process.exec", GOOD)):
        counts = heartbeat["counts"][kind]
        assert (counts["read"], counts["lost"], counts["shed"]) == (read, 0, 0)
        assert counts["produced"] == read + counts["filtered"]
    assert heartbeat["counts"].keys() == {KIND, "process.exec"}


def test_losses_of_a_new_kind(scope: Scope, tree: Path, tmp_path: Path) -> None:
    """Are counted as its own."""
    config = "[rings]\nbulk_bytes = 4096\n"
    there = ("env", "-C", str(tree))
    with Agent(tmp_path, *scope.options, events=KIND, prefix=there, config=config) as agent:
        stop_reading(agent)
        scope.act(change_directory)
        agent.send(signal.SIGCONT)
        records = recorded(agent)
    delivered = sum(record["event"] == KIND for record in records)
    lost = [record for record in records if record["event"] == "stream.loss"]
    assert 0 < delivered < GOOD + BAD
    assert delivered + sum(loss["count"] for loss in lost) == GOOD + BAD
    assert all(loss["kinds"] == {KIND: loss["count"]} for loss in lost)
    assert records[-1]["counts"][KIND]["lost"] == GOOD + BAD - delivered


def test_the_command_knows_it(tree: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "streamer", "events"],
        cwd=tree,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert f"\n{KIND} " in listed
    assert (tree / "schemas" / f"{KIND}.json").exists()
    assert f"## {KIND}\n" in (tree / "docs" / "events.md").read_text()
