"""Finds out what this kernel offers by really loading and attaching, then detaching."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterable, Iterator

from streamer import __version__
from streamer.config.cleartext import cleartext_passwords
from streamer.config.settings import Settings
from streamer.errors import ConfigError, StreamerError
from streamer.events.catalogue import SELECTABLE
from streamer.kernel import capabilities, cgroups, loader, state, trials, types
from streamer.kernel.host_settings import host_settings
from streamer.kernel.loader import ATTACHED, SPARE
from streamer.kernel.report import VERSION, Answer, CheckReport, Hook, Kind, Rung, Status
from streamer.kernel.state import KindStatus, ProgramStatus
from streamer.kernel.targets import in_vain, without_target
from streamer.kernel.uses import uses_of
from streamer.privilege.split import with_helper

_NOT_ASKED = "not among the events asked for"
_MOST_NAMES = 10
_CAPABILITIES = {
    capabilities.CAP_BPF: "to load programs",
    capabilities.CAP_PERFMON: "to load those that look at the kernel",
    capabilities.CAP_NET_ADMIN: "for programs at interfaces and cgroups",
    capabilities.CAP_SYS_PTRACE: "to look at processes of others",
    capabilities.CAP_DAC_READ_SEARCH: "to look at files of others",
    capabilities.CAP_SYS_ADMIN: "to mount tracefs; stands for the first three",
    capabilities.CAP_SYS_RESOURCE: "to raise RLIMIT_MEMLOCK, which counts before Linux 5.11",
    capabilities.CAP_SETUID: "to become a user without rights",
    capabilities.CAP_SETGID: "to become a user without rights",
}
_WORDS: dict[str, Status] = {"full": "full", "partial": "degraded", "missing": "unavailable"}


def report(settings: Settings, kinds: frozenset[str], *, apart: bool = False) -> CheckReport:
    """Load and attach for `kinds`, detach again, and say what became of each; and try all that the
    objects use. Raises ConfigError alone: a file that a filter names is not there.

    What is loaded for `kinds` goes through a privileged helper, as `run` does: that it has fewer
    rights can make a difference. `apart`: this process has mounts of its own.
    """
    settings_there = host_settings(apart=apart)  # before anything is raised
    had_tracefs = loader.has_tracefs()
    programs: list[ProgramStatus] = []
    reason, no_functions, transport = "", "not tried", "not tried"
    kernel_types = _types(settings)
    try:
        kernel = loaded(settings, kinds)
    except ConfigError:  # the kernel is not to blame
        raise
    except StreamerError as error:
        reason = str(error)
        found = {kind: KindStatus("missing", reason) for kind in sorted(kinds)}
    else:
        no_functions, kernel_types = kernel.no_functions, kernel.types.words
        transport = _transport(kernel.transport)
        try:
            kernel.attach()
            programs, found = kernel.statuses, kernel.coverage(kinds)
        finally:
            kernel.close()
    tried = trials.try_all(uses_of(), apart=apart)
    interfaces = {name: _interface(name) for name in settings.kernel.interfaces}
    uname = os.uname()
    made = CheckReport(
        version=VERSION,
        agent=__version__,
        kernel=f"{uname.sysname} {uname.release} {uname.machine}",
        ok=False,
        types=kernel_types,
        transport=transport,
        kinds={kind: Kind(_WORDS[one.status], one.reason) for kind, one in found.items()},
        not_asked=_not_asked(settings, kinds),
        interfaces=interfaces,
        notes=[*in_vain(settings.kernel, kinds), *cleartext_passwords(settings)],
        hooks=list(hooks_of(programs)),
        features={
            **tried.features,
            "load": Answer("no", reason) if reason else trials.YES,
            "functions": _functions(no_functions),
            "tracefs": _tracefs(had_tracefs),
            "cgroup_ids": _cgroup_ids(),
            "decoder": _decoder(),
        },
        program_types=tried.program_types,
        map_types=tried.map_types,
        helpers=tried.helpers,
        attach_points=tried.attach_points,
        capabilities=dict(_capabilities()),
        settings=settings_there,
    )
    made.ok = all(one.status == "full" for one in made.kinds.values()) and all(
        one.answer == "yes" for one in interfaces.values()
    )
    if not apart:
        _leave_no_tracefs(had_tracefs)
    return made


def loaded(settings: Settings, kinds: frozenset[str]) -> state.KernelState:
    """What `kinds` need, loaded through a helper that ends with it. Raises StreamerError."""
    capabilities.require()
    loader = with_helper(settings, kinds).loader
    try:
        return state.load(settings, kinds, loader)
    except BaseException:
        loader.close()
        raise


def hooks_of(programs: Iterable[ProgramStatus]) -> Iterator[Hook]:
    """The hooks that the programs are ways to."""
    ways: dict[tuple[str, str], list[ProgramStatus]] = {}
    for program in programs:
        ways.setdefault((program.sensor, program.hook), []).append(program)
    for (sensor, hook), rungs in ways.items():
        yield Hook(
            hook=hook,
            sensor=sensor,
            kinds=sorted({kind for rung in rungs for kind in rung.kinds}),
            used=next((rung.way for rung in rungs if rung.status == ATTACHED), ""),
            rungs=[_rung(rung) for rung in rungs],
        )


def _transport(used: loader.Transport) -> str:
    said = "ring buffers" if used.name == "ring" else "perf buffers"
    return f"{said}: {used.reason}" if used.reason else said


def _rung(program: ProgramStatus) -> Rung:
    if program.status == ATTACHED:
        return Rung(program.name, program.way, "used", program.reason)
    if program.status == SPARE:
        return Rung(program.name, program.way, "spare", program.reason)
    return Rung(program.name, program.way, "lacking", program.reason)


def _types(settings: Settings) -> str:
    """What is known of them where nothing could be loaded."""
    try:
        return types.of_file(settings.btf).words if settings.btf else types.of_kernel().words
    except StreamerError as error:
        return str(error)


def _not_asked(settings: Settings, kinds: frozenset[str]) -> dict[str, str]:
    why = without_target(settings.kernel)
    return {kind: why.get(kind, _NOT_ASKED) for kind in sorted(SELECTABLE.keys() - kinds)}


def _interface(name: str) -> Answer:
    there = [one for _, one in socket.if_nameindex()]
    if name in there:
        return trials.YES
    listed = ", ".join(there[:_MOST_NAMES]) + (", …" if len(there) > _MOST_NAMES else "")
    return Answer("no", f"there is no such interface here; there are: {listed}")


def _functions(no_functions: str) -> Answer:
    if no_functions == "not tried":
        return Answer("unknown", no_functions)
    return Answer("no", no_functions) if no_functions else trials.YES


def _tracefs(had: bool) -> Answer:
    trouble = loader.ensure_tracefs()
    if not trouble:
        return trials.YES if had else Answer("yes", "not mounted now: `streamer run` mounts it")
    if capabilities.CAP_SYS_ADMIN in capabilities.of_host():
        return Answer("no", trouble)
    return Answer("unknown", f"{trouble}: only root can look into it, or mount it")


def _leave_no_tracefs(had: bool) -> None:
    """Where it had to be mounted in the mounts that others see."""
    if not had and loader.has_tracefs():
        ctypes.CDLL(None).umount2(loader.TRACEFS[0].encode(), 0)


def _cgroup_ids() -> Answer:
    unseen = cgroups.what_is_unseen()
    return Answer("no", unseen) if unseen else trials.YES


def _decoder() -> Answer:
    from streamer.ring.records import COMPILED

    if COMPILED:
        return Answer("yes", "compiled")
    return Answer("no", "pure Python: slower, no compiler was there at the install")


def _capabilities() -> Iterator[tuple[str, Answer]]:
    effective, of_host = capabilities.effective(), capabilities.of_host()
    for number, purpose in _CAPABILITIES.items():
        name = capabilities.name_of(number)
        if number in of_host:
            yield name, Answer("yes", purpose)
        elif number in effective:
            yield name, Answer("no", f"{purpose}; it is that of a user namespace only")
        else:
            yield name, Answer("no", purpose)
