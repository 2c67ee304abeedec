"""Finds out what a kernel takes by trying: loads tiny programs, makes maps, attaches, detaches.

Nothing is concluded from a version. What the objects use says what is tried (`uses.py`), and the
loader does it as it does with the sensors, so that what it learns to do is tried as well. All that
is made is known by descriptors alone, and goes with them.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from streamer.errors import KernelError
from streamer.kernel import capabilities, tiny
from streamer.kernel.capabilities import CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN
from streamer.kernel.cgroups import cgroup_root
from streamer.kernel.helper_names import HELPERS
from streamer.kernel.libbpf import (
    FIGURES,
    Link,
    Object,
    Program,
    Refused,
    btf_id_at,
    functions_of,
    lengths_of,
    load_instructions,
    map_type_name,
    program_type_name,
    run_program,
)
from streamer.kernel.loader import (
    FAILED,
    TIMED,
    Loader,
    ProgramState,
    Targets,
    _Sensor,
    ensure_tracefs,
)
from streamer.kernel.report import Answer
from streamer.kernel.system_calls import functions_of_calls
from streamer.kernel.tags import ProgramInfo, SensorInfo
from streamer.kernel.types import KERNEL_BTF
from streamer.kernel.uses import MapUse, ProgramUse, Uses

YES = Answer("yes", "")
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 16384, 1 << 18, 2
_SOCKET_FILTER, _RAW_TRACEPOINT, _RINGBUF = 1, 17, 27  # enum bpf_prog_type, enum bpf_map_type
_CURRENT_TASK, _READ_KERNEL = 35, 113  # enum bpf_func_id
_NO_TYPES = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 0, 0, 1) + b"\0"
"""BTF that describes nothing (struct btf_header of linux/btf.h): no types, and an empty string."""
_BLINDED = 0x12345678  # a constant for the JIT to hide, if it hides any
_RATE = 1  # in Hz
_CALL = ("getppid",)
"""The system call at which is tried what attaches to such as are named: it takes no time."""

_ABOUT_PACKETS = ("xdp", "tc", "tcx", "classifier")
_TARGETS = frozenset({"interface", "cgroup", "rate", "functions"})
_MACHINES = frozenset({"x86_64", "aarch64"})
_NOT_ITS_FAULT = frozenset(
    {errno.EBUSY, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR, errno.ENOSPC}
)
_NO_PLACE = "this kernel has no "
_RANK = {"unknown": 0, "no": 1, "yes": 2}
_NOT_PERMITTED = (errno.EPERM, errno.EACCES)
_NO_SUCH_HELPER = re.compile(r"invalid func |unknown func |cannot use helper ")
_BAD_ARGUMENT = re.compile(r"\bR[0-5]\b")


class Found(NamedTuple):
    """What came of all trials, by name. `helpers` are by the type of the program first."""

    features: dict[str, Answer]
    program_types: dict[str, Answer]
    map_types: dict[str, Answer]
    helpers: dict[str, dict[str, Answer]]
    attach_points: dict[str, Answer]


# ---------------------------------------------------------------- what an error means


def judged(error: OSError, needs: Iterable[int], have: frozenset[int]) -> Answer:
    """What a refusal says of the kernel, if `have` are the capabilities of who tried.

    It is a no only if it would be one for anybody: not where a capability is missing, or memory.
    """
    reason = str(error.strerror)
    if error.errno in _NOT_ITS_FAULT:
        return Answer("unknown", reason)
    if CAP_SYS_ADMIN not in have and error.errno in _NOT_PERMITTED:
        lacking = [capabilities.name_of(one) for one in needs if one not in have]
        if lacking:
            return Answer("unknown", f"{reason}: it takes {' and '.join(lacking)}")
        return Answer("unknown", f"{reason}: there may be more to it with CAP_SYS_ADMIN")
    return Answer("no", reason)


def needs_of(section: str) -> tuple[int, ...]:
    """The capabilities that a program of that section takes."""
    kind = section.partition("/")[0]
    if kind in _ABOUT_PACKETS or kind.startswith("cgroup"):
        return CAP_BPF, CAP_NET_ADMIN
    return CAP_BPF, CAP_PERFMON


def about_helper(error: Refused, have: frozenset[int]) -> Answer | None:
    """What the verifier's refusal says of the helper that was called; None if nothing.

    The call has no arguments but the program's own. A verifier that complains of them knows it.
    Some helpers there are only for those with CAP_PERFMON, whatever the program takes itself.
    """
    lines = [line for line in error.log.splitlines() if not line.startswith(FIGURES)]
    said = lines[-1] if lines else ""
    if _BAD_ARGUMENT.search(said):
        return YES
    if not _NO_SUCH_HELPER.search(said):
        return None
    if have & {CAP_PERFMON, CAP_SYS_ADMIN}:
        return Answer("no", said)
    return Answer("unknown", f"{said}: some are only for those with CAP_PERFMON")


# ---------------------------------------------------------------- places of its own


def have_own_mounts() -> bool:
    """Leave the mounts that others see, for good. Whether that was possible.

    It takes CAP_SYS_ADMIN, as mounting does: without, there is nothing to be left behind.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        return False
    return not libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)


