"""Which BPF maps a process holds, as the kernel says it: needs CAP_SYS_ADMIN."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)


class _Info(ctypes.Structure):
    """The beginning of `struct bpf_map_info`."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
    )


class HeldMap(NamedTuple):
    """A map. The kernel keeps 15 bytes of its name."""

    id: int
    name: str
    entries: int


def maps_of(*pids: int) -> list[HeldMap]:
    """The maps that the processes hold together; this process, if none is given."""
    numbers = {number for pid in pids or (os.getpid(),) for number in _ids(pid)}
    return sorted(held for held in map(_find, numbers) if held is not None)


def exists(number: int) -> bool:
    """Whether there is a map of this id."""
    return _find(number) is not None


def look_up(fd: int, key: bytes, size: int) -> list[int]:
    """The 64-bit words of the value of a key, which has `size` bytes; none if it is not there."""
    value = ctypes.create_string_buffer(size)
    if _libbpf.bpf_map_lookup_elem(fd, key, value) < 0:
        return []
    return [int.from_bytes(value.raw[at : at + 8], "little") for at in range(0, size, 8)]


def possible_cpus() -> int:
    """How many CPUs may come up: a map by CPU has so many values for a key."""
    count: int = _libbpf.libbpf_num_possible_cpus()
    return count


def _ids(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # the one by which the directory is read
            for line in path.read_text().splitlines():
                key, _, value = line.partition(":")
                if key == "map_id":
                    yield int(value)


def _find(number: int) -> HeldMap | None:
    fd = _libbpf.bpf_map_get_fd_by_id(number)
    if fd < 0:
        return None
    info, size = _Info(), ctypes.c_uint32(ctypes.sizeof(_Info))
    failed = _libbpf.bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
    os.close(fd)
    assert not failed, os.strerror(ctypes.get_errno())
    return HeldMap(info.id, info.name.decode(), info.max_entries)
