"""Compiles a list of allowed system calls into a seccomp filter, and installs it.

The filter is classic BPF over `struct seccomp_data` (linux/seccomp.h): number, architecture,
instruction pointer, six arguments. What is not on the list fails with EPERM, and a call that is
newer than the list with ENOSYS, so that a C library falls back to an older one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Mapping
from typing import NamedTuple

from streamer.errors import PrivilegeError
from streamer.privilege.syscalls import MACHINES, NEWEST, number_of

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_LOAD, _AND, _EQUAL, _ABOVE, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_X32 = 0x40000000
"""Numbers from here on are those of x86-64's second, 32-bit interface."""
_FARTHEST_JUMP = 255

_SET_MODE_FILTER = 1
_ALL_THREADS = 1  # SECCOMP_FILTER_FLAG_TSYNC
# Kernels before 5.16 otherwise make every branch of the process slow, against an attack on
# itself from code that it runs in a sandbox of its own. There is none.
_KEEP_SPECULATION = 4  # SECCOMP_FILTER_FLAG_SPEC_ALLOW

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand: `struct sock_filter`."""


class Condition(NamedTuple):
    """What the lower half of an argument must be; the kernel looks at no more of it.

    The argument, masked, has to be among `values`, or among none of them with `but` set.
    """

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    but: bool = False


Rule = tuple[tuple[Condition, ...], ...]
"""Allowed if all the conditions of any of these hold."""

ALWAYS: Rule = ((),)


class Failure(NamedTuple):
    """With which error a call fails if all the conditions hold, instead of being looked up."""

    error: int
    conditions: tuple[Condition, ...] = ()


def compile_filter(
    machine: str, allowed: Mapping[str, Rule], failing: Mapping[str, Failure]
) -> bytes:
    """The filter, as an array of `struct sock_filter`.

    Calls that come first in `allowed` are found first.

    Raises:
        PrivilegeError: there are no numbers for this architecture.
    """
    if machine not in MACHINES:
        raise PrivilegeError(f"no system-call filter for {machine}: {', '.join(MACHINES)}")
    refused = _failed(errno.EPERM)
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        refused,
        (_LOAD, 0, 0, _NUMBER_AT),
        (_ABOVE, 0, 1, _X32 - 1),
        refused,
        (_ABOVE, 0, 1, NEWEST),
        _failed(errno.ENOSYS),
    ]
    for name in dict.fromkeys((*allowed, *failing)):
        failure = failing.get(name)
        block = _when(failure.conditions, _failed(failure.error)) if failure else []
        for conditions in allowed.get(name, ()):
            block += _when(conditions, (_RETURN, 0, 0, _ALLOW))
        code += _on(number_of(name, machine), [*block, refused])
    return b"".join(struct.pack("<HBBI", *one) for one in [*code, refused])


def _on(number: int | None, block: list[Instruction]) -> list[Instruction]:
    """`block` for that system call; it has to end with a return."""
    if number is None:
        return []
    assert len(block) <= _FARTHEST_JUMP, "a block too long to be jumped over"
    return [(_EQUAL, 0, len(block), number), *block]


def _failed(error: int) -> Instruction:
    return (_RETURN, 0, 0, _FAIL | error)


def _when(conditions: tuple[Condition, ...], then: Instruction) -> list[Instruction]:
    """Returns with `then` if the conditions hold, and else goes on behind."""
    code = [then]
    for condition in reversed(conditions):
        code = _condition(condition, len(code)) + code
    return code


def _condition(condition: Condition, behind: int) -> list[Instruction]:
    """Goes on directly behind if it holds, and over the next `behind` instructions if not."""
    low = _ARGUMENTS_AT + 8 * condition.argument
    code: list[Instruction] = [(_LOAD, 0, 0, low)]
    if condition.mask != 0xFFFFFFFF:
        code.append((_AND, 0, 0, condition.mask))
    for left in range(len(condition.values) - 1, -1, -1):
        value = condition.values[len(condition.values) - 1 - left]
        found, not_found = (left + behind, 0) if condition.but else (left, 0 if left else behind)
        code.append((_EQUAL, found, not_found, value))
    return code


class _FilterProgram(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install(code: bytes) -> None:
    """Put every thread of this process under a filter, for good. `no_new_privs` must be set.

    Raises:
        PrivilegeError: the kernel has no such filters, or a thread could not be reached.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    program = _FilterProgram(len(code) // 8, code)
    number = number_of("seccomp", os.uname().machine)
    flags = _ALL_THREADS | _KEEP_SPECULATION
    words = (ctypes.c_long(one) for one in (number or 0, _SET_MODE_FILTER, flags))
    result = libc.syscall(*words, ctypes.byref(program))
    if result < 0:
        reason = os.strerror(ctypes.get_errno())
        raise PrivilegeError(
            f"cannot install a system-call filter (CONFIG_SECCOMP_FILTER): {reason}"
        )
    if result > 0:
        raise PrivilegeError(f"cannot put thread {result} under a system-call filter")