@contextmanager
def own_network() -> Iterator[None]:
    """Be in a network namespace that nobody else is in, with its own /sys, for a while.

    Only for a process with mounts of its own.

    Raises:
        OSError: it may not be made.
        KernelError: there is no way back.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(_CLONE_NEWNET):
            raise _last_error()
        try:
            # The one that is there shows the interfaces of whoever mounted it.
            if libc.mount(b"sysfs", b"/sys", b"sysfs", ctypes.c_ulong(0), None):
                raise _last_error()
            try:
                yield
            finally:
                libc.umount2(b"/sys", _MNT_DETACH)
        finally:
            if libc.setns(before, _CLONE_NEWNET):
                raise KernelError(f"no way back to the network: {_last_error().strerror}")
    finally:
        os.close(before)


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


# ---------------------------------------------------------------- programs and their places


class _TrialLoader(Loader):
    """A loader whose sensors are tiny programs, at the sections of those that the agent has.

    It has nothing in common with the agent's, and needs no BTF.
    """

    def __init__(self, groups: Mapping[str, Sequence[ProgramUse]], targets: Targets) -> None:
        sensors = {
            group: SensorInfo(group, tuple(map(_info, range(len(uses)), uses)))
            for group, uses in groups.items()
        }
        super().__init__(sensors=sensors, targets=dict.fromkeys(sensors, targets))
        self.no_functions = ""  # they are tried one by one
        self.errors: dict[tuple[str, str], OSError] = {}  # by sensor and program
        self._core = self._open(next(iter(groups)))  # to be there: nothing is taken from it

    def _open(self, name: str) -> Object:
        programs = self._catalogue[name].programs
        made = [tiny.Tiny(one.name, one.hook, _doing_nothing(one.hook)) for one in programs]
        return Object.of_bytes(tiny.object_of(made), tiny.NAME)

    def _obstacle(self, section: str) -> str:
        return ""

    def _try_load(self, made: _Sensor, names: Collection[str], function: str = "") -> Object:
        try:
            return super()._try_load(made, names, function)
        except OSError as error:
            self.errors |= dict.fromkeys(((made.info.name, name) for name in names), error)
            raise

    def _attach_program(self, made: _Sensor, program: Program) -> tuple[list[Link], str]:
        try:
            return super()._attach_program(made, program)
        except OSError as error:
            self.errors[made.info.name, program.name] = error
            raise

    def why(self, group: str, state: ProgramState) -> OSError:
        """Why a program failed, in the kernel's words. The loader's are for who runs the agent."""
        if state.reason.startswith(_NO_PLACE) and state.reason.endswith(state.way):
            return FileNotFoundError(errno.ENOENT, "this kernel has none")
        return self.errors.get((group, state.name), OSError(0, state.reason))


def _info(number: int, use: ProgramUse) -> ProgramInfo:
    """With what it attaches to. What else the program needs is no matter here."""
    info = use.info or ProgramInfo("", "", ())
    needs = tuple(need for need in info.needs if need in _TARGETS)
    if not _at_interfaces(use):  # its sensor's others may be
        needs = tuple(need for need in needs if need != "interface")
    return info._replace(name=f"{tiny.NAME}_{number}", hook=use.section, needs=needs)


def _doing_nothing(section: str) -> bytes:
    return tiny.returning(tiny.neutral(section))


def about_way(section: str, way: str) -> Answer:
    """What is said of a place where a program is attached; `way` is what the loader calls it."""
    if section.startswith("tcx/") and way.endswith(":clsact"):
        return Answer("no", "this kernel has no tcx: clsact serves in its place")
    return Answer("yes", way if way != section else "")


class _AtPlace(NamedTuple):
    """What came of a tiny program at a section: did it load, and did it attach.

    `attaches` is None where that was not tried; `there` is whether the kernel has the place.
    """

    use: ProgramUse
    loads: Answer
    attaches: Answer | None
    there: bool = True


def _try_places(
    programs: Iterable[ProgramUse], targets: Targets, have: frozenset[int]
) -> list[_AtPlace]:
    """Those of one type together: where all load, the kernel's types are read only once."""
    groups: dict[str, list[ProgramUse]] = {}
    for use in programs:
        attached = "attached" if _is_attached(use) else "loaded"
        groups.setdefault(f"{attached} {use.type} {use.attach}", []).append(use)
    if not groups:
        return []
    loader = _TrialLoader(groups, targets)
    try:
        return [
            one for name, uses in groups.items() for one in _try_group(loader, name, uses, have)
        ]
    finally:
        loader.close()


