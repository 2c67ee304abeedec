"""Cgroups with limits of memory and CPU time, by whichever version of cgroups the host has."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PERIOD_US = 100_000
V1 = Path("/sys/fs/cgroup")


class Limited:
    """A cgroup of one controller, `memory` or `cpu`; processes enter by `prefix`."""

    def __init__(self, controller: str) -> None:
        name = f"streamer-limit-{os.getpid()}-{time.monotonic_ns()}"
        mount = _mount_v1(controller)
        self._v1 = mount is not None
        self.path = (mount or _mount_v2(controller)) / name
        self.path.mkdir()

    @property
    def prefix(self) -> tuple[str, ...]:
        """What is put before a command that is to run in it."""
        return "sh", "-c", 'echo 0 >"$0"/cgroup.procs && exec "$@"', str(self.path)

    def memory(self, size: int) -> None:
        """At most so many bytes."""
        name = "memory.limit_in_bytes" if self._v1 else "memory.max"
        (self.path / name).write_text(str(size))

    def cpu(self, share: float | None) -> None:
        """At most that share of one CPU; None: no limit."""
        quota = None if share is None else round(share * PERIOD_US)
        if self._v1:
            (self.path / "cpu.cfs_quota_us").write_text(str(-1 if quota is None else quota))
        else:
            (self.path / "cpu.max").write_text(f"{quota or 'max'} {PERIOD_US}")

    @property
    def most_memory(self) -> int:
        """Bytes that were in use at most: page cache and kernel memory included."""
        name = "memory.max_usage_in_bytes" if self._v1 else "memory.peak"
        return int((self.path / name).read_text())

    @property
    def killed(self) -> int:
        """How many processes were killed for want of memory."""
        name = "memory.oom_control" if self._v1 else "memory.events"
        lines = dict(line.split() for line in (self.path / name).read_text().splitlines())
        return int(lines["oom_kill"])

    def remove(self) -> None:
        """When nothing runs in it any more."""
        deadline = time.monotonic() + 10
        while True:
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return


@contextmanager
def limited(controller: str) -> Iterator[Limited]:
    """A cgroup within the block."""
    made = Limited(controller)
    try:
        yield made
    finally:
        made.remove()


def _mounts() -> Iterator[tuple[Path, Mapping[str, None]]]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup":
            yield Path(place), dict.fromkeys(options.split(","))


def _mount_v1(controller: str) -> Path | None:
    return next((place for place, options in _mounts() if controller in options), None)


def _mount_v2(controller: str) -> Path:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            control = Path(place) / "cgroup.subtree_control"
            control.write_text(f"+{controller}")
            return Path(place)
    raise FileNotFoundError("no cgroups are mounted")
