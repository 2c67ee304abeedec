"""What runs, whatever path it was run by."""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kernel.agent import Agent, Recording
from tests.kernel.scope import Scope
from tests.kernel.system import AT_FDCWD, EXECVEAT, system_call
from tests.kernel.unprivileged import (
    CLONE_NEWNS,
    UID,
    become,
    bind_mount,
    mount_namespace,
    own_namespaces,
)

pytestmark = pytest.mark.kernel

INNOCENT = "/usr/bin/true"
AT_EMPTY_PATH = 0x1000


class Plan(NamedTuple):
    """A file that is to be executed: `name` in the directory, or as the file, `fd`."""

    exe: str
    filename: str
    interp: str = ""
    name: str = ""
    fd: int = -1
    deleted: bool = False
    memfd: bool = False


class Ran(NamedTuple):
    """What is to be told of an execution."""

    exe: str
    filename: str
    interp: str
    deleted: bool
    memfd: bool
    inode: int
    dev: int
    nlink: int
    exe_mntns: int  # 0: in none
    cwd_mntns: int


# ---------------------------------------------------------------- plans


def mount_over_another(directory: str) -> Plan:
    """As /usr/bin/true, in a mount namespace of one's own."""
    own_namespaces(CLONE_NEWNS)
    bind_mount("program", INNOCENT)
    return Plan(os.path.realpath(INNOCENT), INNOCENT, name=INNOCENT)


def delete_before(directory: str) -> Plan:
    """What is opened, then deleted, and executed."""
    fd = inheritable("program")
    os.unlink("program")
    return Plan(f"{directory}/program", f"/dev/fd/{fd}", fd=fd, deleted=True)


def delete_one_of_two_names(directory: str) -> Plan:
    """The file goes on under its other name, but not as what it was run as."""
    os.link("program", "other")
    fd = inheritable("program")
    os.unlink("program")
    return Plan(f"{directory}/program", f"/dev/fd/{fd}", fd=fd, deleted=True)


def run_another_name(directory: str) -> Plan:
    os.link("program", "other")
    return Plan(f"{directory}/other", f"{directory}/other", name=f"{directory}/other")


def run_a_symbolic_link(directory: str) -> Plan:
    os.symlink("program", "link")
    return Plan(f"{directory}/program", "./link", name="./link")


def run_from_memory(directory: str) -> Plan:
    written = os.memfd_create("innocent", 0)
    os.write(written, Path("program").read_bytes())
    fd = inheritable(f"/proc/self/fd/{written}")
    os.close(written)
    return Plan("/memfd:innocent", f"/dev/fd/{fd}", fd=fd, memfd=True)


def be_called_as_if_from_memory(directory: str) -> Plan:
    os.rename("program", "memfd:innocent")
    return Plan(f"{directory}/memfd:innocent", "memfd:innocent", name="memfd:innocent")


def run_a_script(directory: str) -> Plan:
    make_script("script", f"{directory}/program")
    return Plan(f"{directory}/program", "./script", f"{directory}/program", name="./script")


def run_a_script_of_a_script(directory: str) -> Plan:
    """The last interpreter is the one that runs; the first path is the one that was asked for."""
    os.symlink("program", "interpreter")
    make_script("inner", "./interpreter")
    make_script("outer", f"{directory}/inner")
    return Plan(f"{directory}/program", "./outer", "./interpreter", name="./outer")


def run_a_script_by_descriptor(directory: str) -> Plan:
    make_script("script", f"{directory}/program")
    fd = inheritable("script")
    return Plan(f"{directory}/program", f"/dev/fd/{fd}", f"{directory}/program", fd=fd)


def run_in_a_directory(directory: str) -> Plan:
    """By a name in a directory that is given by descriptor."""
    fd = inheritable(directory)
    return Plan(f"{directory}/program", f"/dev/fd/{fd}/program", name="program", fd=fd)


def inheritable(path: str) -> int:
    fd = os.open(path, os.O_RDONLY)
    os.set_inheritable(fd, True)
    return fd