def _try_group(
    loader: _TrialLoader, group: str, uses: Sequence[ProgramUse], have: frozenset[int]
) -> Iterator[_AtPlace]:
    loaded = {state.hook: state for state in loader.load(group, {}).programs}
    attached = {}
    if _is_attached(uses[0]):
        attached = {state.hook: state for state in loader.attach(group).programs}
    for use in uses:
        states = attached.get(use.section), loaded[use.section]
        failed = next((one for one in states if one and one.status == FAILED), None)
        if failed is None:
            way = states[0].way if states[0] else None
            yield _AtPlace(use, YES, about_way(use.section, way) if way is not None else None)
        else:
            error = loader.why(group, failed)
            yield _refused(
                use, error, loads=failed is states[0] and states[1].status != FAILED, have=have
            )


def _refused(use: ProgramUse, error: OSError, *, loads: bool, have: frozenset[int]) -> _AtPlace:
    """`loads`: it was loaded, and could not be attached."""
    answer = judged(error, needs_of(use.section), have)
    if not loads:
        there = error.errno not in (errno.ENOENT, errno.ESRCH)
        return _AtPlace(use, answer, answer if _is_attached(use) else None, there)
    in_tracefs = use.section.partition("/")[0] in ("tracepoint", "tp")
    trouble = ensure_tracefs() if in_tracefs else ""
    return _AtPlace(use, YES, Answer("unknown", trouble) if trouble else answer)


def _is_attached(use: ProgramUse) -> bool:
    """Whether it is: of others the agent runs one itself, or only looks whether it loads."""
    return use.info is not None and use.section != TIMED and not use.info.run


def _is_of_this_machine(use: ProgramUse) -> bool:
    machines = _MACHINES.intersection(use.info.needs if use.info else ())
    return not machines or platform.machine() in machines


def _at_interfaces(use: ProgramUse) -> bool:
    needs = use.info.needs if use.info else ()
    return "interface" in needs and "cgroup" not in needs


def _places(uses: Uses, have: frozenset[int], *, apart: bool) -> list[_AtPlace]:
    """All of them, those at interfaces in a network of its own, if it can have one (`apart`)."""
    by_section = {use.section: use for use in uses.programs if _is_of_this_machine(use)}
    by_section |= {use.section: use for use in by_section.values() if _is_attached(use)}
    at_interfaces = [use for use in by_section.values() if _at_interfaces(use)]
    others = [use for use in by_section.values() if not _at_interfaces(use)]
    functions = functions_of_calls(_CALL, platform.machine())
    found = _try_places(others, Targets((), cgroup_root() or "/", _RATE, functions), have)
    try:
        if not apart:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        with own_network():
            return found + _try_places(at_interfaces, Targets(("lo",)), have)
    except OSError as error:
        # They can be loaded all the same, for an interface that is not there.
        why = f"no network of its own to try it in: {error.strerror}"
        loaded = _try_places(at_interfaces, Targets(("",)), have)
        return found + [
            one._replace(attaches=Answer("unknown", why)) if one.loads == YES else one
            for one in loaded
        ]


