"""Runs of programs that the kernel left out, as far as it counts them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from streamer.kernel.loader import ATTACHED, Attached, ProgramState


def missed_runs(sensors: Iterable[Attached]) -> dict[str, int]:
    """Runs of attached programs that the kernel left out, per program that had any.

    It leaves one out that would run inside itself on its CPU, and from 5.12 on it counts that for
    raw tracepoints and for programs at functions (`recursion_misses` in fdinfo), from 6.7 on also
    for those at perf events of tracepoints. Of two programs at the same place each does what the
    other has to leave out: no miss. What both leave out they find out themselves
    (`change_unseen` among the faults).
    """
    found: dict[str, int] = {}
    for programs, descriptors in sensors:
        alone = _alone(programs)
        for copy, fd in descriptors.items():
            name = copy.partition(":")[0]
            count = _recursion_misses(fd) if name in alone else 0
            if count:
                found[name] = found.get(name, 0) + count
    return found


def _alone(programs: Iterable[ProgramState]) -> set[str]:
    """The programs with no other at the same place."""
    places: dict[str, list[str]] = {}
    for program in programs:
        if program.status == ATTACHED:
            places.setdefault(program.way, []).append(program.name)
    return {names[0] for names in places.values() if len(names) == 1}


def _recursion_misses(fd: int) -> int:
    # Kernels that do not count them may not let the worker look, either.
    with suppress(OSError), open(f"/proc/self/fdinfo/{fd}") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key == "recursion_misses":
                return int(value)
    return 0
