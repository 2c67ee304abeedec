"""How the worker gives up everything: the user's rights, capabilities, most system calls."""

from __future__ import annotations

import os
import pwd
from typing import NamedTuple

from streamer.errors import ConfigError, PrivilegeError
from streamer.kernel import capabilities
from streamer.privilege import landlock, seccomp
from streamer.privilege.policies import worker_filter


class Account(NamedTuple):
    """A user of the system."""

    name: str
    uid: int
    gid: int


def account_of(name: str) -> Account:
    """The user of that name, for the worker to become.

    Raises:
        ConfigError: there is none, or it is root.
    """
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(f"user: found {name!r}, allowed: a user of this system") from None
    if found.pw_uid == 0:
        raise ConfigError(f"user: found {name!r}, allowed: a user other than root")
    return Account(found.pw_name, found.pw_uid, found.pw_gid)


def can_change_user() -> bool:
    """Whether this process may become another user."""
    return {capabilities.CAP_SETUID, capabilities.CAP_SETGID} <= capabilities.effective()


def drop_privileges(account: Account | None, *, answers: bool = False) -> None:
    """Become `account` (None: stay who it is) without capabilities, under the worker's filter.

    If it `answers`, it takes connections of sockets that listen now.

    Where the kernel has Landlock, it also keeps the process from writing to files.

    For good, and for every thread that is started from now on. The working directory is then
    the root, because what lies below a directory could be reached through it whatever protects
    the way there; and standard input, which nothing reads, is empty.

    Raises:
        PrivilegeError: the kernel refused, or there are several threads already.
    """
    if len(os.listdir("/proc/self/task")) > 1:
        raise PrivilegeError("privileges cannot be given up by several threads")
    os.chdir("/")
    _empty_stdin()
    if account is not None:
        _become(account)
    capabilities.limit_to(())
    capabilities.forgo_gains()
    capabilities.hide_memory()
    landlock.restrict()
    seccomp.install(worker_filter(os.getpid(), os.uname().machine, answers=answers))


def _become(account: Account) -> None:
    try:
        os.setgroups([])
        os.setresgid(account.gid, account.gid, account.gid)
        # The bounding set takes a capability that goes with the user.
        capabilities.empty_bounding_set()
        os.setresuid(account.uid, account.uid, account.uid)
    except OSError as error:
        raise PrivilegeError(f"cannot become {account.name}: {error.strerror}") from None


def _empty_stdin() -> None:
    fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(fd, 0)
    os.close(fd)
