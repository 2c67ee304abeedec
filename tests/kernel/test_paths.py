"""Where an opened file really is, and in whose tree of mounts that is a path."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kernel.agent import Agent, Recording
from tests.kernel.roles import Role
from tests.kernel.scope import Scope
from tests.kernel.system import AT_FDCWD, OPENAT, OPENAT2, system_call
from tests.kernel.test_file import OpenHow
from tests.kernel.unprivileged import (
    CLONE_NEWNS,
    MNT_DETACH,
    UID,
    become,
    bind_mount,
    mount,
    mount_namespace,
    own_namespaces,
    unmount,
)

pytestmark = pytest.mark.kernel

OPEN_TREE, FSOPEN, FSCONFIG, FSMOUNT = 428, 430, 431, 432
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}[platform.machine()]
OPEN_TREE_CLONE, FSCONFIG_CMD_CREATE = 1, 6
RESOLVE_IN_ROOT, RESOLVE_BENEATH = 0x10, 0x08
FLAGS, MODE = os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o640
NONE = 0


class Opened(NamedTuple):
    """What an open is to be told as. `mntns` is 0 for a mount that is in no namespace."""

    path: str
    mntns: int
    flags: int = os.O_RDONLY
    mode: int = 0
    cut: bool = False
    incomplete: bool = False


class Opener:
    """Opens, and notes what is to be told of that."""

    def __init__(self) -> None:
        self.mntns = mount_namespace()
        self.opened: list[Opened] = []

    def at(self, dirfd: int, name: str, path: str, mntns: int = -1, **more: Any) -> None:
        """Open by openat()."""
        close(system_call(OPENAT, dirfd, name.encode(), more.get("flags", os.O_RDONLY), 0))
        self.note(path, mntns, **more)

    def by_how(self, dirfd: int, name: str, path: str, how: Any, **more: Any) -> int:
        """Open by openat2(), with `how` in memory. The error number."""
        made = system_call(OPENAT2, dirfd, name.encode(), how, ctypes.sizeof(OpenHow))
        close(made)
        self.note(path, **more)
        return made[1]

    def note(self, path: str, mntns: int = -1, **more: Any) -> None:
        self.opened.append(Opened(path, self.mntns if mntns < 0 else mntns, **more))


def close(made: tuple[int, int, int]) -> None:
    if made[0] >= 0:
        os.close(made[0])


# ---------------------------------------------------------------- openat2()


def have_arguments_elsewhere(directory: str) -> list[Opened]:
    """`struct open_how` in a page of a file that is not in memory yet."""
    opener = Opener()
    opener.note(
        f"{directory}/how",
        flags=os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC,
        mode=0o666,
    )
    with open(f"{directory}/how", "w+b") as file:
        file.write(bytes(mmap.PAGESIZE) + bytes(OpenHow(FLAGS, MODE, 0)).ljust(mmap.PAGESIZE))
        file.flush()
        with mmap.mmap(file.fileno(), 2 * mmap.PAGESIZE, mmap.MAP_PRIVATE) as mapped:
            how = OpenHow.from_buffer(mapped, mmap.PAGESIZE)
            address = ctypes.addressof(how)
            for name in ("first", "second"):
                mapped.madvise(mmap.MADV_DONTNEED)
                path = f"{directory}/{name}"
                assert not opener.by_how(AT_FDCWD, path, path, address, flags=FLAGS, mode=MODE)
            del how
    return opener.opened


def have_no_arguments(directory: str) -> list[Opened]:
    """`struct open_how` where nothing is."""
    opener = Opener()
    path = f"{directory}/file"
    for address in (0, 8, -4096):
        assert opener.by_how(AT_FDCWD, path, path, address, incomplete=True)
    # Readable and wrong: that is all there.
    wrong = OpenHow(os.O_RDONLY, 0, 1 << 40)
    assert opener.by_how(AT_FDCWD, path, path, ctypes.byref(wrong))
    return opener.opened


def ask_within(directory: str) -> list[Opened]:
    """What begins with a slash is looked for in the directory, or is refused."""
    opener = Opener()
    os.chdir(f"{directory}/sub")
    dirfd = os.open(directory, os.O_PATH)
    opener.note(directory, flags=os.O_PATH | os.O_CLOEXEC)
    within = OpenHow(0, 0, RESOLVE_IN_ROOT)
    beneath = OpenHow(0, 0, RESOLVE_BENEATH)
    anywhere = OpenHow(0, 0, 0)
    for at, place in ((dirfd, directory), (AT_FDCWD, f"{directory}/sub")):
        for how in (within, beneath):
            assert opener.by_how(at, "/nope", f"{place}/nope", ctypes.byref(how))
        assert opener.by_how(at, "/nope", "/nope", ctypes.byref(anywhere))
    return opener.opened


# ---------------------------------------------------------------- files that are in no directory


def open_namespaces(directory: str) -> list[Opened]:
    """They have no path but the one that was asked for."""
    opener = Opener()
    own = os.open("/proc/self/ns", os.O_PATH)
    opener.note(f"/proc/{os.getpid()}/ns", flags=os.O_PATH | os.O_CLOEXEC)
    for kind in ("mnt", "net", "pid", "user"):
        opener.at(AT_FDCWD, f"/proc/self/ns/{kind}", f"/proc/self/ns/{kind}")
        opener.at(own, kind, f"/proc/{os.getpid()}/ns/{kind}")
    return opener.opened


# ---------------------------------------------------------------- trees of mounts


def be_in_a_container(directory: str) -> list[Opened]:
    """As a user: with a root of one's own, which has a file of the same name as the host's."""
    become(UID)
    own_namespaces(CLONE_NEWNS)
    opener = Opener()
    root = f"{directory}/root"
    mount("none", root, "tmpfs")
    os.makedirs(f"{root}/etc")
    Path(f"{root}/etc/shadow").touch()
    opener.note(f"{root}/etc/shadow", flags=os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode=0o666)
    os.mkdir(f"{root}/old")
    opener.at(AT_FDCWD, "/etc/shadow", "/etc/shadow")
    os.chdir(root)
    assert system_call(PIVOT_ROOT, b".", b"old")[1] == 0
    opener.at(AT_FDCWD, "/etc/shadow", "/etc/shadow")
    opener.at(AT_FDCWD, "/etc/nope", "/etc/nope")
    os.chdir("/etc")
    opener.at(AT_FDCWD, "shadow", "/etc/shadow")
    os.chroot("/etc")
    opener.at(AT_FDCWD, "/shadow", "/etc/shadow")
    opener.at(AT_FDCWD, "/nope", "/etc/nope")
    return opener.opened


def open_outside_of_any(directory: str) -> list[Opened]:
    """As a user: in mounts that are in no tree, or not any more."""
    become(UID)
    own_namespaces(CLONE_NEWNS)
    opener = Opener()
    clone = system_call(OPEN_TREE, AT_FDCWD, f"{directory}/sub".encode(), OPEN_TREE_CLONE)[0]
    made = system_call(FSOPEN, b"tmpfs", 0)[0]
    assert system_call(FSCONFIG, made, FSCONFIG_CMD_CREATE, NONE, NONE, 0)[0] == 0
    fresh = system_call(FSMOUNT, made, 0, 0)[0]
    mount("none", f"{directory}/root", "tmpfs")
    left = os.open(f"{directory}/root", os.O_PATH)
    opener.note(f"{directory}/root", flags=os.O_PATH | os.O_CLOEXEC)
    unmount(f"{directory}/root", MNT_DETACH)
    assert min(clone, fresh, left) >= 0
    opener.at(clone, "shadow", "/shadow", NONE)
    for dirfd in (clone, fresh, left):
        opener.at(dirfd, "nope", "/nope", NONE)
        opener.at(dirfd, ".", "/", NONE)
    return opener.opened


def move_out_of_a_mount(directory: str) -> list[Opened]:
    """As a user: a directory that is taken out of what was mounted. Its beginning is unknown."""
    become(UID)
    own_namespaces(CLONE_NEWNS)
    opener = Opener()
    mounted = f"{directory}/root"
    mount("none", mounted, "tmpfs")
    os.chdir(mounted)
    os.makedirs("from/moved")
    os.mkdir("to")
    bind_mount("from", "to")
    moved = os.open("to/moved", os.O_PATH)
    opener.note(f"{mounted}/to/moved", flags=os.O_PATH | os.O_CLOEXEC)
    os.rename("from/moved", "moved")
    opener.at(moved, ".", "/moved", cut=True)
    opener.at(moved, "nope", "/moved/nope", cut=True)
    return opener.opened


def cross_mounts(directory: str) -> list[Opened]:
    """As a user: mounts in mounts are steps on the way up, and no parts of a path."""
    become(UID)
    own_namespaces(CLONE_NEWNS)
    opener = Opener()
    path = f"{directory}/root"
    for part in range(80 - len(Path(path).parts)):
        if part < 6:
            mount("none", path, "tmpfs")
        path += f"/{part}"
        os.mkdir(path)
    opener.at(AT_FDCWD, f"{path}/x", f"{path}/x")
    opener.at(AT_FDCWD, path, path)
    os.mkdir(f"{path}/x")
    opener.at(AT_FDCWD, f"{path}/x", f"{path}/x")
    return opener.opened


STORIES = (
    have_arguments_elsewhere,
    have_no_arguments,
    ask_within,
    open_namespaces,
    be_in_a_container,
    open_outside_of_any,
    move_out_of_a_mount,
    cross_mounts,
)


def tell_all(directory: str) -> dict[str, tuple[int, list[Opened]]]:
    """Each in a process of its own: its id, and what is to be told of it."""
    found = {}
    for story in STORIES:
        role = Role("opener", story, directory)
        found[story.__name__] = role.pid, role.result()
    return found


class Watched(NamedTuple):
    recording: Recording
    stories: dict[str, tuple[int, list[Opened]]]

    def told(self, story: Any) -> list[Opened]:
        """What was recorded of a story, but for what was needed to play it."""
        pid, _ = self.stories[story.__name__]
        return [
            Opened(
                event.path,
                event.mntns,
                event.flags,
                event.mode,
                event.truncated == ("path",),
                event.incomplete,
            )
            for event in self.recording.of("file.open")
            if event.pid == pid and not event.path.endswith(PREPARED)
        ]


PREPARED = ("/comm", "/setgroups", "/uid_map", "/gid_map")


@pytest.fixture(scope="module")
def watched(
    cgroups: Path, open_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Watched:
    directory = open_directory / "paths"
    for name in ("sub", "root"):
        (directory / name).mkdir(parents=True)
    for name in ("file", "sub/shadow"):
        (directory / name).touch()
    with (
        Scope(cgroups) as scope,
        Agent(tmp_path_factory.mktemp("agent"), *scope.options, events="file.open") as agent,
    ):
        stories = scope.act(tell_all, str(directory))
        return Watched(agent.stop(), stories)


@pytest.mark.parametrize("story", STORIES)
def test_opens(watched: Watched, story: Any) -> None:
    assert watched.told(story) == watched.stories[story.__name__][1]


def test_only_paths_of_the_hosts_tree_are_marked_so(watched: Watched) -> None:
    """Of mounts that processes see from the start, and not from those that a user made."""
    initial = watched.recording.manifest.initial_mntns
    assert initial == mount_namespace()
    events = watched.recording.of("file.open")
    assert {event.mntns_initial for event in events} == {True, False}
    for event in events:
        assert event.mntns_initial == (event.mntns == initial)


def test_what_could_not_be_read_is_reported(watched: Watched) -> None:
    assert watched.recording.heartbeat.faults["unreadable"] == 3  # of have_no_arguments()
