"""What sensors attach to, apart from the kernel as a whole, as the configuration names it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Set

from streamer.config.settings import Kernel
from streamer.kernel.cgroups import cgroup_root
from streamer.kernel.loader import Targets
from streamer.kernel.objects import SENSORS
from streamer.kernel.system_calls import are_here, functions_of_calls

NO_INTERFACE = "no interface is named: --interface NAME, or `interfaces` in [kernel]"
NO_SYSCALL = "no system call is named: --syscall NAME, or `syscalls` in [kernel]"
NO_SUCH_SYSCALL = "this machine has none of the system calls that are named"
NO_RATE = "no rate is set: --profile-hz N, or `profile_hz` in [kernel]"


def targets_of(kernel: Kernel, kinds: Set[str] | None = None) -> dict[str, Targets]:
    """The targets of every sensor that has any, if `kinds` are given of those that report them.

    Others get none, so that the helper keeps no capability for them.
    """
    interfaces = kernel.interfaces
    cgroup = cgroup_root()
    functions = functions_of_calls(kernel.syscalls, platform.machine())
    found = {}
    for name, sensor in SENSORS.items():
        programs = [
            one for one in sensor.programs if kinds is None or not kinds.isdisjoint(one.kinds)
        ]
        needs = {need for program in programs for need in program.needs}
        targets = Targets(
            interfaces=interfaces if "interface" in needs else (),
            cgroup=cgroup if "cgroup" in needs else "",
            functions=functions if "functions" in needs else (),
            rate=kernel.profile_hz if "rate" in needs else 0,
        )
        if any(targets):
            found[name] = targets
    return found


def without_target(kernel: Kernel) -> Mapping[str, str]:
    """The kinds that nothing reports as long as their target is not named, and why."""
    missing: dict[str, str] = {}
    for need, reason in _not_given(kernel):
        programs = [program for sensor in SENSORS.values() for program in sensor.programs]
        with_it = {kind for one in programs if need in one.needs for kind in one.kinds}
        without = {kind for one in programs if need not in one.needs for kind in one.kinds}
        missing |= dict.fromkeys(sorted(with_it - without), reason)
    return missing


def in_vain(kernel: Kernel, kinds: Set[str]) -> Iterator[str]:
    """What of `kernel` names a target that none of `kinds` is observed at, as lines for people."""
    needs = {
        need
        for sensor in SENSORS.values()
        for program in sensor.programs
        if not kinds.isdisjoint(program.kinds)
        for need in program.needs
    }
    if kernel.interfaces and "interface" not in needs:
        yield "interfaces are named, and none of the events asked for is observed at interfaces"
    if kernel.syscalls and "option:syscalls" not in needs:
        yield "system calls are named, and none of the events asked for is about system calls"


def _not_given(kernel: Kernel) -> Iterator[tuple[str, str]]:
    if not kernel.interfaces:
        yield "interface", NO_INTERFACE
    if not kernel.profile_hz:
        yield "rate", NO_RATE
    if not kernel.syscalls:
        yield "option:syscalls", NO_SYSCALL
    elif not are_here(kernel.syscalls, platform.machine()):
        yield "option:syscalls", NO_SUCH_SYSCALL
