"""Nobody hides behind a filter, by a name, a path, a copy, a cgroup or a mount of his own."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kernel.agent import Agent, Recording
from tests.kernel.roles import Role
from tests.kernel.scope import Scope
from tests.kernel.system import AT_FDCWD, OPENAT, OPENAT2, kernel_is, open_missing, system_call
from tests.kernel.test_file import OpenHow
from tests.kernel.unprivileged import (
    CLONE_NEWNS,
    UID,
    become,
    bind_mount,
    in_child,
    own_namespaces,
)

pytestmark = pytest.mark.kernel

# ---------------------------------------------------------------- executables


def run_by_every_name(program: str, directory: str) -> dict[str, int]:
    """The same file, by names and mounts that a user makes, and copies of it."""
    pids = {"itself": run(program)}
    os.link(program, f"{directory}/hard link")
    os.symlink(program, f"{directory}/symbolic link")
    for name in ("copy", "mounted over"):
        shutil.copy(program, f"{directory}/{name}")
    os.mkdir(f"{directory}/elsewhere")
    shutil.copy(program, f"{directory}/elsewhere/{os.path.basename(program)}")
    for name in ("hard link", "symbolic link", "copy"):
        pids[name] = run(f"{directory}/{name}")
    pids["copy of the same name"] = run(f"{directory}/elsewhere/{os.path.basename(program)}")
    pids["mount"] = Role("mounter", run_mounted, program, f"{directory}/mounted over").result()
    return pids


def run(program: str) -> int:
    pid = os.posix_spawn(program, [b"run"], {})
    os.waitpid(pid, 0)
    return pid


def run_mounted(program: str, place: str) -> int:
    """As a user, in a mount namespace of his own."""
    become(UID)
    own_namespaces(CLONE_NEWNS)
    bind_mount(program, place)
    return run(place)


SAME = {"itself", "hard link", "symbolic link", "mount"}
COPIES = {"copy", "copy of the same name"}


@pytest.mark.parametrize(
    ("option", "seen"), [("--exclude-exe", COPIES), ("--exe", SAME)], ids=["exclude", "include"]
)
def test_an_executable_is_known_by_its_file(
    scope: Scope, subject: Path, open_directory: Path, tmp_path: Path, option: str, seen: set[str]
) -> None:
    """Whatever its name is; and a copy is another one."""
    directory = open_directory / f"hiding{option}"
    directory.mkdir()
    with Agent(tmp_path, *scope.options, option, str(subject)) as agent:
        pids = scope.act(run_by_every_name, str(subject), str(directory))
        recording = agent.stop()
    # Before 6.16 the kernel does not say what it was that ends, so that no end is left out.
    ends = seen if kernel_is(6, 16) else SAME | COPIES
    for kind, names in (("process.exec", seen), ("process.exit", ends)):
        found = {event.pid for event in recording.of(kind)}
        assert {name for name, pid in pids.items() if pid in found} == names


# ---------------------------------------------------------------- cgroups


@contextmanager
def nested(scope: Scope, *levels: str) -> Iterator[Path]:
    """A cgroup in a cgroup in the scope's, and so on."""
    path = scope.path
    with ExitStack() as made:
        for level in levels:
            path /= level
            path.mkdir()
            made.callback(path.rmdir)
        yield path


def move_and_open(cgroup: str, prefix: str) -> None:
    Path(cgroup, "cgroup.procs").write_text("0")
    open_missing(prefix, 1)
    in_child(open_missing, f"{prefix}child-", 1)


def act_in_each(places: dict[str, str]) -> None:
    for name, cgroup in places.items():
        Role("mover", move_and_open, cgroup, f"/no/{name}/").result()
    open_missing("/no/scope/", 1)


def test_a_cgroup_stands_for_all_below_it(scope: Scope, tmp_path: Path) -> None:
    """Kept and left out, however deep; and what is left out stays so below what is kept."""
    with (
        nested(scope, "kept", "in", "deep") as kept,
        nested(scope, "left", "out", "deep") as left,
        nested(scope, "left out") as namesake,
    ):
        places = {"kept": kept, "left": left, "namesake": namesake, "out": left.parent}
        exclusion = ("--exclude-cgroup", str(scope.path / "left"))
        with Agent(tmp_path, *scope.options, *exclusion, events="file.open") as agent:
            scope.act(act_in_each, {name: str(place) for name, place in places.items()})
            recording = agent.stop()
    found = [event.path for event in recording.events if event.path.startswith("/no/")]
    expected = [f"/no/{name}/{n}0" for name in ("kept", "namesake") for n in ("", "child-")]
    assert found == [*expected, "/no/scope/0"]
    ids = {event.cgroup_id for event in recording.events}
    assert len(ids) == 3  # of where it was, and not of what stands for it


# ---------------------------------------------------------------- paths that are left out


