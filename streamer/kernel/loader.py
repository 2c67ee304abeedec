"""Loads the BPF object and attaches its programs, as far as this kernel allows.

A program that does not load or attach takes only what it observes with it: the rest runs, and
`KernelState.coverage` says which kind is observed fully, partly or not at all, and why.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from streamer.errors import KernelError, StreamerError
from streamer.events import CONTRACT, PROGRAMS, RECORDS
from streamer.kernel.btf import Btf
from streamer.kernel.contract import compare, contract_of
from streamer.kernel.libbpf import Link, Object, Program, possible_cpus
from streamer.privilege import capabilities
from streamer.settings import Filters, Rings, Settings

OBJECT = Path(__file__).parent.parent / "bpf" / "streamer.bpf.o"
KERNEL_BTF = Path("/sys/kernel/btf/vmlinux")
STREAMS = ("critical", "bulk")
_WHOAMI = "whoami"
_X86_SYSTEM_CALLS = ("on_open_enter", "on_open_exit", "on_creat_enter", "on_creat_exit")
"""Hooks of system calls that newer architectures, such as arm64, never had."""
_BY_CPU = ("exec_scratch", "open_scratch", "counters")
_RAW_BTF, _ELF = b"\x9f\xeb", b"\x7fELF"
_KEEP, _DROP = b"\x01", b"\x02"
_OFF, _EXCLUDE, _INCLUDE = 0, 1, 2
_NUMBERS = {layout.kind: number for number, layout in RECORDS.items()}

Coverage = Literal["full", "partial", "missing"]


class ProgramStatus(msgspec.Struct):
    """What became of a program. `reason` is empty when it is attached."""

    name: str
    hook: str
    kinds: tuple[str, ...]
    status: Literal["attached", "failed"]
    reason: str = ""


class KindStatus(msgspec.Struct):
    """How far a kind is observed, and why not fully."""

    status: Coverage
    reason: str = ""


def coverage(programs: Iterable[ProgramStatus], kinds: Collection[str]) -> dict[str, KindStatus]:
    """How far each of `kinds` is observed, given what became of the programs."""
    statuses = list(programs)
    return {kind: _coverage_of(kind, statuses) for kind in sorted(kinds)}


def _coverage_of(kind: str, programs: list[ProgramStatus]) -> KindStatus:
    mine = [program for program in programs if kind in program.kinds]
    failed = [program for program in mine if program.status == "failed"]
    if not failed:
        return KindStatus("full")
    reasons = {_why(program): None for program in failed}
    essential = any(not PROGRAMS[program.name].covers for program in failed)
    status: Coverage = "missing" if essential or len(failed) == len(mine) else "partial"
    return KindStatus(status, "; ".join(reasons))


def _why(program: ProgramStatus) -> str:
    lost = PROGRAMS[program.name].covers
    return f"{program.reason}, so {lost} are not observed" if lost else program.reason


def find_btf(settings: Settings) -> str | None:
    """The BTF file to relocate against: None for the kernel's own.

    Raises:
        KernelError: the kernel has none, and none that is readable is configured.
    """
    if settings.btf is not None:
        _check_btf(Path(settings.btf))
        return settings.btf
    if not KERNEL_BTF.exists():
        raise KernelError(
            f"no BTF: {KERNEL_BTF} is missing (CONFIG_DEBUG_INFO_BTF), so no event can be "
            "observed; name a BTF file of this very kernel in the configuration (btf = PATH)"
        )
    return None


def _check_btf(path: Path) -> None:
    """Refuse what libbpf would refuse with a number that nobody knows."""
    if not path.is_file():
        raise KernelError(f"btf: no such file: {path}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise KernelError(f"btf: cannot read {path}: {error.strerror}") from None
    if not start.startswith((_RAW_BTF, _ELF)):
        raise KernelError(f"btf: {path} holds no BTF")


def ensure_tracefs() -> str:
    """Mount tracefs where the kernel expects it, if it is not there. Why not, or nothing.

    Debian mounts it at boot; a minimal system or container may not. The system-call hooks need
    it to be found, nothing else does.
    """
    for place in ("/sys/kernel/tracing", "/sys/kernel/debug/tracing"):
        if Path(place, "events").is_dir():
            return ""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tracefs", b"/sys/kernel/tracing", b"tracefs", 0, None) == 0:
        return ""
    return f"tracefs is not mounted and cannot be: {os.strerror(ctypes.get_errno())}"


def pack(struct_name: str, values: Mapping[str, int | tuple[int, ...]]) -> bytes:
    """The bytes of a struct of the contract, with the members that are not given at zero."""
    layout = CONTRACT[struct_name]
    data = bytearray(max(offset + size for _, offset, size in layout))
    for name, offset, size in layout:
        value = values.get(name, 0)
        if isinstance(value, tuple):
            struct.pack_into(f"<{len(value)}Q", data, offset, *value)
        else:
            data[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(data)


def filter_mode(keep: Collection[object], drop: Collection[object]) -> int:
    """How the programs use a filter's map."""
    if keep:
        return _INCLUDE
    return _EXCLUDE if drop else _OFF


