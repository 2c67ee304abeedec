"""Runs a command that gets no ring buffer: `python -m tests.kernel.without_rings COMMAND...`.

As a security policy does: a filter hands each creation of a map to this process, which looks at its
type and lets it fail, or go on. It ends with the exit code of the command.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import struct
import sys

BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
SECCOMP = {"x86_64": 317, "aarch64": 277}[platform.machine()]
SET_MODE_FILTER, NEW_LISTENER = 1, 8
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ASK = 0x7FFF0000, 0x7FC00000
ARGUMENT = 16  # where the first one begins in struct seccomp_data
MAP_CREATE, RINGBUF = 0, 27
RECEIVE, SEND, GO_ON = 0xC0502100, 0xC0182101, 1
REQUEST = struct.Struct("<QIIiIQ6Q")  # struct seccomp_notif
REPLY = struct.Struct("<QqiI")  # struct seccomp_notif_resp


class Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def listen() -> int:
    """Be asked for each map that is created, here and in all that comes of this; a descriptor."""
    instructions = (
        (LOAD_WORD, 0, 0, 0),  # the number of the system call
        (JUMP_IF_EQUAL, 0, 3, BPF),
        (LOAD_WORD, 0, 0, ARGUMENT),
        (JUMP_IF_EQUAL, 0, 1, MAP_CREATE),
        (RETURN, 0, 0, ASK),
        (RETURN, 0, 0, ALLOW),
    )
    code = b"".join(struct.pack("<HBBI", *one) for one in instructions)
    program = Program(len(instructions), code)
    libc = ctypes.CDLL(None, use_errno=True)
    words = (ctypes.c_long(one) for one in (SECCOMP, SET_MODE_FILTER, NEW_LISTENER))
    listener: int = libc.syscall(*words, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
    return listener


def answer(listener: int) -> None:
    """Let one of them fail, or go on."""
    asked = bytearray(REQUEST.size)
    try:
        fcntl.ioctl(listener, RECEIVE, asked)
        number, pid, _, _, _, _, _, attributes, *_ = REQUEST.unpack(asked)
        refused = map_type(pid, attributes) == RINGBUF
        reply = (number, 0, -errno.EINVAL, 0) if refused else (number, 0, 0, GO_ON)
        fcntl.ioctl(listener, SEND, REPLY.pack(*reply))
    except FileNotFoundError:  # who asked has gone
        return


def map_type(pid: int, attributes: int) -> int:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        return int.from_bytes(os.pread(memory.fileno(), 4, attributes), "little")


def supervise(listener: int, child: int) -> int:
    """Answer until the child has ended. Its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    poll = select.poll()
    ended = os.pidfd_open(child)
    for source in (listener, ended):
        poll.register(source, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if ready.get(listener, 0) & select.POLLIN:
            answer(listener)
        if ended in ready:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(command: list[str]) -> int:
    try:
        listener = listen()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise  # else this runs within another one like it, which refuses them already
    else:
        child = os.fork()
        if child:
            return supervise(listener, child)
        os.close(listener)
    with contextlib.suppress(OSError):
        os.execvp(command[0], command)
    os._exit(127)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code if code >= 0 else 128 - code)
