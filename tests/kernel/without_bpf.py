"""Runs a command whose bpf() fails: `python -m tests.kernel.without_bpf ERRNO COMMAND...`.

As on a kernel without BPF (ENOSYS), or one that is locked down (EPERM).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, FAIL = 0x7FFF0000, 0x00050000


class Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def refuse(number: int, error: int) -> None:
    """Let a system call fail with `error`, here and in all that is executed from here."""
    instructions = (
        (LOAD_WORD, 0, 0, 0),  # the number of the system call
        (JUMP_IF_EQUAL, 0, 1, number),
        (RETURN, 0, 0, FAIL | error),
        (RETURN, 0, 0, ALLOW),
    )
    code = b"".join(struct.pack("<HBBI", *one) for one in instructions)
    program = Program(len(instructions), code)
    libc = ctypes.CDLL(None, use_errno=True)
    for option in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*option):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    refuse(BPF, int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