def settings_bytes(kinds: Collection[str], rings: Rings, filters: Filters) -> bytes:
    """`struct settings` for the programs: what is enabled, and which filters are in use."""
    sizes = (rings.critical_bytes, rings.bulk_bytes)
    return pack(
        "settings",
        {
            "enabled_kinds": sum(1 << _NUMBERS[kind] for kind in kinds),
            # A quarter of a ring may fill before its reader is woken ahead of its timer.
            "wakeup_bytes": tuple(size // 4 for size in sizes),
            "filter_pid": filter_mode(filters.pids, filters.exclude_pids),
            "filter_uid": filter_mode(filters.uids, filters.exclude_uids),
            "filter_comm": filter_mode(filters.comms, filters.exclude_comms),
            "filter_cgroup": filter_mode(filters.cgroups, filters.exclude_cgroups),
            "filter_port": filter_mode(filters.ports, filters.exclude_ports),
            "filter_path": filter_mode(filters.path_prefixes, filters.exclude_path_prefixes),
        },
    )


def filter_entries(filters: Filters) -> Iterable[tuple[str, bytes, bytes]]:
    """Map, key and value for every entry of the filters. What excludes comes last, and wins."""
    tables: list[tuple[str, Iterable[bytes], Iterable[bytes]]] = [
        ("filter_pids", map(_u32, filters.pids), map(_u32, filters.exclude_pids)),
        ("filter_uids", map(_u32, filters.uids), map(_u32, filters.exclude_uids)),
        ("filter_comms", map(_comm, filters.comms), map(_comm, filters.exclude_comms)),
        ("filter_cgroups", map(_u64, filters.cgroups), map(_u64, filters.exclude_cgroups)),
        ("filter_ports", map(_u16, filters.ports), map(_u16, filters.exclude_ports)),
        (
            "filter_paths",
            map(_prefix, _kept_prefixes(filters)),
            map(_prefix, filters.exclude_path_prefixes),
        ),
    ]
    for name, keep, drop in tables:
        yield from ((name, key, _KEEP) for key in keep)
        yield from ((name, key, _DROP) for key in drop)


def _kept_prefixes(filters: Filters) -> Iterable[str]:
    """Without those within an excluded one: in the map the longest match would win."""
    excluded = filters.exclude_path_prefixes
    return (prefix for prefix in filters.path_prefixes if not prefix.startswith(excluded))


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "little")


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _comm(value: str) -> bytes:
    return value.encode().ljust(16, b"\0")


def _prefix(value: str) -> bytes:
    path = value.encode()
    size = dict((name, size) for name, _, size in CONTRACT["path_prefix"])["path"]
    return _u32(8 * len(path)) + path.ljust(size, b"\0")


class KernelState:
    """A loaded object: rings and counters to read, programs to attach and detach."""

    def __init__(self, loaded: Object, cpus: int, programs: list[Program], rings: Rings) -> None:
        """Use `load` to make one."""
        self._object = loaded
        self._programs = programs
        self._links: list[Link] = []
        self.cpus = cpus
        self.statuses: list[ProgramStatus] = []
        self.ring_fds = {name: loaded.maps[name].fd for name in STREAMS}
        self.ring_bytes = {"critical": rings.critical_bytes, "bulk": rings.bulk_bytes}
        self.counters = _map_counters(loaded.maps["counters"].fd, cpus)
        self.reader_state = mmap.mmap(loaded.maps["reader"].fd, mmap.PAGESIZE)
        # Of two programs on one hook, each does what the other has to leave out.
        hooks = Counter(program.section for program in programs)
        self.program_fds = {p.name: p.fd for p in programs if hooks[p.section] == 1}

    def attach(self) -> None:
        """Attach every loaded program; what fails is noted in `statuses`. Once is enough."""
        if self._links:
            return
        tracefs = ensure_tracefs()
        for program in self._programs:
            try:
                self._links.append(program.attach())
                self.statuses.append(_status(program))
            except OSError as error:
                reason = _attach_reason(program, error, tracefs)
                self.statuses.append(_status(program, reason))

    def coverage(self, kinds: Collection[str]) -> dict[str, KindStatus]:
        """How far each of `kinds` is observed."""
        return coverage(self.statuses, kinds)

    def detach(self) -> None:
        """Detach every program: no event is produced after this."""
        links, self._links = self._links, []
        for link in links:
            link.destroy()

    def close(self) -> None:
        """Detach and release everything. Harmless when done already."""
        self.detach()
        for mapping in (self.counters, self.reader_state):
            with suppress(BufferError):  # somebody still looks at it
                mapping.close()
        self._object.close()


def _map_counters(fd: int, cpus: int) -> mmap.mmap:
    size = cpus * counters_stride()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    return mmap.mmap(fd, pages, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)


def counters_stride() -> int:
    """Bytes of one CPU's `struct cpu_counters`."""
    return max(offset + size for _, offset, size in CONTRACT["cpu_counters"])


def _status(program: Program, reason: str = "") -> ProgramStatus:
    kinds = PROGRAMS[program.name].kinds
    outcome: Literal["attached", "failed"] = "failed" if reason else "attached"
    return ProgramStatus(program.name, program.section, kinds, outcome, reason)


