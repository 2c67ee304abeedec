"""The kernel side as the agent sees it: what is loaded, its maps in memory, and what is observed.

It asks a loader (`loader.Loader`, or its stand-in on the unprivileged side) for what needs
privileges, and does everything else through memory that it shares with the programs.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import platform
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import msgspec

from streamer.config.settings import LEVELS, Filters, Kernel, Rings, Settings
from streamer.errors import ConfigError, HelperGone, KernelError
from streamer.events.kinds import KINDS, RECORDS
from streamer.kernel import bulk_rings, capabilities, flows, obstacles
from streamer.kernel.cgroups import cgroup_root
from streamer.kernel.contract import check_object
from streamer.kernel.flows import FlowWalk
from streamer.kernel.grace_period import wait_for_programs
from streamer.kernel.loader import (
    ATTACHED,
    CORE,
    FAILED,
    LOADED,
    OBJECTS,
    TIMED,
    Attached,
    Loaded,
    Loader,
    ProgramState,
    Transport,
    online_cpus,
    present_cpus,
)
from streamer.kernel.loading import LoaderLike
from streamer.kernel.misses import missed_runs
from streamer.kernel.objects import CONTRACT, KIND_END, KIND_NUMBERS, SENSORS
from streamer.kernel.perf_buffers import allow_descriptors
from streamer.kernel.processes import Located
from streamer.kernel.system_calls import SYSCALL_NUMBERS, Place, places_of
from streamer.kernel.tags import RINGS, ProgramInfo
from streamer.kernel.targets import targets_of
from streamer.kernel.types import NO_MOUNTS, NO_MULTIPATH, KernelTypes

_log = logging.getLogger("streamer")

_KEEP, _DROP = b"\x01", b"\x02"
_MODES = {name.removeprefix("FILTER_"): n for name, n, _ in CONTRACT["enum filter_mode"]}
_WITH_PATHS = ("process.exec", "file.open")
_OF_CONNECTIONS = ("net.connect", "net.accept", "net.close", "net.listen", "net.bind")
_OWNERS = "owners of connections, and those of the agent itself,"
# The header that the kernel puts before each record, and the bytes that it never fills.
_OVERHEAD = {"ring": 8 + 8, "perf": 12 + 8}
PRESSED_FROM = 8
"""A ring is shared out from this part of it on that holds something: see bpf/core/fair.bpf.h."""

_LONG_SECONDS = 2.0

_MOST_OF_A_SAMPLE = 1 << 16
"""The length of a perf buffer's record, header included, is a u16 and a multiple of eight."""

Coverage = Literal["full", "partial", "missing"]


class ProgramStatus(msgspec.Struct):
    """What became of a program. `reason` is empty unless it failed."""

    name: str
    sensor: str
    hook: str
    way: str
    kinds: tuple[str, ...]
    status: Literal["attached", "failed", "spare", "loaded"]
    reason: str = ""


class KindStatus(msgspec.Struct):
    """How far a kind is observed, and why not fully."""

    status: Coverage
    reason: str = ""


NOTHING_SHED: Mapping[str, Sequence[int]] = {}
_PROFILE, _MISSING = "profile.sample", KindStatus("missing")

# ---------------------------------------------------------------- what is to be loaded


def ring_buffers(rings: Rings, cpus: int, workers: int = 1) -> dict[str, int]:
    """Names and bytes of the ring buffers for a host that has so many CPUs, and for `workers`."""
    asked = max(rings.bulk_rings, workers if workers > 1 else 0)
    count = bulk_rings.count_of(asked, cpus, rings.bulk_bytes)
    each = rings.bulk_bytes // count
    return {"critical": rings.critical_bytes} | dict.fromkeys(bulk_rings.named(count), each)


def sensors_of(kinds: Collection[str]) -> list[str]:
    """The sensors that can produce one of `kinds`."""
    return [
        name
        for name, sensor in SENSORS.items()
        if any(
            not set(program.kinds + program.keeps).isdisjoint(kinds) for program in sensor.programs
        )
    ]


def options_of(kernel: Kernel) -> dict[str, int]:
    """Sizes of tables and settings that are on, for the loader."""
    return {
        "connections": kernel.connections,
        "flows": kernel.flows,
        "flow_index": 2 * kernel.flows,
        "open_latency": int(kernel.open_latency),
        "syscalls": len(syscall_places(kernel)),
        "syscall_tasks": kernel.syscall_tasks,
        "syscall_cgroups": kernel.syscall_cgroups,
        "drops_per_second": kernel.drops_per_second,
        "unspecified_drops": int(kernel.unspecified_drops),
        "udp_seconds": kernel.udp_seconds,
        "udp_sockets": kernel.udp_sockets,
        "profile_stacks": kernel.profile_stacks,
        **dns_ports(kernel.dns_ports),
        "dns_timeout_seconds": kernel.dns_timeout_seconds,
        "dns_per_second": kernel.dns_per_second,
        "dns_queries": kernel.dns_queries,
    }


def dns_ports(ports: tuple[int, ...]) -> dict[str, int]:
    """An option for each of four ports; the first stands for those that are missing."""
    return {f"dns_port_{place}": port for place, port in enumerate((*ports, *ports[:1] * 3)[:4], 1)}


