"""Perf buffers in place of ring buffers: for each ring one on every CPU that is up.

It runs in the privileged process, which makes them; the worker maps them, too, and reads them.
Memory that is locked counts against a limit of the user's, so that there may be less of it than
was asked for; but once a buffer is mapped, to map it again costs nothing.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress

from streamer.errors import KernelError
from streamer.kernel.libbpf import Map
from streamer.kernel.perf_event import open_output, write_where

EVENTS_OF_A_CPU = 2
"""One that wakes the reader when a quarter of the buffer has filled, and one that does at once."""
_TOO_MUCH = (errno.EPERM, errno.ENOMEM)


def buffer_size(total: int, cpus: int) -> int:
    """Bytes of the buffer of each of so many CPUs, so that all together have at most `total`.

    A power of two, and at least a page.
    """
    each = max(total // cpus, mmap.PAGESIZE)
    return 1 << each.bit_length() - 1


class PerfBuffers:
    """The buffers of all rings, as far as this process holds them."""

    def __init__(self, arrays: Mapping[str, Map], rings: Mapping[str, int], cpus: int) -> None:
        """`arrays` are the maps of perf events, `rings` the bytes that `cpus` share of each."""
        self._arrays = arrays
        self._held: dict[tuple[str, int], mmap.mmap] = {}
        self._ready: dict[tuple[str, int], int] = {}  # descriptors that nobody has asked for yet
        self.sizes = {ring: buffer_size(total, cpus) for ring, total in rings.items()}
        """Bytes of a buffer, by ring. What is allowed may be less: see `fit`."""

    def fit(self, cpus: list[int]) -> str:
        """Make the buffers of these CPUs as large as may be locked. Why not as asked, if so.

        Raises:
            KernelError: not even the smallest can be had.
        """
        asked = dict(self.sizes)
        for ring in self.sizes:
            while not self._fits(ring, cpus):
                self.sizes[ring] //= 2
        if self.sizes == asked:
            return ""
        sizes = ", ".join(f"{ring} {size:,}" for ring, size in self.sizes.items())
        return f"no more memory may be locked than {sizes} bytes on each CPU (RLIMIT_MEMLOCK)"

    def _fits(self, ring: str, cpus: list[int]) -> bool:
        try:
            for cpu in cpus:
                with suppress(_NotUp):
                    self._ready[ring, cpu] = self._open_one(ring, cpu)
        except OSError as error:
            self._forget(ring)
            if error.errno not in _TOO_MUCH or self.sizes[ring] == mmap.PAGESIZE:
                raise KernelError(f"perf buffers cannot be had: {error.strerror}") from error
            return False
        return True

    def open(self, cpu: int) -> dict[str, int]:
        """Descriptors of the buffers of a CPU, by ring, which are the caller's; new ones, if it
        has been down since. None if it is not up.

        Raises:
            OSError: the kernel refused.
        """
        found: dict[str, int] = {}
        try:
            for ring in self.sizes:
                ready = self._ready.pop((ring, cpu), None)
                found[ring] = self._open_one(ring, cpu) if ready is None else ready
        except _NotUp:
            return {}
        except OSError:
            for fd in found.values():
                os.close(fd)
            raise
        return found

    def _open_one(self, ring: str, cpu: int) -> int:
        size = self.sizes[ring]
        before = self._held.pop((ring, cpu), None)
        if before is not None:
            before.close()
        try:
            filling = open_output(cpu, size // 4)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.EINVAL):
                raise _NotUp(error.errno, error.strerror) from None
            raise
        try:
            held = mmap.mmap(filling, mmap.PAGESIZE + size)
            at_once = open_output(cpu)
            try:
                write_where(at_once, filling)
                array = self._arrays[ring]
                first = EVENTS_OF_A_CPU * cpu
                for index, event in enumerate((filling, at_once), first):
                    array.update(index.to_bytes(4, "little"), event.to_bytes(4, "little"))
            finally:
                os.close(at_once)  # the map holds it
        except BaseException:
            os.close(filling)
            raise
        self._held[ring, cpu] = held
        return filling

    def _forget(self, ring: str) -> None:
        for name, cpu in list(self._held):
            if name == ring:
                self._held.pop((name, cpu)).close()
        for name, cpu in list(self._ready):
            if name == ring:
                os.close(self._ready.pop((name, cpu)))

    def close(self) -> None:
        """Let go of all of them. Harmless when done already."""
        for ring in self.sizes:
            self._forget(ring)


class _NotUp(OSError):
    """There is no such CPU now."""