def _attach_reason(program: Program, error: OSError, tracefs: str) -> str:
    if error.errno == errno.ENOENT and program.section.startswith("tracepoint/"):
        return tracefs or f"this kernel has no {program.section}"
    if error.errno == errno.ENOENT:
        return f"this kernel has no {program.section}"
    return f"{program.section} cannot be attached: {error.strerror}"


def needed_programs(kinds: Collection[str], machine: str) -> list[str]:
    """The programs that can produce one of `kinds`, on an architecture as uname calls it."""
    return [
        name
        for name, info in PROGRAMS.items()
        if not set(info.kinds).isdisjoint(kinds)
        and (machine == "x86_64" or name not in _X86_SYSTEM_CALLS)
    ]


def load(settings: Settings, kinds: Collection[str], path: Path = OBJECT) -> KernelState:
    """Load what `kinds` needs, with its filters in place and the agent itself excluded.

    Nothing is attached yet: no event can have been produced when this returns.

    Raises:
        PrivilegeError: missing capabilities.
        ContractError: the object was built from another `events.h`.
        KernelError: no BPF, no BTF, or nothing of the object loads.
    """
    capabilities.require()
    compare(contract_of(Btf.of_object(path)), CONTRACT)
    btf = find_btf(settings)
    names = needed_programs(kinds, os.uname().machine)
    failures: dict[str, str] = {}
    loaded = _try_load(settings, kinds, path, btf, names)
    if isinstance(loaded, OSError):
        failures = _probe(settings, kinds, path, btf, names)
        loaded = _try_load(settings, kinds, path, btf, [n for n in names if n not in failures])
    if isinstance(loaded, OSError):
        raise _load_error(loaded, failures)
    return _ready(loaded, settings, names, failures)


def _try_load(
    settings: Settings,
    kinds: Collection[str],
    path: Path,
    btf: str | None,
    names: Collection[str],
    log: Collection[str] = (),
) -> Object | OSError:
    """Load with only those programs (and `whoami`), keeping the verifier log of some."""
    opened: Object | None = None
    try:
        opened = Object(path, btf)
        _prepare(opened, settings, kinds, names, log)
        opened.load()
    except OSError as error:
        if opened is not None:
            error.add_note("\n".join(opened.programs[name].log for name in log))
            opened.close()
        return error
    return opened


def _prepare(
    opened: Object,
    settings: Settings,
    kinds: Collection[str],
    names: Collection[str],
    log: Collection[str],
) -> None:
    opened.maps["critical"].resize(settings.rings.critical_bytes)
    opened.maps["bulk"].resize(settings.rings.bulk_bytes)
    for name in _BY_CPU:
        opened.maps[name].resize(possible_cpus())
    rodata = next(m for m in opened.maps.values() if m.name.endswith(".rodata"))
    rodata.write_initial(settings_bytes(kinds, settings.rings, settings.filters))
    for program in opened.programs.values():
        program.autoload(program.name == _WHOAMI or program.name in names)
    for name in log:
        opened.programs[name].keep_log()


def _probe(
    settings: Settings,
    kinds: Collection[str],
    path: Path,
    btf: str | None,
    names: Collection[str],
) -> dict[str, str]:
    """Load each program alone: those that fail, with the reason the user is to read."""
    failures = {}
    for name in (_WHOAMI, *names):
        result = _try_load(settings, kinds, path, btf, [name], [name])
        if isinstance(result, OSError):
            failures[name] = f"{name} does not load: {_load_reason(result)}"
        else:
            result.close()
    return failures


def _load_reason(error: OSError) -> str:
    log = "\n".join(getattr(error, "__notes__", []))
    lines = [line for line in log.splitlines() if line and not line.startswith("processed ")]
    return f"{error.strerror}: {lines[-1]}" if lines else str(error.strerror)


def _load_error(error: OSError, failures: Mapping[str, str]) -> StreamerError:
    if error.errno == errno.ENOSYS:
        return KernelError("no BPF in this kernel (CONFIG_BPF_SYSCALL): no event can be observed")
    if error.errno == errno.EPERM:
        return KernelError(
            "not permitted to load BPF programs: lockdown, or a small RLIMIT_MEMLOCK"
        )
    reason = failures.get(_WHOAMI) or "; ".join(failures.values()) or error.strerror
    return KernelError(f"the BPF object does not load: {reason}")


def _ready(
    loaded: Object, settings: Settings, names: Collection[str], failures: Mapping[str, str]
) -> KernelState:
    try:
        for name, key, value in filter_entries(settings.filters):
            loaded.maps[name].update(key, value)
        loaded.programs[_WHOAMI].run()
        programs = [loaded.programs[name] for name in names if name not in failures]
        state = KernelState(loaded, possible_cpus(), programs, settings.rings)
    except OSError as error:
        loaded.close()
        raise KernelError(f"cannot prepare the BPF programs: {error.strerror}") from error
    state.statuses += [
        _status(loaded.programs[name], reason)
        for name, reason in failures.items()
        if name != _WHOAMI
    ]
    return state