def make_script(path: str, interpreter: str) -> None:
    Path(path).write_text(f"#!{interpreter}\n")
    os.chmod(path, 0o755)


PLANS = (
    mount_over_another,
    delete_before,
    delete_one_of_two_names,
    run_another_name,
    run_a_symbolic_link,
    run_from_memory,
    be_called_as_if_from_memory,
    run_a_script,
    run_a_script_of_a_script,
    run_a_script_by_descriptor,
    run_in_a_directory,
)


# ---------------------------------------------------------------- executions


def run_all(program: str, directory: str) -> dict[str, tuple[int, Ran]]:
    """Every plan, by a user without privilege: the process, and what is to be told of it."""
    found = {}
    for plan in PLANS:
        place = f"{directory}/{plan.__name__}"
        os.mkdir(place)
        shutil.copy(program, f"{place}/program")
        os.chown(place, UID, UID)
        os.chown(f"{place}/program", UID, UID)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            play(plan, place, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            found[plan.__name__] = pid, pickle.load(pipe)
        assert os.waitpid(pid, 0)[1] >> 8 in (1, 2, 3)  # the number of arguments
    return found


def play(plan: Any, place: str, writer: int) -> None:
    try:
        become(UID)
        os.chdir(place)
        made = plan(place)
        os.write(writer, pickle.dumps(expected(made)))
        name = made.name.encode()
        argv = (ctypes.c_char_p * 2)(b"run", None)
        dirfd = made.fd if made.fd >= 0 else AT_FDCWD
        flags = 0 if name else AT_EMPTY_PATH
        _, error, _ = system_call(EXECVEAT, dirfd, name, argv, None, flags)
        raise OSError(error, os.strerror(error))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(100)


def expected(made: Plan) -> Ran:
    file = os.stat(made.exe if made.interp or made.name else made.fd)
    mntns = mount_namespace()
    return Ran(
        made.exe,
        made.filename,
        made.interp,
        made.deleted,
        made.memfd,
        file.st_ino,
        file.st_dev,
        file.st_nlink,
        0 if made.memfd else mntns,
        mntns,
    )


# ---------------------------------------------------------------- what was recorded


class Watched(NamedTuple):
    recording: Recording
    stories: dict[str, tuple[int, Ran]]


@pytest.fixture(scope="module")
def watched(
    cgroups: Path, subject: Path, open_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Watched:
    directory = open_directory / "identity"
    directory.mkdir()
    with (
        Scope(cgroups) as scope,
        Agent(tmp_path_factory.mktemp("agent"), *scope.options, events="process.exec") as agent,
    ):
        stories = scope.act(run_all, str(subject), str(directory))
        return Watched(agent.stop(), stories)


@pytest.mark.parametrize("plan", PLANS)
def test_what_runs(watched: Watched, plan: Any) -> None:
    pid, ran = watched.stories[plan.__name__]
    (event,) = (e for e in watched.recording.events if e.pid == pid)
    assert ran == Ran(
        event.exe,
        event.filename,
        event.interp,
        event.exe_deleted,
        event.exe_memfd,
        event.exe_inode,
        event.exe_dev,
        event.exe_nlink,
        event.exe_mntns,
        event.cwd_mntns,
    )
    assert (event.uid, event.truncated, event.incomplete) == (UID, (), False)


def test_what_runs_in_the_hosts_tree_of_mounts(watched: Watched) -> None:
    """What a user mounted is not, and not what is in memory."""
    initial = watched.recording.manifest.initial_mntns
    assert initial == mount_namespace()
    for event in watched.recording.events:
        assert event.exe_mntns_initial == (event.exe_mntns == initial)
        assert event.cwd_mntns_initial == (event.cwd_mntns == initial)
        assert (event.parent_exe_mntns, event.parent_exe_mntns_initial) == (initial, True)
    elsewhere = {e.pid for e in watched.recording.events if not e.exe_mntns_initial}
    plans = (mount_over_another, run_from_memory)
    assert elsewhere == {watched.stories[plan.__name__][0] for plan in plans}