def wanting(kinds: Iterable[str]) -> dict[str, int]:
    """The options that say that these kinds are wanted."""
    return {f"kind.{kind}": 1 for kind in kinds}


def syscall_places(kernel: Kernel) -> list[Place]:
    """The system calls that are observed, in the order of their counts."""
    return places_of(kernel.syscalls, platform.machine())


# ---------------------------------------------------------------- what is observed


def room_for_records(transport: Transport) -> dict[str, int]:
    """The largest record that each ring can ever hold, in bytes."""
    return {
        ring: min(size, _MOST_OF_A_SAMPLE if transport.name == "perf" else size)
        - _OVERHEAD[transport.name]
        for ring, size in transport.sizes.items()
    }


def coverage(
    programs: Iterable[ProgramStatus], kinds: Collection[str], rings: Mapping[str, int]
) -> dict[str, KindStatus]:
    """How far each of `kinds` is observed, given what became of the programs.

    `rings`: the largest record that each ring can hold, in bytes. A kind whose largest record
    does not fit is not fully observed, however much room there is.
    """
    statuses = list(programs)
    return {kind: _coverage_of(kind, statuses, rings) for kind in sorted(kinds)}


def _lessened(kind: str, found: KindStatus, lacks: str) -> KindStatus:
    """How far a kind is observed where the kernel's types are known but for what they lack."""
    affected = (NO_MOUNTS in lacks and kind in _WITH_PATHS) or (
        NO_MULTIPATH in lacks and kind in _OF_CONNECTIONS
    )
    if not affected or found.status == "missing":
        return found
    return KindStatus("partial", "; ".join(filter(None, (found.reason, lacks))))


def _coverage_of(kind: str, programs: list[ProgramStatus], rings: Mapping[str, int]) -> KindStatus:
    hooks: dict[str, list[ProgramStatus]] = {}
    kept: dict[str, list[ProgramStatus]] = {}
    for program in programs:
        if kind in program.kinds:
            hooks.setdefault(program.hook, []).append(program)
        elif kind in _info(program).keeps:
            kept.setdefault(program.hook, []).append(program)
    lost = [ways for ways in hooks.values() if not any(way.status == ATTACHED for way in ways)]
    essential = any(not _info(ways[-1]).covers for ways in lost)
    reporting = [ways for ways in hooks.values() if _info(ways[-1]).reports]
    if essential or all(ways in lost for ways in reporting):
        reasons = dict.fromkeys(ways[-1].reason for ways in lost)
        return KindStatus("missing", "; ".join(reasons) or _why_none(kind))
    reasons = dict.fromkeys(_why(ways[-1]) for ways in lost)
    for program in programs:
        if kind in program.kinds and program.status == ATTACHED and program.reason:
            reasons[program.reason] = None
    reasons |= dict.fromkeys((*_what_ways_lack(hooks.values()), *_unknown_owners(kind, kept)))
    too_large = _too_large(kind, rings)
    if too_large:
        reasons[too_large] = None
    return KindStatus("partial" if reasons else "full", "; ".join(reasons))


def _why_none(kind: str) -> str:
    """Why no program reports it: as far as is known it was not given what it needs."""
    programs = (one for sensor in SENSORS.values() for one in sensor.programs)
    if any(kind in one.kinds and "cgroup" in one.needs for one in programs) and not cgroup_root():
        return "no cgroup v2 hierarchy is mounted, at whose root its programs attach"
    return "no program reports it"


def _what_ways_lack(hooks: Iterable[list[ProgramStatus]]) -> Iterator[str]:
    """What the ways that are used cannot see."""
    for ways in hooks:
        used = next((way for way in ways if way.status == ATTACHED), None)
        if used is not None and _info(used).lacks:
            yield f"{used.way}: {_info(used).lacks} are not observed"


def _unknown_owners(kind: str, kept: Mapping[str, list[ProgramStatus]]) -> Iterator[str]:
    """Why nobody knows whose the events are, where another sensor is to keep that, by hook."""
    keepers = (one for sensor in SENSORS.values() for one in sensor.programs if kind in one.keeps)
    if not kept and any(keepers):
        yield f"what keeps them is not loaded, so {_OWNERS} are not known"
    for ways in kept.values():
        if not any(way.status == ATTACHED for way in ways):
            yield f"{ways[-1].reason}, so {_OWNERS} are not known"


def _too_large(kind: str, rings: Mapping[str, int]) -> str:
    if kind not in KINDS:  # a summary
        return ""
    ring, most = KINDS[kind].ring, RECORDS[KIND_NUMBERS[kind]].max_size
    room = rings[ring]
    if most <= room:
        return ""
    return (
        f"a record can have up to {most} bytes, and the ring {ring} holds none of more than {room}"
    )


def _why(program: ProgramStatus) -> str:
    lost = _info(program).covers
    return f"{program.reason}, so {lost} are not observed" if lost else program.reason


def _info(program: ProgramStatus) -> ProgramInfo:
    return next(one for one in SENSORS[program.sensor].programs if one.name == program.name)


# ---------------------------------------------------------------- settings and filters