class Tried(NamedTuple):
    """An open, as it is told if it is; empty if it is to be left out."""

    told: str
    errno: int


class Opener:
    def __init__(self) -> None:
        self.tried: list[Tried] = []

    def open(self, name: str, told: str, flags: int = 0, dirfd: int = AT_FDCWD) -> None:
        self._note(told, system_call(OPENAT, dirfd, name.encode(), flags, 0o600))

    def open_within(self, dirfd: int, name: str, told: str) -> None:
        """As if the directory were the root."""
        how = OpenHow(0, 0, RESOLVE_IN_ROOT)
        made = system_call(OPENAT2, dirfd, name.encode(), ctypes.byref(how), ctypes.sizeof(how))
        self._note(told, made)

    def _note(self, told: str, made: tuple[int, int, int]) -> None:
        if made[0] >= 0:
            os.close(made[0])
        self.tried.append(Tried(told, made[1]))


RESOLVE_IN_ROOT = 0x10
OPEN_TREE, OPEN_TREE_CLONE, AT_RECURSIVE = 428, 1, 0x8000
DEPTH, MOST_PARTS = 90, 80
OUT = ""


def leave_out(base: str) -> list[Tried]:
    """What nobody can object to."""
    opener = Opener()
    os.chdir(f"{base}/left")
    opener.open("/usr/nothing", OUT)
    opener.open("/usr/bin/true", OUT)
    opener.open("/usr/bin/true/x", OUT)  # ENOTDIR
    opener.open(f"{base}/to-true", OUT)  # a link: it is /usr/bin/true
    opener.open("/usr/../usr/bin/true", OUT)
    opener.open(f"{base}/left/nothing", OUT)
    opener.open("nothing", OUT)
    opener.open("file", OUT)
    return opener.tried


def ask_roundabout(base: str) -> list[Tried]:
    """By paths that may lead anywhere."""
    opener = Opener()
    os.chdir(f"{base}/left")
    opener.open("/usr/../etc/shadow", "/usr/../etc/shadow")  # EACCES
    for name in ("/usr/x/../../etc/x", "/usr/./x", "/usr//x", "/usr/x/", "/usr/x/.."):
        opener.open(name, name)
    opener.open("../left/x", f"{base}/left/../left/x")
    long = "/usr" + 3 * f"/{'x' * 250}"  # longer than is looked at
    opener.open(long, long)
    return opener.tried


def be_refused(base: str) -> list[Tried]:
    """What is there, but cannot be opened, may be something else: links lead there."""
    opener = Opener()
    opener.open(f"{base}/left/secret/x", f"{base}/left/secret/x")  # EACCES
    opener.open(f"{base}/left/to-shadow", f"{base}/left/to-shadow")  # EACCES
    opener.open(f"{base}/left/to-file", f"{base}/file")
    opener.open(f"{base}/left/file", f"{base}/left/file", os.O_CREAT | os.O_EXCL)
    opener.open("/proc/self/ns/mnt", "/proc/self/ns/mnt")  # in no directory: by what was asked
    opener.open(f"{base}/left/to-ns", f"{base}/left/to-ns")
    opener.open("/usr/../proc/self/ns/mnt", "/usr/../proc/self/ns/mnt")
    return opener.tried


def be_deep_down(base: str) -> list[Tried]:
    """Files of which the beginning of the path is not known."""
    opener = Opener()
    for place in ("left", "deep/proc"):
        os.chdir(f"{base}/{place}")
        parts = go_down(DEPTH)
        opener.open("file", told_deep([*parts, "file"]), os.O_CREAT | os.O_WRONLY)
        opener.open("nothing", told_deep(parts) + "/nothing")
    os.chdir(f"{base}/deep/proc")
    parts = go_down(MOST_PARTS - 2)
    opener.open("file", told_deep(["proc", *parts, "file"]), os.O_CREAT | os.O_WRONLY)
    return opener.tried


def go_down(levels: int) -> list[str]:
    parts = [f"level-{level}" for level in range(levels)]
    for part in parts:
        os.makedirs(part, exist_ok=True)
        os.chdir(part)
    return parts


def told_deep(parts: list[str]) -> str:
    return "".join(f"/{part}" for part in parts[-MOST_PARTS:])


def be_elsewhere(base: str) -> list[Tried]:
    """In a tree of mounts of one's own, where paths mean what one wants."""
    own_namespaces(CLONE_NEWNS)
    opener = Opener()
    bind_mount("/etc", "/usr/share")
    opener.open("/usr/share/passwd", "/usr/share/passwd")
    opener.open("/usr/share/shadow", "/usr/share/shadow")
    opener.open("/usr/nothing", "/usr/nothing")
    detached = system_call(OPEN_TREE, AT_FDCWD, b"/etc", OPEN_TREE_CLONE)[0]
    root = system_call(OPEN_TREE, AT_FDCWD, b"/", OPEN_TREE_CLONE | AT_RECURSIVE)[0]
    assert min(detached, root) >= 0
    opener.open("passwd", "/passwd", dirfd=detached)
    opener.open("usr/bin/true", "/usr/bin/true", dirfd=root)
    opener.open("usr/nothing", "/usr/nothing", dirfd=root)
    return opener.tried


