"""Floods by one user or container: they cost him, and nobody else, and each event is accounted for.

While nothing reads the rings their room is all there is, so that what becomes of each event does
not depend on how fast anything is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.agent import ROOT, Agent, Recording
from tests.kernel.pace import repetitions
from tests.kernel.roles import Role
from tests.kernel.scope import Scope, checkpoint
from tests.kernel.system import open_missing
from tests.kernel.test_loss import stop_reading
from tests.kernel.unprivileged import CLONE_NEWPID, UID, become, own_namespaces, unshare

pytestmark = pytest.mark.kernel

PROGRAM = "/bin/true"
LARGE = "x" * 16_000
PROCESSES = ("process.exec", "process.fork", "process.exit")
FLOOD = repetitions(500, 250)
"""Spawns of each of four processes: twice what the ring holds, though arguments are cut."""
MINE = 60
SPAWNED = {"during": MINE // 2, "after": MINE - MINE // 2}
"""What root does beside it: for that there is room in what the flood leaves of the ring."""
RING = 1 << 19
CONFIG = f"[rings]\ncritical_bytes = {RING}\nbulk_bytes = {RING}\n"
LOGIN = Path("/proc/self/loginuid")
VICTIM = UID + 500_000
USERS = 2150
"""More than there is room to remember."""


def may_say_who_logged_in() -> bool:
    return LOGIN.exists() and int(LOGIN.read_text()) == 0xFFFFFFFF


def spawn(word: str, argument: str, count: int) -> int:
    """Execute `true` so often, one after the other. How often that was."""
    for i in range(count):
        os.waitpid(os.posix_spawn(PROGRAM, [word, str(i), argument], {}), 0)
    return count


def flood_as_user(argument: str, count: int) -> int:
    become(UID)
    return spawn("flood", argument, count)


def flood_in_namespaces(argument: str, count: int) -> int:
    """As root of user namespaces of his own, another within each."""
    become(UID)
    for _ in range(3):
        own_namespaces(0)
    return spawn("flood", argument, count)


Flooder = Callable[[str, int], int]


def flood(flooder: Flooder, argument: str, processes: int, count: int) -> int:
    roles = [Role("flooder", flooder, argument, count) for _ in range(processes)]
    return sum(int(role.result()) for role in roles)


def flood_and_work(flooder: Flooder, argument: str, processes: int, count: int) -> int:
    """A flood, and root's own work while it goes on and after it. How many spawns the flood had."""
    checkpoint()
    roles = [Role("flooder", flooder, argument, count) for _ in range(processes)]
    spawn("mine", "during", MINE // 2)
    done = sum(int(role.result()) for role in roles)
    spawn("mine", "after", MINE - MINE // 2)
    return done


@contextmanager
def unread(agent: Agent) -> Iterator[None]:
    stop_reading(agent)
    try:
        yield
    finally:
        agent.send(signal.SIGCONT)


def refused(recording: Recording) -> dict[tuple[str, int], Counter[str]]:
    return {(one.payer, one.id): Counter(one.kinds) for one in recording.heartbeat.refused}


def lost(recording: Recording) -> Counter[str]:
    counts = recording.heartbeat.counts.items()
    return Counter({kind: found.lost for kind, found in counts if found.lost})


def verified(agent: Agent) -> tuple[int, str]:
    """Exit status and words of `streamer verify` for what was written."""
    command = [sys.executable, "-m", "streamer", "verify", str(agent.output)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def words(recording: Recording, word: str) -> list[Any]:
    return [event for event in recording.of("process.exec") if event.argv[0] == word]


def assert_root_lost_nothing(recording: Recording, spawned: int) -> None:
    """Of what root did all is there; the rest is delivered, or lost and accounted for."""
    recording.check()
    mine = words(recording, "mine")
    expected = [(word, str(i)) for word, n in SPAWNED.items() for i in range(n)]
    assert [(event.argv[2], event.argv[1]) for event in mine] == expected
    pids = {event.pid for event in mine}
    assert pids <= {e.pid for e in recording.of("process.exit")}
    assert pids <= {e.child_pid for e in recording.of("process.fork")}
    execs = recording.heartbeat.counts["process.exec"]
    assert execs.produced - execs.filtered == spawned + MINE
    assert_none_was_left_out(recording)


def assert_none_was_left_out(recording: Recording) -> None:
    """By the kernel, of those programs that report anything."""
    assert recording.heartbeat.missed.keys() <= {"on_prepare_exec"}


@pytest.mark.parametrize("argument", [LARGE, ""], ids=["large", "small"])
@pytest.mark.parametrize("flooder", [flood_as_user, flood_in_namespaces])
def test_a_flood_while_nothing_is_read(
    scope: Scope, tmp_path: Path, flooder: Flooder, argument: str
) -> None:
    """It fills its user's share, and all that is lost is his."""
    with Agent(tmp_path, *scope.options, events="process.*", config=CONFIG) as agent:
        with scope.start(flood_and_work, flooder, argument, 4, FLOOD) as actor:
            actor.reached()
            with unread(agent):
                actor.proceed()
                spawned = actor.result()
        recording = agent.stop()
    assert_root_lost_nothing(recording, spawned)
    assert refused(recording) == {("user", UID): lost(recording)}
    assert lost(recording).keys() == set(PROCESSES)
    assert lost(recording)["process.exec"] > spawned // 10
    status, said = verified(agent)
    assert status == 0, said


@pytest.mark.parametrize(
    ("processes", "argument"), [(4, LARGE), (6, "")], ids=["four-large", "six-small"]
)
def test_a_flood_while_the_agent_reads(
    scope: Scope, tmp_path: Path, processes: int, argument: str
) -> None:
    """With rings as they are by default, and a file, on a busy machine."""
    with Agent(tmp_path, *scope.options, events="process.*") as agent:
        with scope.start(flood_and_work, flood_as_user, argument, processes, FLOOD) as actor:
            actor.reached()
            actor.proceed()
            spawned = actor.result()
        recording = agent.stop()
    assert_root_lost_nothing(recording, spawned)
    assert refused(recording) == ({("user", UID): lost(recording)} if lost(recording) else {})


def flood_under_other_names(argument: str, count: int) -> int:
    """Who has not logged in may say once, in each process, who that was: his victim, and others."""
    become(UID)
    for i in range(0, count, 20):
        if (pid := os.fork()) == 0:
            LOGIN.write_text(str(VICTIM + i % 200))
            spawn("flood", argument, min(20, count - i))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert status == 0
    return count


def be_named_by_a_flood() -> int:
    """The flood, and meanwhile what the victim does, and root."""
    spawned = flood_and_work(flood_under_other_names, LARGE, 4, FLOOD)
    Role("victim", spawn_as, VICTIM, "victim", 10).result()
    return spawned


def spawn_as(uid: int, word: str, count: int) -> None:
    become(uid)
    spawn(word, "", count)


@pytest.mark.skipif(not may_say_who_logged_in(), reason="a login id is set, or cannot be")
def test_nobody_chooses_who_pays_by_his_login(scope: Scope, tmp_path: Path) -> None:
    """A flood costs its user, and not who he says has logged in."""
    with Agent(tmp_path, *scope.options, events="process.*", config=CONFIG) as agent:
        with scope.start(be_named_by_a_flood) as actor:
            actor.reached()
            with unread(agent):
                actor.proceed()
                actor.result()
        recording = agent.stop()
    recording.check()
    assert refused(recording) == {("user", UID): lost(recording)}
    assert lost(recording)["process.exec"] > FLOOD
    assert len(words(recording, "mine")) == MINE
    assert len(words(recording, "victim")) == 10


# ---------------------------------------------------------------- who is preempted

IDLERS = 4
BESIDE = repetitions(400, 120)
"""What root does on a CPU where others wait in the middle of what they do."""


def spawn_when_idle(count: int) -> int:
    become(UID)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    return spawn("idler", "", count)


def work_beside_idlers(count: int) -> int:
    """All on one CPU, and root pauses so that the others come to run, and are preempted by it."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    roles = [Role("idler", spawn_when_idle, count) for _ in range(IDLERS)]
    for i in range(BESIDE):
        time.sleep(0.001 * (i % 7))
        os.waitpid(os.posix_spawn(PROGRAM, ["mine", str(i)], {}), 0)
    return sum(int(role.result()) for role in roles)


def test_nobody_is_left_out_while_others_are_preempted(scope: Scope, tmp_path: Path) -> None:
    """Whoever is preempted within a program costs nobody else that CPU's events (7.0 and later)."""
    with Agent(tmp_path, *scope.options, events="process.*") as agent:
        spawned = scope.act(work_beside_idlers, BESIDE // IDLERS)
        recording = agent.stop()
    recording.check()
    assert [event.argv[1] for event in words(recording, "mine")] == [str(i) for i in range(BESIDE)]
    pids = Counter(event.pid for event in recording.of("process.exec"))
    assert sorted(pids.values()) == [1] * (spawned + BESIDE)
    for kind, field in (("process.fork", "child_pid"), ("process.exit", "pid")):
        told = Counter(getattr(event, field) for event in recording.of(kind))
        assert {pid: told[pid] for pid in pids} == dict.fromkeys(pids, 1)
    assert_none_was_left_out(recording)
    assert all("on_prepare_exec was not run" in loss.reason for loss in recording.losses)


# ---------------------------------------------------------------- many users


MANY = 400
"""Who has subordinate ids (/etc/subuid) can be 65,536: a file of each of them, set-user-ID."""
FEW = 12
"""What root does beside them: in the last of a ring is room for that."""


def waiting_flooders(argument: str, count: int) -> tuple[list[Role], int]:
    """One for each of many users, who begin when the descriptor is closed: root forks before it."""
    begin, end = os.pipe()

    def spawn_as_one(uid: int) -> int:
        become(uid)
        os.close(end)
        os.read(begin, 1)
        return spawn("flood", argument, count)

    return [Role("flooder", spawn_as_one, VICTIM + i) for i in range(MANY)], end


def be_many_at_once(argument: str, count: int) -> int:
    """A flood by many, and root's own work after it. How many spawns the flood had."""
    roles, end = waiting_flooders(argument, count)
    checkpoint()
    os.close(end)
    spawned = sum(int(role.result()) for role in roles)
    spawn("mine", "after", FEW)
    return spawned


@pytest.mark.parametrize("argument", [LARGE, ""], ids=["large", "small"])
def test_many_users_at_once_leave_something_to_root(
    scope: Scope, tmp_path: Path, argument: str
) -> None:
    """However many they are, of those ids that one user can have many of."""
    events = "process.exec,process.exit"
    with Agent(tmp_path, *scope.options, events=events, config=CONFIG) as agent:
        with scope.start(be_many_at_once, argument, 10) as actor:
            actor.reached()
            with unread(agent):
                actor.proceed()
                actor.result()
        recording = agent.stop()
    recording.check()
    found = refused(recording)
    assert sum(found.values(), Counter()) == lost(recording)
    assert {kind for kind, _ in found} <= {"user", "others"}
    assert lost(recording)["process.exec"] > 5 * MANY
    assert [event.argv[1] for event in words(recording, "mine")] == [str(i) for i in range(FEW)]


# ---------------------------------------------------------------- the last of a ring


USERS_AT_ONCE = 3
OPENS = 20
DEEP = "/" + "x" * 200
"""Part of a path: several make a record that is large."""


def fill_and_open_long_paths() -> None:
    """Small records by many users, until no more than the last part is free; then large ones."""
    checkpoint()
    for uid in range(UID + 1, UID + 1 + USERS_AT_ONCE):
        Role("filler", open_as, uid, 3 * RING // 200 // USERS_AT_ONCE).result()
    open_missing(DEEP * 15 + "/mine/", OPENS)


def open_as(uid: int, count: int) -> None:
    become(uid)
    open_missing("/no/his/", count)


def test_large_records_refused_in_the_last_of_a_ring_are_somebodys(
    scope: Scope, tmp_path: Path
) -> None:
    """All that the programs refuse is said to be of who was refused it."""
    with Agent(tmp_path, *scope.options, events="file.open", config=CONFIG) as agent:
        with scope.start(fill_and_open_long_paths) as actor:
            actor.reached()
            with unread(agent):
                actor.proceed()
                actor.result()
        recording = agent.stop()
    recording.check()
    found = refused(recording)
    assert sum(found.values(), Counter()) == lost(recording)
    mine = [event for event in recording.of("file.open") if "/mine/" in event.path]
    (refused_to_root,) = (n for (kind, _), n in found.items() if kind == "cgroup")
    assert refused_to_root == {"file.open": OPENS - len(mine)}


# ---------------------------------------------------------------- containers


def enter(cgroup: str) -> None:
    Path(cgroup, "cgroup.procs").write_text("0")


def flood_in_nested_cgroups(box: str, numbers: list[int], argument: str, count: int) -> int:
    """As root, from a new cgroup within the container's for every few spawns."""
    for i in range(0, count, 20):
        inner = f"{box}/{os.getpid()}-{i}"
        os.mkdir(inner)
        enter(inner)
        spawn("flood", argument, min(20, count - i))
    enter(box)
    return count


def flood_as_many_users(box: str, numbers: list[int], argument: str, count: int) -> int:
    """In a pid namespace, as a container has it: every few spawns as another user."""
    enter(box)
    unshare(CLONE_NEWPID)
    if init := os.fork():
        _, status = os.waitpid(init, 0)
        return count if status == 0 else -1
    for i in range(0, count, 20):
        os.setresuid(UID + i, UID + i, 0)
        spawn("flood", argument, min(20, count - i))
        os.setresuid(0, 0, 0)
    os._exit(0)


def work_beside_container(box: str, flooder: Callable[..., int]) -> int:
    checkpoint()
    roles = [Role("flooder", flooder, box, [], LARGE, FLOOD) for _ in range(4)]
    spawn("mine", "during", MINE // 2)
    done = sum(int(role.result()) for role in roles)
    spawn("mine", "after", MINE - MINE // 2)
    return done


@pytest.mark.parametrize("flooder", [flood_in_nested_cgroups, flood_as_many_users])
def test_a_flood_in_a_container(scope: Scope, tmp_path: Path, flooder: Callable[..., int]) -> None:
    """It costs the container, whatever cgroups it makes in what it was given, or users it has."""
    box = scope.path / "box"
    box.mkdir()
    try:
        os.chown(box, UID, UID)
        with Agent(tmp_path, *scope.options, events="process.*", config=CONFIG) as agent:
            with scope.start(work_beside_container, str(box), flooder) as actor:
                actor.reached()
                with unread(agent):
                    actor.proceed()
                    spawned = actor.result()
            recording = agent.stop()
        assert_root_lost_nothing(recording, spawned)
        assert refused(recording) == {("cgroup", box.stat().st_ino): lost(recording)}
        assert lost(recording)["process.exec"] > spawned // 10
    finally:
        for inner in [*(path for path in box.iterdir() if path.is_dir()), box]:
            inner.rmdir()


# ---------------------------------------------------------------- what gives way first


def flood_and_open() -> int:
    """Execs, until its user has no room for them; then opens of his and of root."""
    checkpoint()
    spawned = flood(flood_as_user, "", 2, 2 * FLOOD)
    Role("opener", as_user, open_missing, "/no/his/", 40).result()
    open_missing("/no/mine/", 40)
    return spawned


def as_user(function: Callable[..., Any], *arguments: Any) -> None:
    become(UID)
    function(*arguments)


def test_bulk_of_who_floods_gives_way_first(scope: Scope, tmp_path: Path) -> None:
    """His opens are kept back although there is room for them: it is execs that he floods with."""
    with Agent(tmp_path, *scope.options, events="process.*,file.open", config=CONFIG) as agent:
        with scope.start(flood_and_open) as actor:
            actor.reached()
            with unread(agent):
                actor.proceed()
                actor.result()
        recording = agent.stop()
    recording.check()
    paths = [event.path for event in recording.of("file.open")]
    assert [path for path in paths if path.startswith("/no/mine/")] == [
        f"/no/mine/{i}" for i in range(40)
    ]
    assert not [path for path in paths if path.startswith("/no/his/")]
    assert refused(recording) == {("user", UID): lost(recording)}
    assert lost(recording)["file.open"] >= 40


def press_and_execute() -> None:
    checkpoint()
    flood(flood_as_user, LARGE, 1, 2 * FLOOD)
    spawn("mine", LARGE, 5)


def test_arguments_are_cut_shorter_in_a_ring_that_fills_up(scope: Scope, tmp_path: Path) -> None:
    """And marked; whoever has not flooded loses none of his events by their size."""
    with Agent(tmp_path, *scope.options, events="process.exec", config=CONFIG) as agent:
        with scope.start(press_and_execute) as actor:
            actor.reached()
            with unread(agent):
                actor.proceed()
                actor.result()
        agent.wait_for(b'"argv":["mine","4"')  # the last: the ring is empty again
        scope.act(spawn, "calm", LARGE, 1)
        recording = agent.stop()
    recording.check()
    mine = words(recording, "mine")
    assert len(mine) == 5
    for event in mine:
        assert event.argc == 3
        assert event.truncated == ("argv",)
        assert 50 < len(event.argv[2]) < 5000
    (calm,) = words(recording, "calm")
    assert calm.truncated == ("cmdline",)
    assert calm.argv[2] == LARGE
    assert words(recording, "flood")[0].argv[2] == LARGE  # nor what came before it filled up


# ---------------------------------------------------------------- more than are remembered


def be_many() -> None:
    """Somebody floods, then so many others that he is not remembered, then root does its work."""
    checkpoint()
    flood(flood_as_user, LARGE, 2, FLOOD)
    for uid in range(UID + 1, UID + 1 + USERS):
        os.setresuid(uid, uid, 0)
        if (pid := os.fork()) == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        os.setresuid(0, 0, 0)
    spawn("mine", "after", MINE)


def test_more_who_pay_than_are_remembered(scope: Scope, tmp_path: Path) -> None:
    """None of them is refused anything for it, and what was refused stays in the account."""
    config = f"[rings]\ncritical_bytes = {4 * RING}\n"
    events = "process.exec,process.fork"
    with Agent(tmp_path, *scope.options, events=events, config=config) as agent:
        with scope.start(be_many) as actor:
            actor.reached()
            with unread(agent):
                actor.proceed()
                actor.result()
        recording = agent.stop()
    recording.check()
    assert len(words(recording, "mine")) == MINE
    forks = Counter(event.uid for event in recording.of("process.fork"))
    assert [forks[uid] for uid in range(UID + 1, UID + 1 + USERS)] == [1] * USERS
    found = refused(recording)
    assert found
    assert found.keys() <= {("user", UID), ("others", 0)}
    assert sum(found.values(), Counter()) == lost(recording)
