"""Which system calls are observed on a machine, by name, and what is known of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from streamer.events.calls import ALL, NEVER_RETURN, NUMBERS
from streamer.kernel.objects import CONTRACT

_MACHINES = {"x86_64": (0, "__x64_sys_"), "aarch64": (1, "__arm64_sys_")}
_FLAGS = {name: number for name, number, _ in CONTRACT["enum syscall_flags"]}
_LIMITS = {name: number for name, number, _ in CONTRACT["enum syscall_limits"]}
SYSCALL_NUMBERS = _LIMITS["SYSCALL_NUMBERS"]
"""Those with an entry of their own, and one for all above."""


WAITING = frozenset(
    {
        *("accept", "accept4", "read", "recvfrom", "recvmmsg", "recvmsg", "semtimedop"),
        *("epoll_pwait", "epoll_pwait2", "epoll_wait", "poll", "ppoll", "pselect6", "select"),
        *("futex", "futex_wait", "futex_waitv", "io_getevents", "io_pgetevents", "io_uring_enter"),
        *("clock_nanosleep", "nanosleep", "pause", "restart_syscall"),
        *("rt_sigsuspend", "rt_sigtimedwait", "wait4", "waitid"),
    }
)
"""Calls that are there to wait for others: as a rule it means nothing that one takes long."""

_GIVE_ADDRESS = frozenset({"brk", "mmap", "mremap", "shmat"})
_RESULT_UNKNOWN = frozenset({"rt_sigreturn"})  # it puts back that of the call before the signal

# Where the function is not named after the call.
_FUNCTIONS = {
    "fstat": "newfstat",
    "lstat": "newlstat",
    "sendfile": "sendfile64",
    "stat": "newstat",
    "umount2": "umount",
    "uname": "newuname",
}
_FUNCTIONS_OF_ARM = {"fadvise64": "fadvise64_64", "personality": "arm64_personality"}


class Place(NamedTuple):
    """What is kept of the call of a number. `flags` are of `enum syscall_flags`, ORed."""

    number: int
    name: str
    flags: int


def numbers_of(machine: str) -> dict[str, int]:
    """The number of every call that a machine (as `uname -m` says it) has."""
    column, _ = _MACHINES[machine]
    found = ((name, numbers[column]) for name, numbers in NUMBERS.items())
    return {name: number for name, number in found if number is not None}


def functions_of_calls(names: Collection[str], machine: str) -> tuple[str, ...]:
    """The kernel's functions behind calls, each as `A|B` with another name that it may have.

    Without arguments it can be known by its inner name alone, which the same code has. None at
    all when all calls are wanted.
    """
    if ALL in names:
        return ()
    _, prefix = _MACHINES[machine]
    renamed = _FUNCTIONS | (_FUNCTIONS_OF_ARM if machine == "aarch64" else {})
    found = (renamed.get(name, name) for name in _here(names, machine))
    return tuple(f"{prefix}{name}|__do_sys_{name}" for name in found)


def places_of(names: Collection[str], machine: str) -> list[Place]:
    """The calls that are wanted, by number.

    All of them include numbers without a name, the last of which is for all that are higher. Of
    those that are named alone slow ones are told in any case, of others where they do not wait.
    """
    known = numbers_of(machine)
    if ALL not in names:
        return [_place(known[name], name, told=True) for name in _here(names, machine)]
    named = {number: name for name, number in known.items()}
    last = SYSCALL_NUMBERS - 1
    every = ((number, named.get(number, f"syscall_{number:03}")) for number in range(last))
    places = [
        _place(number, name, told=name in names or name not in WAITING)
        for number, name in every
        if name not in NEVER_RETURN
    ]
    return [*places, _place(last, "syscall_other", told=True)]


def are_here(names: Collection[str], machine: str) -> bool:
    """Whether the machine has any of them."""
    return ALL in names or bool(_here(names, machine))


def _here(names: Iterable[str], machine: str) -> list[str]:
    known = numbers_of(machine)
    return sorted((name for name in set(names) if name in known), key=known.__getitem__)


def _place(number: int, name: str, *, told: bool) -> Place:
    flags: Mapping[str, bool] = {
        "SYSCALL_SLOW_TOLD": told,
        "SYSCALL_GIVES_ADDRESS": name in _GIVE_ADDRESS,
        "SYSCALL_RESULT_UNKNOWN": name in _RESULT_UNKNOWN,
    }
    return Place(number, name, sum(_FLAGS[flag] for flag, given in flags.items() if given))