def be_in_another_root(base: str) -> list[Tried]:
    own_namespaces(0)
    opener = Opener()
    jail = os.open(f"{base}/jail", os.O_PATH)
    opener.tried.append(Tried(f"{base}/jail", 0))
    opener.open_within(jail, "/usr/nothing", f"{base}/jail/usr/nothing")
    opener.open_within(jail, "/usr/file", f"{base}/jail/usr/file")
    os.chroot(f"{base}/jail")
    opener.open("/usr/nothing", f"{base}/jail/usr/nothing")
    opener.open("/usr/file", f"{base}/jail/usr/file")
    return opener.tried


WAYS = (
    leave_out,
    ask_roundabout,
    be_refused,
    be_deep_down,
    be_elsewhere,
    be_in_another_root,
)


def go_every_way(base: str) -> dict[str, tuple[int, list[Tried]]]:
    found = {}
    for way in WAYS:
        role = Role("hider", as_a_user, way, base)
        found[way.__name__] = role.pid, role.result()
    return found


def as_a_user(function: Any, base: str) -> Any:
    become(UID)
    return function(base)


@pytest.fixture(scope="module")
def base(open_directory: Path) -> Path:
    """A directory in which a user can make what he wants."""
    base = open_directory / "hiding"
    for name in ("left/secret", "deep/proc", "jail/usr"):
        (base / name).mkdir(parents=True)
    for name in ("left", "deep/proc"):
        (base / name).chmod(0o777)
    for name in ("file", "left/file", "left/secret/x", "jail/usr/file"):
        (base / name).touch()
    (base / "left/secret").chmod(0o700)
    for name, target in (
        ("to-true", "/usr/bin/true"),
        ("left/to-shadow", "/etc/shadow"),
        ("left/to-file", str(base / "file")),
        ("left/to-ns", "/proc/self/ns/net"),
    ):
        (base / name).symlink_to(target)
    return base


class Watched(NamedTuple):
    recording: Recording
    ways: dict[str, tuple[int, list[Tried]]]

    def told(self, way: Any) -> list[Tried]:
        pid, _ = self.ways[way.__name__]
        events = [event for event in self.recording.events if event.pid == pid]
        return [Tried(e.path, e.errno) for e in events if not e.path.endswith(PREPARED)]


PREPARED = ("/setgroups", "/uid_map", "/gid_map")


@pytest.fixture(scope="module")
def excluding(cgroups: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    prefixes = ("/usr/", "/proc", f"{base}/left/")
    exclusions = [word for prefix in prefixes for word in ("--exclude-path", prefix)]
    directory = tmp_path_factory.mktemp("excluding")
    with (
        Scope(cgroups) as scope,
        Agent(directory, *scope.options, *exclusions, events="file.open") as agent,
    ):
        ways = scope.act(go_every_way, str(base))
        return Watched(agent.stop(), ways)


@pytest.mark.parametrize("way", WAYS)
def test_what_may_be_another_file_is_not_left_out(excluding: Watched, way: Any) -> None:
    """By a user without privilege; and what is sure to be meant is left out."""
    expected = [tried for tried in excluding.ways[way.__name__][1] if tried.told != OUT]
    assert excluding.told(way) == expected
    assert bool(expected) == (way is not leave_out)


# ---------------------------------------------------------------- paths that are kept


def open_near_and_far(base: str) -> list[Tried]:
    opener = Opener()
    opener.open(f"{base}/deep/x", f"{base}/deep/x")
    opener.open(f"{base}/x", OUT)
    opener.open(f"{base}/file", OUT)
    for place in ("deep", "left"):  # of a path that was cut nobody knows where it begins
        os.chdir(f"{base}/{place}")
        parts = go_down(DEPTH)
        opener.open("file", told_deep([*parts, "file"]), os.O_CREAT | os.O_WRONLY)
        opener.open("nothing", told_deep(parts) + "/nothing")
    return opener.tried


def test_what_may_be_kept_is_kept(scope: Scope, base: Path, tmp_path: Path) -> None:
    """Deep below a prefix, so deep that the prefix is not in sight."""
    with Agent(tmp_path, *scope.options, "--path", f"{base}/deep", events="file.open") as agent:
        tried = scope.act(open_near_and_far, str(base))
        recording = agent.stop()
    found = [Tried(event.path, event.errno) for event in recording.events]
    assert found == [one for one in tried if one.told != OUT]