def pack(struct_name: str, values: Mapping[str, int | tuple[int, ...]]) -> bytes:
    """The bytes of a struct of the contract, with the members that are not given at zero."""
    layout = CONTRACT[struct_name]
    data = bytearray(size_of(struct_name))
    for name, offset, size in layout:
        value = values.get(name, 0)
        if isinstance(value, tuple):
            each = {4: "I", 8: "Q"}[size // len(value)]
            struct.pack_into(f"<{len(value)}{each}", data, offset, *value)
        else:
            data[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(data)


def size_of(struct_name: str) -> int:
    """Bytes of a struct of the contract."""
    return max(offset + size for _, offset, size in CONTRACT[struct_name])


_LEVEL = struct.Struct("<Q")
_LEVEL_AT = next(offset for name, offset, _ in CONTRACT["pressure"] if name == "level")


def filter_mode(keep: Collection[object], drop: Collection[object]) -> int:
    """How the programs use a filter's map."""
    if keep:
        return _MODES["INCLUDE"]
    return _MODES["EXCLUDE" if drop else "OFF"]


def settings_bytes(sizes: Mapping[str, int]) -> bytes:
    """`struct settings` for the programs: when to wake the reader; filters are off.

    `sizes` are those of ring buffers.
    """
    # A quarter of a ring buffer may fill before its reader is woken ahead of its timer.
    return pack("settings", {"wakeup_bytes": tuple(sizes[ring] // 4 for ring in RINGS)})


def filter_modes_bytes(filters: Filters) -> bytes:
    """`struct filter_modes`: which filters are in use, and how."""
    of_tasks = {
        "pid": filter_mode(filters.pids, filters.exclude_pids),
        "uid": filter_mode(filters.uids, filters.exclude_uids),
        "comm": filter_mode(filters.comms, filters.exclude_comms),
        "cgroup": filter_mode(filters.cgroups, filters.exclude_cgroups),
        "exe": filter_mode(filters.exes, filters.exclude_exes),
    }
    return pack(
        "filter_modes",
        {
            **of_tasks,
            "task": int(any(of_tasks.values())),
            "port": filter_mode(filters.ports, filters.exclude_ports),
            "path": filter_mode(filters.path_prefixes, filters.exclude_path_prefixes),
        },
    )


MOST_WEIGHT = 1 << 20
"""What an event can stand for at most."""


def rates_of(
    kind: str, sample: Mapping[str, int], shedding: Mapping[str, Sequence[int]]
) -> tuple[int, ...]:
    """One in how many events of a kind is reported, at each level of pressure from 0 on."""
    always = sample.get(kind, 1)
    shed = shedding.get(kind, (1,) * LEVELS)
    return (always, *(min(always * rate, MOST_WEIGHT) for rate in shed))


def kind_settings_bytes(
    kinds: Collection[str],
    sample: Mapping[str, int],
    shedding: Mapping[str, Sequence[int]] = NOTHING_SHED,
) -> bytes:
    """`struct kind_settings` of every kind: which are on, and one in how many is reported.

    `shedding` has the rates of the levels 1 to 3 for those kinds that are shed.
    """
    entries = [pack("kind_settings", {})] * KIND_END
    for kind in kinds:
        entries[KIND_NUMBERS[kind]] = pack(
            "kind_settings", {"enabled": 1, "rates": rates_of(kind, sample, shedding)}
        )
    return b"".join(entries)


FileId = tuple[int, int]
"""Inode number and device."""


def executables(
    filters: Filters, known: Mapping[str, FileId] = MappingProxyType({})
) -> dict[str, FileId]:
    """Which file each path of `exes` and `exclude_exes` is now.

    Where this process may not look, what is `known` of a path holds on: without its privileges it
    cannot enter every directory any more.

    Raises:
        ConfigError: one is not there, or this process may not look and it is not known.
    """
    found: dict[str, FileId] = {}
    for key in ("exes", "exclude_exes"):
        for index, path in enumerate(getattr(filters, key)):
            try:
                found[path] = identity_of_file(path)
            except OSError as error:
                if isinstance(error, PermissionError) and path in known:
                    found[path] = known[path]
                    continue
                what = f"filters.{key}[{index}]: found {json.dumps(path)}"
                wanted = "allowed: a file that is there"
                raise ConfigError(f"{what}: {error.strerror}, {wanted}") from None
    return found


def filter_entries(
    filters: Filters, generation: int, files: Mapping[str, FileId]
) -> list[tuple[str, bytes, bytes]]:
    """Map, key and value for every entry of the filters. What excludes comes last, and wins.

    `files` are the `executables`.
    """
    make: list[tuple[str, Callable[[Any], bytes], Iterable[Any], Iterable[Any]]] = [
        ("filter_pids", _number, filters.pids, filters.exclude_pids),
        ("filter_uids", _number, filters.uids, filters.exclude_uids),
        ("filter_comms", _comm, filters.comms, filters.exclude_comms),
        ("filter_cgroups", _number, filters.cgroups, filters.exclude_cgroups),
        ("filter_exes", lambda path: _exe(files[path]), filters.exes, filters.exclude_exes),
        ("filter_ports", _number, filters.ports, filters.exclude_ports),
        ("filter_paths", _prefix, _kept_prefixes(filters), filters.exclude_path_prefixes),
    ]
    return [
        (name, _of_generation(name, key(value), generation), verdict)
        for name, key, keep, drop in make
        for verdict, values in ((_KEEP, keep), (_DROP, drop))
        for value in values
    ]


_KEYS = {
    "filter_comms": "comm_key",
    "filter_exes": "exe_key",
    "filter_paths": "path_prefix",
}


def _of_generation(map: str, key: bytes, generation: int) -> bytes:
    layout = {name: at for name, at, _ in CONTRACT[_KEYS.get(map, "number_key")]}
    at = layout["generation"]
    return key[:at] + bytes([generation]) + key[at + 1 :]


def _kept_prefixes(filters: Filters) -> Iterable[str]:
    """Without those within an excluded one: in the map the longest match would win."""
    excluded = filters.exclude_path_prefixes
    return (prefix for prefix in filters.path_prefixes if not prefix.startswith(excluded))


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _number(value: int) -> bytes:
    return pack("number_key", {"number": value})


def _comm(value: str) -> bytes:
    return pack("comm_key", {"comm": int.from_bytes(value.encode(), "little")})


def _exe(file: FileId) -> bytes:
    inode, dev = file
    return pack("exe_key", {"inode": inode, "dev": dev & 0xFFFFFFFF})


def identity_of_file(path: str) -> FileId:
    """Inode number and device of a file as the programs see them.

    Not always those of stat(): overlayfs and btrfs show devices there that their mounts do not
    have. Raises OSError.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        shown = os.fstat(fd)
        info = dict(line.split(":\t", 1) for line in _lines(f"/proc/self/fdinfo/{fd}"))
        # Kernels before 5.14 do not tell the inode there.
        return int(info.get("ino", shown.st_ino)), _device_of_mount(info["mnt_id"]) or shown.st_dev
    finally:
        os.close(fd)


def _device_of_mount(mount: str) -> int | None:
    for line in _lines("/proc/self/mountinfo"):
        number, _, device, *_ = line.split()
        if number == mount.strip():
            major, minor = device.split(":")
            return os.makedev(int(major), int(minor))
    return None


def _lines(path: str) -> list[str]:
    return Path(path).read_text(errors="surrogateescape").splitlines()


def _offset_of(struct_name: str, field: str) -> int:
    return next(at for name, at, _ in CONTRACT[struct_name] if name == field)


def _store(mapping: mmap.mmap, at: int, value: int) -> None:
    """Eight bytes at once, as programs see them; copying a slice promises nothing of the kind."""
    with memoryview(mapping) as view, view.cast("Q") as words:
        words[at // 8] = value


def _let_programs_end() -> None:
    """Wait until every program that runs now has ended."""
    try:
        wait_for_programs()
    except OSError:  # it cannot be told: by far longer than any program can take
        time.sleep(_LONG_SECONDS)


def _prefix(value: str) -> bytes:
    """The bits that are to be the same are those of the generation, and of the prefix."""
    path = value.encode()
    fields = {"bits": 8 * (1 + len(path)), "path": int.from_bytes(path, "little")}
    return pack("path_prefix", fields)


# ---------------------------------------------------------------- the state


class Identity(NamedTuple):
    """Who the agent is, as the programs see it, and the mount namespace of the host's init."""

    pids: tuple[int, int]
    initial_mntns: int


class KernelState:
    """What is loaded: rings and counters to read, settings to change, sensors to attach."""

    def __init__(self, loader: LoaderLike, settings: Settings, directory: str = OBJECTS) -> None:
        """Creates what all sensors share, with the filters in place; nothing is attached.

        `directory` is where the loader has its objects from.

        Raises:
            ContractError: the core was built from another `events.h`.
            KernelError: no BPF, no BTF, or the core does not load.
        """
        self._loader = loader
        self._directory = directory
        self._options = options_of(settings.kernel)
        self._resolution_us = settings.timing.resolution_us
        self.flows: FlowWalk | None = None
        """The walk through the flows, from the moment at which their sensor is loaded."""
        self._generation = 0
        self._flipped = False
        self._kinds: frozenset[str] = frozenset()
        self._sample: Mapping[str, int] = settings.kernel.sample
        self._shedding: Mapping[str, Sequence[int]] = settings.shedding.rates_in_force
        self.kernel_settings = settings.kernel
        """How it is observed."""
        self.kallsyms: int | None = None
        self._kernel_is_unnamed = False
        """A descriptor of the kernel's list of functions, opened with privileges."""
        self.interfaces = dict.fromkeys(settings.kernel.interfaces, 0)
        """Those that sensors attach to, in the order of their entries in tables, with the index
        that each had when it was last attached to."""
        self._present = dict.fromkeys(settings.kernel.interfaces, 0)
        # Of the filters' maps, by generation.
        self._entries: tuple[dict[tuple[str, bytes], bytes], ...] = ({}, {})
        self._files: dict[str, FileId] = {}
        self._states: dict[str, list[ProgramState]] = {}  # kept for the last reports
        self._attached: dict[str, Attached] = {}
        self._loaded: list[str] = []
        self._wanted: frozenset[str] = frozenset()
        self.loaded_for: dict[str, frozenset[str]] = {}
        """The sensors that are loaded, each with the kinds that were wanted then."""
        self._tables: dict[str, int] = {}  # of sensors: the descriptors of their maps
        self._missed_now: Counter[str] = Counter()
        self._missed_before: Counter[str] = Counter()  # of what was unloaded
        self._mapped: list[mmap.mmap] = []
        self.cpus = loader.cpus
        self.types = KernelTypes()
        """What they are relocated against."""
        self.no_functions = "not tried"
        """Why programs at functions (fentry, fexit) do not load; empty where they do."""
        asked = ring_buffers(settings.rings, len(present_cpus()), settings.workers)
        self._check_contract(CORE)
        maps = loader.load_core(asked, settings.btf, settings.rings.transport)
        self.no_functions, self.types = loader.no_functions, loader.types
        self.transport = loader.transport
        """How records come."""
        self.buffers: dict[int, dict[str, int]] = {}
        """Descriptors of the perf buffers, by CPU and ring; none where there are ring buffers."""
        try:
            if self.transport.name == "perf":
                allow_descriptors()
            self._open_buffers(online_cpus())
            self.ring_fds = {name: maps[name] for name in self.transport.sizes}
            """Descriptors of the ring buffers (or maps of perf events), by name."""
            self.map_fds = dict(maps)
            """Descriptors of the maps that all share, by name: the loader's."""
            self.counters = self._map(maps["counters"], size_of("cpu_counters") * self.cpus)
            self.kind_counters = self._map(
                maps["kind_counters"], size_of("kind_counters") * self.cpus * KIND_END
            )
            self.faults = self._map(maps["faults"], 8 * len(CONTRACT["enum fault"]))
            self.reader_state = self._map(maps["reader"], size_of("reader_state"), writable=True)
            self._settings = self._map(maps["settings"], size_of("settings"), writable=True)
            self._kind_settings = self._map(
                maps["kind_settings"], size_of("kind_settings") * KIND_END, writable=True
            )
            self.pressure = self._map(maps["pressure"], size_of("pressure"), writable=True)
            self._begin_pressure(PRESSED_FROM)
            self.identity = self._read_identity(maps["identities"])
            data = settings_bytes(self.transport.sizes)
            self._settings[: len(data)] = data
            self.set_filters(settings.filters)
        except BaseException:
            self.close()
            raise

    def _begin_pressure(self, part: int) -> None:
        """At level 0, with rings that are shared out to those who pay from one in `part` on."""
        sizes = (self.transport.sizes[ring] // part for ring in RINGS)  # those of a ring are alike
        salt = int.from_bytes(os.urandom(8), "little")
        data = pack("pressure", {"from": tuple(sizes), "salt": salt})
        self.pressure[: len(data)] = data

    @property
    def level(self) -> int:
        """Of pressure, from 0 to `LEVELS`: which rates the programs go by."""
        return int(_LEVEL.unpack_from(self.pressure, _LEVEL_AT)[0])

    @level.setter
    def level(self, level: int) -> None:
        _LEVEL.pack_into(self.pressure, _LEVEL_AT, level)  # one word: all kinds change at once

    @property
    def shedding(self) -> dict[str, list[int]]:
        """Of the kinds that can be shed, one in how many events is reported at levels 1 to 3."""
        return {
            kind: list(rates_of(kind, self._sample, self._shedding)[1:])
            for kind in sorted(self._shedding.keys() & self._kinds)
        }

    def rates_at(self, level: int) -> dict[str, int]:
        """One in how many events is reported at a level, of the kinds that can be shed."""
        return {kind: (self._sample.get(kind, 1), *rates)[level]
                for kind, rates in self.shedding.items()}  # fmt: skip

    @property
    def ring_bytes(self) -> dict[str, int]:
        """Bytes of each ring: of all its ring buffers, or perf buffers, together."""
        count = len(self.buffers) if self.transport.name == "perf" else 1
        total: Counter[str] = Counter()
        for name, size in self.transport.sizes.items():
            total[bulk_rings.ring_of(name)] += size * count
        return dict(total)

    def _open_buffers(self, cpus: Iterable[int]) -> dict[int, dict[str, int]]:
        """Those of all of them, or of none. Raises KernelError."""
        made: dict[int, dict[str, int]] = {}
        for cpu in sorted(cpus) if self.transport.name == "perf" else ():
            try:
                found = self._loader.open_buffers(cpu)
            except OSError as error:
                _close(made)
                raise KernelError(f"no perf buffer of CPU {cpu}: {error.strerror}") from error
            if found:
                made[cpu] = found
        _close({cpu: self.buffers[cpu] for cpu in made.keys() & self.buffers.keys()})
        self.buffers |= made
        return made

    def gone_cpus(self) -> frozenset[int]:
        """CPUs that are down, and to whose perf buffers nothing is written any more."""
        return frozenset(self.buffers.keys() - online_cpus())

    def open_buffers(self, again: Collection[int] = ()) -> dict[int, dict[str, int]]:
        """Make the perf buffers of CPUs that are up and have none. Their descriptors, as `buffers`.

        Those `again`, too, if they have been down since. What such a CPU did before has found no
        buffer, and is lost.

        Raises:
            KernelError: a buffer cannot be had.
        """
        _close({cpu: self.buffers.pop(cpu) for cpu in self.gone_cpus()})
        return self._open_buffers({*online_cpus()} - self.buffers.keys() | set(again))

    def _map(self, fd: int, size: int, *, writable: bool = False) -> mmap.mmap:
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        prot = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        made = mmap.mmap(fd, pages, flags=mmap.MAP_SHARED, prot=prot)
        self._mapped.append(made)
        return made

    def _read_identity(self, fd: int) -> Identity:
        one, other, mntns = struct.unpack_from("<3I", self._map(fd, size_of("identity")))
        return Identity((one, other), mntns)

    def _check_contract(self, name: str) -> None:
        check_object(Path(self._directory, f"{name}.bpf.o"))

    def set_filters(self, filters: Filters) -> None:
        """Judge by `filters` from now on. Raises as `prepare_filters` does."""
        self.prepare_filters(filters)
        self.use_filters()

    def prepare_filters(self, filters: Filters) -> None:
        """Write `filters` into the generation that is not in force. In any thread.

        Raises:
            ConfigError: an executable is not there.
            KernelError: the kernel refused. What is in force is not touched in either case.
        """
        files = executables(filters, self._files)
        generation = 1 - self._generation
        if self._flipped:  # a program may still be judging by the one that was in force before
            _let_programs_end()
            self._flipped = False
        entries = self._entries[generation]
        wanted = {(name, key): v for name, key, v in filter_entries(filters, generation, files)}
        modes = filter_modes_bytes(filters)
        at = _offset_of("settings", "filters") + generation * len(modes)
        self._settings[at : at + len(modes)] = modes
        try:
            for name, key in entries.keys() - wanted.keys():
                self._loader.delete(name, key)
                del entries[name, key]
            for (name, key), value in wanted.items():
                self._loader.update(name, key, value)
                entries[name, key] = value
        except OSError as error:
            raise KernelError(f"cannot set the filters: {error.strerror}") from error
        self._files = files

    def files_have_changed(self, filters: Filters) -> bool:
        """Whether a path of an executable in `filters` is another file than before.

        Raises as `prepare_filters` does.
        """
        return executables(filters, self._files) != self._files

    def use_filters(self) -> None:
        """Judge each event that begins from now on by what was prepared.

        Owners of connections were judged when they took them, and are not judged again.
        """
        self._generation = 1 - self._generation
        _store(self._settings, _offset_of("settings", "generation"), self._generation)
        self._flipped = True

    def want(self, kinds: Collection[str]) -> None:
        """Load what these kinds need with the sensors from now on, and nothing that others need."""
        self._wanted = frozenset(kinds)

    def enable(self, kinds: Collection[str]) -> None:
        """Report `kinds` from now on, and no others."""
        self._kinds = frozenset(kinds)
        self._write_kinds()

    def set_sample(self, sample: Mapping[str, int]) -> None:
        """Of each kind in `sample` report one in so many from now on, of others all."""
        self._sample = dict(sample)
        self._write_kinds()

    def _write_kinds(self) -> None:
        """By stores of whole words: a program sees a kind's rate as it was or as it is."""
        data = kind_settings_bytes(self._kinds, self._sample, self._shedding)
        for at in range(0, len(data), 8):
            if self._kind_settings[at : at + 8] != data[at : at + 8]:
                _store(self._kind_settings, at, int.from_bytes(data[at : at + 8], "little"))

    @property
    def sensors(self) -> list[str]:
        """The sensors that are loaded."""
        return list(self._loaded)

    def load(self, sensor: str) -> None:
        """Load one sensor; what does not load of it is noted in `statuses`.

        Raises:
            KernelError: it cannot be loaded at all, as when its object was built from another
                `events.h` (ContractError); the others are not affected.
        """
        if sensor in self._loaded:
            raise KernelError(f"{sensor} is loaded already")
        try:
            loaded = self.fetch(sensor, self._wanted)
        except KernelError as error:
            self.note_failure(sensor, error)
            raise
        self.take_loaded(sensor, loaded, self._wanted)

    def fetch(self, sensor: str, kinds: Collection[str]) -> Loaded:
        """Have a sensor loaded for `kinds`, and change nothing here. In any thread.

        Raises as `load` does.
        """
        try:
            self._check_contract(sensor)
        except OSError as error:
            raise KernelError(f"{sensor} cannot be checked: {error.strerror}") from error
        return self._loader.load(sensor, self._options | wanting(kinds))

    def note_failure(self, sensor: str, error: KernelError) -> None:
        """A sensor could not be loaded: its programs are told as failed."""
        self._states[sensor] = [
            ProgramState(program.name, program.hook, "", FAILED, str(error))
            for program in SENSORS[sensor].programs
        ]

    def take_loaded(self, sensor: str, loaded: Loaded, kinds: Collection[str]) -> None:
        """A sensor was loaded for `kinds`."""
        self._states[sensor] = loaded.programs
        self._tables |= loaded.maps
        self._loaded.append(sensor)
        self.loaded_for[sensor] = frozenset(kinds)
        if "syscall_places" in loaded.maps:
            self._place_syscalls()
        if "profile_samples_0" in loaded.maps:
            self._open_kallsyms()
        if flows.MAP in loaded.maps:
            self.flows = self._flow_walk()

    def _flow_walk(self) -> FlowWalk:
        return FlowWalk(
            self.table(flows.MAP, size_of(flows.STRUCT), writable=True),
            lambda repeat: self._loader.run_program(flows.SENSOR, flows.PROGRAM, repeat),
            self.kernel_settings.flows,
            self.kernel_settings.flow_idle_seconds,
            self.kernel_settings.flow_active_seconds,
            self._resolution_us,
        )

    def _place_syscalls(self) -> None:
        """Tell the programs which calls to count where, and which are slow."""
        size = size_of("syscall_place")
        places = self.table("syscall_places", SYSCALL_NUMBERS * size, writable=True)
        for index, (number, name, flags) in enumerate(syscall_places(self.kernel_settings)):
            label = int.from_bytes(name.encode(), "little")
            place = {"counts": index * self.cpus + 1, "flags": flags, "name": label}
            places[number * size : (number + 1) * size] = pack("syscall_place", place)
        wanted = pack("syscall_settings", {"slow_ns": self.kernel_settings.syscall_slow_ms * 10**6})
        self.table("syscall_settings", len(wanted), writable=True)[: len(wanted)] = wanted

    def _open_kallsyms(self) -> None:
        """What it shows depends on who opened it, and not on who reads it."""
        with suppress(OSError):  # then functions of the kernel have no names
            self.kallsyms = os.open("/proc/kallsyms", os.O_RDONLY | os.O_CLOEXEC)
            self._kernel_is_unnamed = obstacles.hides_addresses(self.kallsyms)

    def attach(self) -> None:
        """Attach what was loaded; what fails is noted in `statuses`."""
        for sensor in self._loaded:
            self.attach_sensor(sensor)

    def attach_sensor(self, sensor: str) -> None:
        """Attach what was loaded of one sensor."""
        self._number_interfaces()
        self.take_attached(sensor, self.fetch_attached(sensor))

    def fetch_attached(self, sensor: str) -> Attached:
        """Have a sensor without interfaces attached, and change nothing here. In any thread."""
        return self._loader.attach(sensor)

    def take_attached(self, sensor: str, attached: Attached) -> None:
        """A sensor was attached."""
        self._attached[sensor] = attached
        self._states[sensor] = attached.programs

    def follow_interfaces(self) -> bool:
        """Attach to interfaces that have come, or come back, since. Whether any came or went.

        Raises:
            KernelError: the helper cannot be asked.
        """
        if all(_index_of(name) == index for name, index in self._present.items()):
            return False
        for sensor in self._loaded:
            if any("interface" in program.needs for program in SENSORS[sensor].programs):
                self.attach_sensor(sensor)
        return True

    def _number_interfaces(self) -> None:
        """Tell the programs where in their tables each interface is counted."""
        before = set(self._present.values())
        self._present = {name: _index_of(name) for name in self.interfaces}
        # One that comes back has another: the old ones would fill the map.
        for index in before - {0, *self._present.values()}:
            self._loader.delete("interfaces", _u32(index))
        for place, (name, index) in enumerate(self._present.items()):
            if index:  # else it is not there, which attaching says
                self.interfaces[name] = index
                self._loader.update("interfaces", _u32(index), _u32(place * self.cpus))

    def table(self, name: str, size: int, *, writable: bool = False) -> mmap.mmap:
        """A table that programs of a loaded sensor count in, mapped; `size` in bytes.

        `writable` is one that they are told something by.

        Raises:
            KeyError: no loaded sensor has made it.
            OSError: it cannot be mapped.
        """
        return self._map(self._tables[name], size, writable=writable)

    @property
    def program_fds(self) -> dict[str, int]:
        """The descriptors of the programs that are attached, by name."""
        return {name: fd for one in self._attached.values() for name, fd in one.descriptors.items()}

    def run_timed(self) -> None:
        """Run what the sensors have to be run every second.

        Raises:
            KernelError: the helper cannot be asked.
            OSError: the kernel refused.
        """
        for sensor, attached in self._attached.items():
            if any(one.way == TIMED and one.status == ATTACHED for one in attached.programs):
                self._loader.run(sensor)

    def unload(self, sensor: str) -> None:
        """Detach one sensor and let go of it; the others go on."""
        self.put_away(sensor)
        self.let_go(sensor)

    def put_away(self, sensor: str) -> None:
        """Count a sensor as unloaded, before `let_go` has it done."""
        self.missed()  # its counts go with it
        self._loaded.remove(sensor)
        del self.loaded_for[sensor]
        self._forget_missed(sensor)
        del self._states[sensor]

    def let_go(self, sensor: str) -> None:
        """Have a sensor that was put away detached and unloaded. In any thread."""
        with _what_stays_told():
            self._loader.unload(sensor)

    def forget(self, sensor: str) -> None:
        """Undo what was noted of a sensor that could not be loaded."""
        if sensor not in self._loaded:
            self._states.pop(sensor, None)

    def read(self, map: str) -> list[tuple[bytes, bytes]]:
        """Key and value of every element of a map that a sensor keeps for the agent.

        Raises:
            KernelError: there is no such map.
            OSError: this type of map cannot be read.
        """
        return list(self._loader.read(map))

    def take(self, map: str) -> list[tuple[bytes, bytes]]:
        """The same, and the map is empty afterwards. Nothing else may change it meanwhile."""
        return list(self._loader.take(map))

    def locate(self, pid: int, start: int, image: int, addresses: Sequence[int]) -> Located:
        """Where code of a process is: see `processes.locate`."""
        return self._loader.locate(pid, start, image, addresses)

    def open_module(self, pid: int, start: int, image: int, first: int, last: int) -> int:
        """A descriptor of a file that is mapped: see `processes.open_module`."""
        return self._loader.open_module(pid, start, image, first, last)

    @property
    def statuses(self) -> list[ProgramStatus]:
        """What became of every program of the sensors that are loaded."""
        return [
            ProgramStatus(
                name=state.name,
                sensor=sensor,
                hook=state.hook,
                way=state.way,
                kinds=_kinds_of(sensor, state.name),
                status=state.status,  # type: ignore[arg-type]
                reason=state.reason,
            )
            for sensor, states in self._states.items()
            for state in states
        ]

    def coverage(self, kinds: Collection[str]) -> dict[str, KindStatus]:
        """How far each of `kinds` is observed."""
        found = coverage(self.statuses, kinds, room_for_records(self.transport))
        if self._kernel_is_unnamed and found.get(_PROFILE, _MISSING).status != "missing":
            reasons = (found[_PROFILE].reason, obstacles.KERNEL_UNNAMED)
            found[_PROFILE] = KindStatus("partial", "; ".join(filter(None, reasons)))
        return {kind: _lessened(kind, one, self.types.lacks) for kind, one in found.items()}

    def missed(self) -> dict[str, int]:
        """Runs of programs that the kernel left out, per program that had any.

        Of programs that were unloaded too.
        """
        self._missed_now = Counter(missed_runs(self._attached.values()))
        return dict(self._missed_before + self._missed_now)

    def detach(self) -> None:
        """Unload every sensor: nothing is observed after this.

        That of the flows is only detached: they are to be reported yet, before `release`.
        """
        self.missed()
        loaded, self._loaded = self._loaded, []
        with suppress(HelperGone):  # and its programs with it
            for sensor in loaded:
                if sensor == flows.SENSOR and self.flows is not None:
                    self._loaded.append(sensor)
                    with _what_stays_told():
                        self._loader.detach(sensor)
                else:
                    self._release(sensor)

    def release(self) -> None:
        """Unload what `detach` has left. Harmless when there is nothing."""
        loaded, self._loaded = self._loaded, []
        with suppress(HelperGone):
            for sensor in loaded:
                self._release(sensor)

    def _release(self, sensor: str) -> None:
        self._forget_missed(sensor)
        self.let_go(sensor)

    def _forget_missed(self, sensor: str) -> None:
        for program in self._states[sensor]:
            self._missed_before[program.name] += self._missed_now.pop(program.name, 0)
        self._attached.pop(sensor, None)

    def close(self) -> None:
        """Detach and release everything. Harmless when done already."""
        with _what_stays_told():
            self._loader.close()
        _close(self.buffers)
        self.buffers = {}
        if self.kallsyms is not None:
            os.close(self.kallsyms)
            self.kallsyms = None
        for mapping in self._mapped:
            with suppress(BufferError):  # somebody still looks at it
                mapping.close()


@contextmanager
def _what_stays_told() -> Iterator[None]:
    """What the kernel refuses to detach outlives the agent: whoever runs it has to know."""
    try:
        yield
    except OSError as error:
        _log.warning("not detached: %s", error.strerror or error)


def _close(buffers: Mapping[int, Mapping[str, int]]) -> None:
    for rings in buffers.values():
        for fd in rings.values():
            os.close(fd)


def _index_of(interface: str) -> int:
    """Its index; 0 if there is no such interface, or that is only another name of one."""
    try:
        index = socket.if_nametoindex(interface)
        return index if socket.if_indextoname(index) == interface else 0
    except (OSError, UnicodeError):
        return 0


def _kinds_of(sensor: str, program: str) -> tuple[str, ...]:
    return next(one.kinds for one in SENSORS[sensor].programs if one.name == program)


def load(
    settings: Settings,
    kinds: Collection[str],
    loader: LoaderLike | None = None,
    directory: str = OBJECTS,
) -> KernelState:
    """Load what `kinds` needs, with its filters in place and the agent itself excluded.

    Nothing is attached yet: no event can have been produced when this returns. Without a
    `loader` the programs are loaded in this process, which is then the whole agent. `directory`
    is where the loader has its objects from.

    Raises:
        PrivilegeError: missing capabilities.
        ContractError: an object was built from another `events.h`.
        KernelError: no BPF, no BTF, or no sensor loads.
    """
    wanted = sensors_of(kinds)
    capabilities.require()
    if loader is None:
        loader = Loader(directory=directory, targets=targets_of(settings.kernel))
        if settings.btf is None:
            loader.prepare(settings.kernel.headers)
    state = KernelState(loader, settings, directory)
    state.want(kinds)
    try:
        _load_sensors(state, wanted)
        _check_types(state)
    except BaseException:
        state.close()
        raise
    state.enable(kinds)
    return state


def _check_types(state: KernelState) -> None:
    """Raises KernelError: without the kernel's types, nothing of what is wanted loads."""
    if state.types.rung == "none" and all(one.status != LOADED for one in state.statuses):
        raise KernelError(
            f"{state.types.reason}, so no event can be observed; install the headers of this very "
            "kernel and bcc for Python, or name a BTF file of it in the configuration (btf = PATH)"
        )


def _load_sensors(state: KernelState, wanted: Collection[str]) -> None:
    """As many as can be. Raises KernelError when none can be."""
    failures = []
    for sensor in wanted:
        try:
            state.load(sensor)
        except KernelError as error:
            failures.append(str(error))
    if len(failures) == len(wanted):
        raise KernelError("; ".join(failures))
