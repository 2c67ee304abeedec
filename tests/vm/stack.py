"""How much stack a program can need: the deepest chain of its functions, as the kernel counts it.

The verifier says how much each function takes, and refuses a program of which a chain takes more
than 512 bytes. Which functions call each other is in the instructions of the loaded program.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

LIMIT = 512
"""Bytes that a chain may take (MAX_BPF_STACK)."""
_FRAME = 32
"""What the kernel rounds a function's up to; newer ones to 16, where there is a compiler."""
_INSTRUCTION = struct.Struct("<BBhi")
_CALL, _LOAD_64 = 0x85, 0x18
_OF_THE_PROGRAM, _A_FUNCTION = 1, 4  # what the source register of the two says
_MOST = 1 << 15
_FUNCTION = struct.Struct("<II")
_INFO = struct.Struct("<16x4xI8xQ88x4xIQI84x")
"""Of struct bpf_prog_info: the bytes of all instructions, and where they go; the bytes of a record
of a function, where those go, and how many there are.
"""


class Instruction(NamedTuple):
    """One of a loaded program, as the kernel gives it back."""

    code: int
    source: int
    offset: int
    immediate: int


class Loaded(NamedTuple):
    """A program as the kernel gives it back, and where in it each function begins, in order."""

    instructions: Sequence[Instruction]
    starts: Sequence[int]


def loaded(fd: int) -> Loaded:
    """The program with that descriptor. Raises OSError."""
    info = bytearray(_INFO.size)
    _ask(fd, info)
    size, _, _, _, functions = _INFO.unpack(info)
    code = ctypes.create_string_buffer(size)
    records = ctypes.create_string_buffer(functions * _FUNCTION.size)
    places = ctypes.addressof(code), ctypes.addressof(records)
    info[:] = _INFO.pack(size, places[0], _FUNCTION.size, places[1], functions)
    _ask(fd, info)
    return Loaded(
        [
            Instruction(code, registers >> 4, offset, immediate)
            for code, registers, offset, immediate in _INSTRUCTION.iter_unpack(code.raw)
        ],
        [start for start, _ in _FUNCTION.iter_unpack(records.raw)],
    )


def _ask(fd: int, info: bytearray) -> None:
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    place = (ctypes.c_char * len(info)).from_buffer(info)
    size = ctypes.c_uint32(len(info))
    if library.bpf_obj_get_info_by_fd(fd, place, ctypes.byref(size)):
        raise OSError(ctypes.get_errno(), "the kernel does not give the program back")


def deepest(program: Loaded, depths: Sequence[int]) -> int:
    """Bytes of the deepest chain; `depths` are those of the functions, in their order.

    A function that is there and called by none counts for nothing: it is one of those that are
    verified by themselves, and another kernel's programs call it.

    Raises:
        ValueError: there are more functions than depths, or fewer.
    """
    code, starts = program
    if len(code) > _MOST:
        raise ValueError(f"{len(code)} instructions: calls cannot be told")
    if len(starts) != len(depths):
        raise ValueError(f"{len(starts)} functions, and {len(depths)} depths")
    called = dict(_calls(code))
    within = {
        start: {target for at, target in called.items() if start <= at < end}
        for start, end in pairwise([*starts, len(code)])
    }
    own = {
        start: -(-max(depth, 1) // _FRAME) * _FRAME
        for start, depth in zip(starts, depths, strict=True)
    }
    found: dict[int, int] = {}

    def depth_of(start: int) -> int:  # the verifier refuses recursion
        if start not in found:
            found[start] = own[start] + max(map(depth_of, within[start]), default=0)
        return found[start]

    return depth_of(0)


def _calls(program: Sequence[Instruction]) -> Iterator[tuple[int, int]]:
    """Where a function of the program is called, or its address taken, and where that begins.

    Of a call that was compiled the distance is in `offset`; `immediate` is the function's number.
    """
    for at, one in enumerate(program):
        if one.code == _CALL and one.source == _OF_THE_PROGRAM:
            yield at, at + one.offset + 1
        elif one.code == _LOAD_64 and one.source == _A_FUNCTION:
            yield at, at + one.immediate + 1