def _types(places: Iterable[_AtPlace]) -> dict[str, Answer]:
    """A type is there if it loads anywhere, and not if it is refused where there is a place."""
    found: dict[str, Answer] = {}
    for one in places:
        name = program_type_name(one.use.type, one.use.attach)
        answer = one.loads if one.there else Answer("unknown", one.loads.reason)
        before = found.get(name)
        if before is None or _RANK[answer.answer] > _RANK[before.answer]:
            found[name] = answer
    return found


# ---------------------------------------------------------------- maps and helpers


def _try_maps(uses: Iterable[MapUse], have: frozenset[int]) -> dict[str, Answer]:
    """Types of the kernel matter to programs alone, of which none is loaded: there need be none.

    libbpf looks for those of functions all the same. Nothing it finds is nothing wrong; among the
    object's own it finds several that a name may stand for, and gives up.
    """
    types = os.memfd_create(tiny.NAME, os.MFD_CLOEXEC)
    try:
        os.write(types, _NO_TYPES)
        path = f"/proc/self/fd/{types}"
        return {map_type_name(one.type, one.flags): _try_map(one, path, have) for one in uses}
    finally:
        os.close(types)


def _try_map(use: MapUse, types: str, have: frozenset[int]) -> Answer:
    """Make one like that in the object, of one entry, and nothing else of the object."""
    try:
        opened = Object(use.path, types)
        try:
            for name, one in opened.maps.items():
                if name != use.name:
                    one.leave_out()
                elif one.type != use.type:
                    one.become_perf_events(1)
                elif one.max_entries:
                    one.resize(mmap.PAGESIZE if use.type == _RINGBUF else 1)
            for program in opened.programs.values():
                program.autoload(False)
            opened.load()
        finally:
            opened.close()
    except OSError as error:
        return judged(error, (CAP_BPF,), have)
    return YES


def _helpers(
    uses: Uses, places: Iterable[_AtPlace], have: frozenset[int]
) -> dict[str, dict[str, Answer]]:
    called: dict[tuple[int, int], set[int]] = {}
    for use in uses.programs:
        called.setdefault((use.type, use.attach), set()).update(use.helpers)
    loadable = {(one.use.type, one.use.attach): one.use for one in places if one.loads == YES}
    return {
        program_type_name(*type): _helpers_of(loadable.get(type), helpers, have)
        for type, helpers in called.items()
    }


def _helpers_of(
    use: ProgramUse | None, helpers: Iterable[int], have: frozenset[int]
) -> dict[str, Answer]:
    names = {helper: HELPERS.get(helper, str(helper)) for helper in sorted(helpers)}
    if use is None:
        why = Answer("unknown", "no program of this type could be loaded")
        return dict.fromkeys(names.values(), why)
    try:
        btf_id = btf_id_at(use.section, use.attach)
    except OSError as error:
        why = Answer("unknown", os.strerror(error.errno or 0))
        return dict.fromkeys(names.values(), why)
    return {name: _try_helper(use, helper, btf_id, have) for helper, name in names.items()}


def _try_helper(use: ProgramUse, helper: int, btf_id: int, have: frozenset[int]) -> Answer:
    code = tiny.calling(helper, tiny.neutral(use.section))
    try:
        os.close(load_instructions(use.type, code, tiny.NAME, attach=use.attach, btf_id=btf_id))
    except Refused as error:
        return about_helper(error, have) or judged(error, needs_of(use.section), have)
    return YES


# ---------------------------------------------------------------- the kernel as a whole


