"""Perf buffers in place of ring buffers: for each ring one on every CPU that is up.

It runs in the privileged process, which makes them; the worker maps them, too, and reads them.
Memory that is locked counts against a limit of the user's, so that there may be less of it than
was asked for; but once a buffer is mapped, to map it again costs nothing.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from streamer.errors import KernelError
from streamer.kernel.libbpf import Map
from streamer.kernel.perf_event import open_output, time_running, write_where

EVENTS_OF_A_CPU = 2
"""One that wakes the reader when a quarter of the buffer has filled, and one that does at once."""
_TOO_MUCH = (errno.EPERM, errno.ENOMEM)
_A_MOMENT = 0.001


def allow_descriptors() -> None:
    """Let this process have as many descriptors as it may: each CPU takes several."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def buffer_size(total: int, cpus: int) -> int:
    """Bytes of the buffer of each of so many CPUs, so that all together have at most `total`.

    A power of two, and at least a page.
    """
    each = max(total // cpus, mmap.PAGESIZE)
    return 1 << each.bit_length() - 1


class _Held(NamedTuple):
    """A buffer, and the event that wakes its reader when a quarter of it has filled."""

    event: int
    memory: mmap.mmap

    def is_alive(self) -> bool:
        """Whether its CPU has been up ever since. Raises OSError."""
        before = time_running(self.event)
        time.sleep(_A_MOMENT)
        return time_running(self.event) > before

    def close(self) -> None:
        os.close(self.event)
        self.memory.close()


class PerfBuffers:
    """The buffers of all rings, as far as this process holds them."""

    def __init__(self, arrays: Mapping[str, Map], rings: Mapping[str, int], cpus: int) -> None:
        """`arrays` are the maps of perf events, `rings` the bytes that `cpus` share of each."""
        allow_descriptors()
        self._arrays = arrays
        self._held: dict[tuple[str, int], _Held] = {}
        self._handed: set[int] = set()  # CPUs whose buffers somebody has asked for
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
                    self._make(ring, cpu)
        except OSError as error:
            self._forget(ring)
            if error.errno not in _TOO_MUCH or self.sizes[ring] == mmap.PAGESIZE:
                raise KernelError(f"perf buffers cannot be had: {error.strerror}") from error
            return False
        return True

    def open(self, cpu: int) -> dict[str, int]:
        """Descriptors of the buffers of a CPU, by ring, which are the caller's.

        Once; and new ones when the CPU has been down since. Otherwise none, and if it is not up.

        Raises:
            OSError: the kernel refused.
        """
        held = [self._held[ring, cpu] for ring in self.sizes if (ring, cpu) in self._held]
        if len(held) < len(self.sizes) or cpu in self._handed:
            # However often it is asked for, nobody is given more memory than there are CPUs for.
            if len(held) == len(self.sizes) and all(one.is_alive() for one in held):
                return {}
            try:
                for ring in self.sizes:
                    self._make(ring, cpu)
            except _NotUp:
                return {}
        self._handed.add(cpu)
        return {ring: os.dup(self._held[ring, cpu].event) for ring in self.sizes}

    def _make(self, ring: str, cpu: int) -> None:
        """A buffer in place of any that was there. Raises OSError."""
        before = self._held.pop((ring, cpu), None)
        if before is not None:
            before.close()
        size = self.sizes[ring]
        try:
            filling = open_output(cpu, size // 4)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.EINVAL):
                raise _NotUp(error.errno, error.strerror) from None
            raise
        try:
            memory = mmap.mmap(filling, mmap.PAGESIZE + size)
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
        self._held[ring, cpu] = _Held(filling, memory)

    def _forget(self, ring: str) -> None:
        for name, cpu in list(self._held):
            if name == ring:
                self._held.pop((name, cpu)).close()

    def close(self) -> None:
        """Let go of all of them. Harmless when done already."""
        for ring in self.sizes:
            self._forget(ring)


class _NotUp(OSError):
    """There is no such CPU now."""
