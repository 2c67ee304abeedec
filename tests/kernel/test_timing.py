"""What another tenant learns of a victim's secret from published times, and does not if coarse."""

from __future__ import annotations

import ctypes
import json
import platform
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from streamer.agent.timing_key import NAME
from streamer.kernel.system_calls import numbers_of
from tests.kernel.agent import ROOT, Agent
from tests.kernel.pace import SLOWNESS
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import system_call
from tests.kernel.unprivileged import UID, become

pytestmark = pytest.mark.kernel

MS = 1_000_000
BITS, ROUNDS = 64, 5
PACE = 1 if SLOWNESS == 1 else 4
SHORT, LONG, TICK = 2 * MS * PACE, 8 * MS * PACE, 25 * MS * PACE
RESOLUTION = 1_000_000 * 1000
NEARLY_ALL = 56
CHANCE = 46
"""Of 64, guessing finds more once in ten thousand times."""


def victim(secret: list[bool], begin_ns: int) -> None:
    """Its calls take longer where a bit of the secret is 1."""
    become(UID)
    nanosleep = numbers_of(platform.machine())["nanosleep"]
    words = {bit: (ctypes.c_long * 2)(0, LONG if bit else SHORT) for bit in (False, True)}
    for number in range(BITS * ROUNDS):
        due = begin_ns + number * TICK - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        time.sleep(max(due, 0) / 1e9)
        system_call(nanosleep, words[secret[number % BITS]], None)


def guesses(output: Path, plan: dict[str, int]) -> dict[str, list[bool]]:
    """What the observer, an unprivileged process with the stream alone, takes for the secret."""
    with output.open() as stream:
        found = subprocess.run(
            [sys.executable, "-m", "tests.kernel.observer", json.dumps(plan)],
            stdin=stream,
            capture_output=True,
            cwd=ROOT,
            check=True,
            user=UID + 1,
            group=UID + 1,
            extra_groups=[],
        )
    answer: dict[str, list[bool]] = json.loads(found.stdout)
    return answer


def observe(scope: Scope, directory: Path, secret: list[bool], timing: str) -> tuple[Any, Any]:
    """The recording of the victim at work, and how many bits each attack has right."""
    config = f'[kernel]\nsyscalls = ["nanosleep"]\nsyscall_slow_ms = 1\n{timing}'
    with Agent(directory, *scope.options, events="syscall.slow", config=config) as agent:
        begin_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 200 * MS
        scope.act(victim, secret, begin_ns)
        recording = agent.stop()
    plan = {
        "begin_ns": begin_ns,
        "tick_ns": TICK,
        "bits": BITS,
        "rounds": ROUNDS,
        "short_ns": SHORT,
        "long_ns": LONG,
        "resolution_ns": recording.manifest.resolution_ns,
    }
    right = {
        attack: sum(a == b for a, b in zip(guess, secret, strict=True))
        for attack, guess in guesses(agent.output, plan).items()
    }
    return recording, right


def test_a_secret_is_read_from_exact_times_and_not_from_coarse_ones(
    scope: Scope, tmp_path: Path
) -> None:
    """The same victim and the same observer; only `timing` differs."""
    tmp_path.chmod(0o755)
    secret = [bool(secrets.randbits(1)) for _ in range(BITS)]

    exact, right = observe(scope, tmp_path / "exact", secret, "")
    assert len(exact.of("syscall.slow")) == BITS * ROUNDS
    assert exact.manifest.resolution_ns == 0
    print("exact", right)
    assert right["by_durations"] >= NEARLY_ALL
    assert right["by_times"] >= NEARLY_ALL

    timing = f"[timing]\nresolution_us = {RESOLUTION // 1000}\n"
    coarse, right = observe(scope, tmp_path / "coarse", secret, timing)
    events = coarse.of("syscall.slow")
    assert len(events) == BITS * ROUNDS
    print("coarse", right)
    assert {event.duration_ns for event in events} == {RESOLUTION}
    assert {event.boot_ns % RESOLUTION for event in events} == {0}
    assert len({event.start_boot_ns for event in events}) == 1
    assert right["by_durations"] <= CHANCE
    assert right["by_times"] <= CHANCE


def open_twice() -> None:
    """Once for each run."""
    for _ in range(2):
        checkpoint()
        Path("/etc/passwd").read_bytes()
    checkpoint()


def test_a_process_is_the_same_one_in_the_next_run(scope: Scope, tmp_path: Path) -> None:
    """What tells its coarse start from that of others is made with a key that is kept."""
    config = "[timing]\nresolution_us = 100000\n"
    seen = []
    with scope.start(open_twice) as actor:
        for run in range(2):
            actor.reached()
            with Agent(
                tmp_path / str(run), *scope.options, events="file.open", config=config
            ) as agent:
                actor.proceed()
                agent.wait_for(b'"/etc/passwd"')
                seen.append({event.start_boot_ns for event in agent.stop().of("file.open")})
            for name in (NAME, "run.json"):
                (tmp_path / "1").mkdir(exist_ok=True)
                (tmp_path / str(run) / name).rename(tmp_path / "1" / name)
        actor.reached()
        actor.proceed()
        actor.result()
    assert len(seen[0]) == 1
    assert seen[0] == seen[1]
    key = tmp_path / "1" / NAME
    assert (key.stat().st_mode & 0o777, key.stat().st_uid) == (0o600, 0)