def _try_bpf(have: frozenset[int]) -> Answer:
    """The simplest program there is, which any user may load where the kernel is set so."""
    try:
        os.close(load_instructions(_SOCKET_FILTER, tiny.returning(0), tiny.NAME))
    except Refused as error:
        if error.errno == errno.ENOSYS:
            return Answer("no", "no BPF in this kernel (CONFIG_BPF_SYSCALL)")
        answer = judged(error, (CAP_BPF,), have)
        if answer.answer == "no" and error.errno in _NOT_PERMITTED:
            why = (
                "a seccomp filter, a security module, or a small RLIMIT_MEMLOCK (before Linux 5.11)"
            )
            return Answer("unknown", f"{answer.reason}: {why}")
        return answer
    return YES


def _try_jit(have: frozenset[int]) -> Answer:
    """Look what became of a program, which the kernel shows to those who may load any."""
    try:
        fd = load_instructions(_SOCKET_FILTER, tiny.returning(_BLINDED), tiny.NAME)
    except Refused as error:  # although another one was loaded just now
        return judged(error, (CAP_BPF,), have)
    try:
        machine_code, verified = lengths_of(fd)
    except OSError as error:
        return judged(error, (CAP_BPF,), have)
    finally:
        os.close(fd)
    if not verified:
        return Answer("unknown", "the kernel does not show it: it takes CAP_BPF")
    if not machine_code:
        return Answer("no", "programs are interpreted, and slow")
    if verified > len(tiny.returning(_BLINDED)):
        return Answer("yes", "constants are hidden (bpf_jit_harden), which makes programs slower")
    return YES


def _try_reading(have: frozenset[int]) -> Answer:
    """Let a program read kernel memory, as lockdown in confidentiality mode forbids."""
    code = tiny.reading_memory(_CURRENT_TASK, _READ_KERNEL)
    try:
        fd = load_instructions(_RAW_TRACEPOINT, code, tiny.NAME)
    except Refused as error:
        told = about_helper(error, have)
        if told is not None and told.answer == "no":
            return Answer("no", f"lockdown: {told.reason}")
        return judged(error, (CAP_BPF, CAP_PERFMON), have)
    try:
        result = ctypes.c_int32(run_program(fd)).value
    except OSError as error:
        return judged(error, (CAP_BPF, CAP_PERFMON), have)
    finally:
        os.close(fd)
    return YES if result == 0 else Answer("no", f"lockdown: {os.strerror(-result)}")


def _try_btf() -> Answer:
    try:
        known = functions_of(("vfs_read", "schedule"))
    except OSError as error:
        reason = f"{KERNEL_BTF}: {os.strerror(error.errno or 0)}"
        return Answer("unknown" if error.errno in _NOT_PERMITTED else "no", reason)
    return YES if known else Answer("no", "it knows none of the kernel's functions")


def try_all(uses: Uses, *, apart: bool) -> Found:
    """Try all that the objects use. `apart`: this process has mounts of its own."""
    have = capabilities.of_host()
    bpf = _try_bpf(have)
    features = {"bpf": bpf, "btf": _try_btf()}
    if bpf != YES:
        why = Answer("unknown", f"not even the simplest program loads: {bpf.reason}")
        return _all_unknown(uses, features | {"jit": why, "kernel_memory": why}, why)
    features |= {"jit": _try_jit(have), "kernel_memory": _try_reading(have)}
    places = _places(uses, have, apart=apart)
    attached = {one.use.section: one.attaches for one in places if one.attaches is not None}
    maps = _try_maps(uses.maps, have)
    return Found(features, _types(places), maps, _helpers(uses, places, have), attached)


def _all_unknown(uses: Uses, features: dict[str, Answer], why: Answer) -> Found:
    here = [use for use in uses.programs if _is_of_this_machine(use)]
    helpers: dict[str, dict[str, Answer]] = {}
    for use in here:
        names = (HELPERS.get(helper, str(helper)) for helper in sorted(use.helpers))
        type = program_type_name(use.type, use.attach)
        helpers.setdefault(type, {}).update(dict.fromkeys(names, why))
    return Found(
        features,
        dict.fromkeys(helpers, why),
        dict.fromkeys((map_type_name(one.type, one.flags) for one in uses.maps), why),
        helpers,
        dict.fromkeys((use.section for use in here if _is_attached(use)), why),
    )
