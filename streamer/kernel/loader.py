"""Loads the core object and the sensors and attaches their programs, as far as this kernel allows.

It runs in the privileged process: it imports little, and knows nothing of events. A program that
does not load or attach makes way for the next one of its hook; a sensor that does not load leaves
the others alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from streamer.errors import KernelError
from streamer.kernel import bulk_rings, capabilities, obstacles, types
from streamer.kernel.libbpf import (
    FIGURES,
    XDP_MODES,
    DescriptorLink,
    Link,
    Map,
    Object,
    Program,
    functions_of,
    make_ring,
    names_of_enum,
    variables_of,
)
from streamer.kernel.objects import CONTRACT, KIND_END, SENSORS
from streamer.kernel.perf_buffers import EVENTS_OF_A_CPU, PerfBuffers
from streamer.kernel.perf_event import CLOCK, CYCLES, open_sampling
from streamer.kernel.processes import Located, locate, open_module
from streamer.kernel.tags import RINGS, ProgramInfo, SensorInfo
from streamer.kernel.traffic import FilterLink, TrafficFilters

OBJECTS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "bpf")
CORE = "core"
_IDENTITY = struct.Struct(f"<{max(at + size for _, at, size in CONTRACT['identity']) // 4}I")
_LEARN_PIDS, _TRY_FUNCTION = "learn_pids", "try_function"
_LEARN_REGISTERS, _REGISTERS_AT = "learn_registers", "registers_at"
_NO_REGISTERS = (
    "where this kernel keeps the registers of system calls was not found: what calls are given "
    "could not be read"
)
_OF_PREEMPTIBLE = "tracepoint_srcu_srcu_data"  # what tells that they are, see process.bpf.c
_TRY_RINGS = "try_rings"
PERF_BUFFERS = "perf_buffers"
"""The option by which programs write to perf buffers."""
_BULK_RINGS, _BULK_SHIFT = "bulk_rings", "bulk_shift"
_BULK_OF_CPUS = "bulk_of_cpus"
_PERF_SLOTS = CONTRACT["enum perf_limits"][0][1]
_LEAST_RING = 4096
_AT_FUNCTION = ("fentry/", "fexit/")
_AT_INTERFACES = ("xdp", "tcx/ingress", "tcx/egress")
_PROBES = ("kprobe/", "kretprobe/", "tp/")
TIMED = "raw_tp/streamer_every_second"
_CGROUP = "cgroup"
NO_CGROUPS = "no hierarchy of cgroups of version 2 is mounted, or only a container's own part of it"
_LOOKS = 10  # for two lists of interfaces that agree
_AT_A_RATE = "perf_event"
_OPTION_SECTION, _CONSTANTS = ".rodata.", ".rodata"
_UNRESOLVED = re.compile(r"invalid func unknown#(?:195896080|200\d{7})$", re.MULTILINE)
"""What the verifier says of what libbpf could not relocate, or of a map that was not made."""
_VARIABLES = ".bss"  # there are none but those that keep types in the BTF, which no program uses

ATTACHED, FAILED, SPARE, LOADED = "attached", "failed", "spare", "loaded"


class ProgramState(NamedTuple):
    """What became of a program: `attached`, `failed` for a `reason`, `loaded` and not attached
    yet, or `spare`, because a better way to its hook is attached. `way` is where it attaches. One
    that is attached has a `reason` if it could not be at some of its interfaces.
    """

    name: str
    hook: str
    way: str
    status: str
    reason: str = ""


class Transport(NamedTuple):
    """How records come: `ring` (buffers), or `perf` (buffers) and why so.

    `sizes` are the bytes of a buffer, by ring: of a perf buffer a CPU's; of ring buffers by their
    names, as there can be several for bulk (`bulk_rings.py`), `bulk_rings` of them, for CPUs by
    `bulk_shift`.
    """

    name: str
    sizes: Mapping[str, int]
    reason: str = ""
    bulk_shift: int = 0

    @property
    def bulk_rings(self) -> int:
        """How many ring buffers there are for bulk."""
        return sum(bulk_rings.ring_of(name) == bulk_rings.BULK for name in self.sizes)


class Loaded(NamedTuple):
    """What became of a sensor's programs, and the descriptors of its own maps, by name."""

    programs: list[ProgramState]
    maps: dict[str, int]


class Attached(NamedTuple):
    """What became of a sensor's programs, and the descriptors of those attached, by name."""

    programs: list[ProgramState]
    descriptors: dict[str, int]


class Targets(NamedTuple):
    """What the programs of a sensor attach to, apart from hooks of the kernel as a whole."""

    interfaces: tuple[str, ...] = ()
    cgroup: str = ""
    rate: int = 0
    functions: tuple[str, ...] = ()
    """Of the kernel. One that has several names, `A|B`, is known by the first that is there."""

    def given(self) -> Iterator[str]:
        """The needs that these meet."""
        if self.interfaces:
            yield "interface"
        if self.cgroup:
            yield "cgroup"
        if self.rate:
            yield "rate"
        if self.functions:
            yield "functions"


NO_TARGETS: Mapping[str, Targets] = {}


class _Attempt(NamedTuple):
    """One of the ways to a hook, still to be tried."""

    info: ProgramInfo
    section: str


class _AtInterface(NamedTuple):
    """A program at the interface of that index.

    At packets that come in it is run by the driver (`native`) or behind it (`generic`), at all that
    pass by `tcx` or `clsact`.
    """

    number: int
    mode: str
    link: DescriptorLink | FilterLink


class _Sensor:
    """A loaded sensor.

    Several objects, if its programs load alone and not together, or one was loaded when another
    could not be attached.
    """

    def __init__(self, info: SensorInfo, options: Mapping[str, int], targets: Targets) -> None:
        self.info = info
        self.options = options
        self.targets = targets
        self.objects: list[Object] = []
        self.programs: dict[str, Program] = {}  # hook: what is loaded for it
        self.waiting: dict[str, list[_Attempt]] = {}  # hook: what is left to try
        self.states: dict[str, ProgramState] = {}  # program: what became of it
        self.links: list[Link] = []
        self.at_interfaces: dict[str, dict[str, _AtInterface]] = {}  # program: by interface
        self.copies: dict[str, int] = {}  # `program:function`: a descriptor

    @property
    def maps(self) -> dict[str, Map]:
        """The maps, its own and shared ones, that were created."""
        return self.objects[0].maps if self.objects else {}

    def note(self, info: ProgramInfo, section: str, status: str, reason: str = "") -> None:
        self.states[info.name] = ProgramState(info.name, info.hook, section, status, reason)

    def report(self) -> list[ProgramState]:
        """What became of the programs, in their order: of each hook the best way first."""
        names = (info.name for info in self.info.programs)
        return [self.states[name] for name in names if name in self.states]

    def detach(self) -> None:
        """All of it. Raises OSError at the end, of what stays attached."""
        # What finds out what another program has missed goes before that one.
        for link in reversed(self.links):
            link.destroy()
        errors = [
            error
            for attached in self.at_interfaces.values()
            for one in attached.values()
            if (error := _why_not_destroyed(one.link))
        ]
        self.links, self.at_interfaces = [], {}
        _raise_all(errors)

    def close(self) -> None:
        """Raises as `detach` does, with all else released."""
        try:
            self.detach()
        finally:
            for fd in self.copies.values():
                os.close(fd)
            self.copies = {}
            for loaded in self.objects:
                loaded.close()
            self.objects = []


class Loader:
    """The BPF side of the agent: maps and programs, from `load_core` to `close`."""

    def __init__(
        self,
        *,
        parent_is_agent: bool = False,
        sensors: Mapping[str, SensorInfo] = SENSORS,
        directory: str = OBJECTS,
        targets: Mapping[str, Targets] = NO_TARGETS,
        workers: int = 0,
    ) -> None:
        """`parent_is_agent`: the process that started this one is the agent too, and no more
        observed than this one; so are `workers` others that it started. `sensors` and their
        objects in `directory` are ours unless given.
        `targets` are what a sensor's programs attach to, by its name.
        """
        self._parent_is_agent = parent_is_agent
        self._workers = workers
        self._catalogue = sensors
        self._directory = directory
        self._targets = targets
        self.types = types.KernelTypes()
        """What programs are relocated against."""
        self._prepared = False
        self._core: Object | None = None
        self._shared: dict[str, Map] = {}
        self._known: set[str] = set()
        self._common: dict[str, int] = {}  # descriptors of maps that sensors share
        self.no_functions = "not tried"
        """Why programs at functions (fentry, fexit) do not load; empty where they do."""
        self.transport = Transport("ring", {})
        self._buffers: PerfBuffers | None = None
        self._registers_at = 0  # where in a task's stack those of its system call are
        self._more_rings: dict[str, int] = {}  # descriptors of ring buffers that no object has
        self._sensors: dict[str, _Sensor] = {}
        # Made here, while a socket can be opened.
        at_interfaces = any(one.interfaces for one in targets.values())
        self._filters = TrafficFilters() if at_interfaces else None
        self.cpus = last_possible_cpu() + 1

    @property
    def filters_packets(self) -> bool:
        """Whether a program may be attached where it could stop packets, whatever the options.

        Raises:
            KernelError: the core object cannot be opened.
        """
        self.no_functions = self._try_function()
        return any(
            self._could_filter(_Sensor(self._catalogue[name], {}, targets), program)
            for name, targets in self._targets.items()
            for program in self._catalogue[name].programs
        )

    def _could_filter(self, sensor: _Sensor, program: ProgramInfo) -> bool:
        needs = [need for need in program.needs if not need.startswith("option:")]
        return bool({"interface", "cgroup"} & set(needs)) and self._is_given(sensor, needs)

    # ------------------------------------------------------------ core

    def prepare(self, headers: str) -> None:
        """Find out what programs can be relocated against, as long as processes can be started.

        `headers` as for `types.find`.
        """
        functions = self._wanted_functions()
        enums = {
            one.names for sensor in self._catalogue.values() for one in sensor.maps if one.names
        }
        wanted = types.Wanted(self._directory, functions, enums)
        self.types = types.find(wanted, headers)
        self._prepared = True

    def load_core(
        self, rings: Mapping[str, int], btf: str | None, transport: str = "auto"
    ) -> dict[str, int]:
        """Create what all sensors share, with rings of the sizes given in bytes.

        Further ones for bulk are named as in `bulk_rings.py`. `btf` is a BTF file to use in place
        of the kernel's. With a `transport` of `perf` the rings are perf buffers, which have no
        further ones, and with `auto` where the kernel refuses ring buffers. Returns the
        descriptors of the maps, and of further ring buffers.

        Raises:
            KernelError: no BPF, not such a file, or the core object does not load.
        """
        if btf is not None:
            self.types = types.of_file(btf)
        elif not self._prepared:
            self.prepare("auto")
        self.transport = self._by_perf(rings) if transport == "perf" else self._by_rings(rings)
        try:
            core = self._load_core_object(rings)
        except OSError as error:
            refused = "" if transport == "perf" else self._refuses_rings()
            if not refused:
                raise _core_error(error) from error
            self.transport = self._by_perf(rings, refused)
            try:
                core = self._load_core_object(rings)
            except OSError:  # then it is not for the sake of the rings
                raise _core_error(error) from error
        try:
            if self.transport.name == "perf":
                self._make_buffers(core, self.transport.sizes)
            else:
                self._make_more_rings(core)
            self._find_out_who(core)
            self._find_registers(core)
            self._known = self._known_functions() | self._known_variables()
            self.no_functions = self._try_function()
        except OSError as error:
            self._close_core(core)
            raise _core_error(error) from error
        except KernelError:
            self._close_core(core)
            raise
        made = self._core_maps()
        self._shared = {name: one for name, one in _named(core.maps).items() if made(name)}
        self._core = core
        return {name: found.fd for name, found in self._shared.items()} | self._more_rings

    @staticmethod
    def _by_rings(rings: Mapping[str, int]) -> Transport:
        made = Transport("ring", rings)
        cpus = max(present_cpus(), default=0) + 1
        return made._replace(bulk_shift=bulk_rings.shift_of(made.bulk_rings, cpus))

    @staticmethod
    def _by_perf(rings: Mapping[str, int], reason: str = "") -> Transport:
        """With what all ring buffers of a ring were to have together."""
        total: Counter[str] = Counter()
        for name, size in rings.items():
            total[bulk_rings.ring_of(name)] += size
        return Transport("perf", dict(total), reason)

    def _make_more_rings(self, core: Object) -> None:
        """Those for bulk behind the first, and where programs find all of them."""
        if self.transport.bulk_rings <= 1:
            return
        of_cpus = core.maps[_BULK_OF_CPUS]
        for number, name in enumerate(bulk_rings.named(self.transport.bulk_rings)):
            fd = core.maps[name].fd if number == 0 else make_ring(name, self.transport.sizes[name])
            if number:
                self._more_rings[name] = fd
            of_cpus.update(number.to_bytes(4, "little"), fd.to_bytes(4, "little"))

    def _close_core(self, core: Object) -> None:
        core.close()
        for fd in self._more_rings.values():
            os.close(fd)
        self._more_rings = {}

    def _core_maps(self) -> Callable[[str], bool]:
        """Whether a map of the core is made."""
        needs = {info.name: info.needs for info in self._catalogue[CORE].maps}
        core = _Sensor(self._catalogue[CORE], self._own_options(), Targets())
        return lambda name: self._is_given(core, needs.get(name, ()))

    def _own_options(self) -> dict[str, int]:
        """What programs are told that no configuration says."""
        perf, rings = self.transport.name == "perf", self.transport.bulk_rings
        return {
            PERF_BUFFERS: int(perf),
            _BULK_RINGS: rings if rings > 1 and not perf else 0,
            _BULK_SHIFT: self.transport.bulk_shift,
            _REGISTERS_AT: self._registers_at,
        }

    def _load_core_object(self, rings: Mapping[str, int]) -> Object:
        """Load it for the transport as it is. Raises OSError."""
        core = self._open(CORE)
        made = self._core_maps()
        try:
            for one in core.maps.values():
                if one.name.endswith(_VARIABLES) or not made(one.name):
                    one.leave_out()
                elif one.name.startswith(_OPTION_SECTION):
                    value = self._own_options().get(one.name.removeprefix(_OPTION_SECTION), 0)
                    one.write_initial(value.to_bytes(8, "little"))
            for map_info in self._catalogue[CORE].maps:
                size = self._entries(map_info.sized, {}, Targets())
                if map_info.sized == _BULK_RINGS:
                    size = core.maps[map_info.name].max_entries * max(self.transport.bulk_rings, 1)
                if size:
                    core.maps[map_info.name].resize(size)
            for ring in RINGS:
                if self.transport.name == "perf":
                    core.maps[ring].become_perf_events(EVENTS_OF_A_CPU * self.cpus)
                else:
                    core.maps[ring].resize(rings[ring])
            for program in core.programs.values():
                program.autoload(program.name in (_LEARN_PIDS, _LEARN_REGISTERS, _TRY_RINGS))
            core.load()
        except OSError:
            core.close()
            raise
        return core

    def _refuses_rings(self) -> str:
        """Why the kernel has no ring buffers for us, however small; empty: it has."""
        try:
            self.transport = Transport("ring", dict.fromkeys(RINGS, _LEAST_RING))
            self._load_core_object(self.transport.sizes).close()
        except OSError as error:
            return f"ring buffers are refused: {error.strerror}"
        return ""

    def _make_buffers(self, core: Object, rings: Mapping[str, int]) -> None:
        """Raises KernelError."""
        arrays = {ring: core.maps[ring] for ring in RINGS}
        self._buffers = PerfBuffers(arrays, rings, len(present_cpus()))
        less = self._buffers.fit(online_cpus())
        reason = "; ".join(filter(None, (self.transport.reason, less)))
        self.transport = Transport("perf", self._buffers.sizes, reason)

    def open_buffers(self, cpu: int) -> dict[str, int]:
        """Descriptors of the perf buffers of a CPU, by ring, which are the caller's.

        Once, and again, new ones, when the CPU has been down since; none otherwise.

        Raises:
            KernelError: records do not come by perf buffers.
            OSError: the kernel refused.
        """
        if self._buffers is None:
            raise KernelError("there are no perf buffers")
        return self._buffers.open(cpu)

    def _find_out_who(self, core: Object) -> None:
        if core.programs[_LEARN_PIDS].run():
            raise OSError(errno.EFAULT, "the agent cannot be told from others")
        identities = core.maps["identities"]
        ((key, value),) = identities.entries()
        first, own, mntns, found, *others = _IDENTITY.unpack(value)
        if not self._parent_is_agent:
            first = own  # there is no other process: its parent is observed like anybody
        elif first == 0 and own == os.getpid():
            # The program could not tell; in the initial pid namespace the kernel's are our numbers.
            first = os.getppid()
            others[: self._workers] = younger = younger_siblings() if self._workers else []
            found = len(younger)
        if found != self._workers and self._workers:
            raise OSError(errno.ESRCH, f"{self._workers} workers of the agent, and found {found}")
        if not self._workers:  # then other children of its are observed like anybody
            found, others = 0, [0] * len(others)
        identities.update(key, _IDENTITY.pack(first, own, mntns, found, *others))

    def _find_registers(self, core: Object) -> None:
        """Where programs that no helper tells find what a call was given. Raises KernelError."""
        self._registers_at = core.programs[_LEARN_REGISTERS].run()
        if not self._registers_at and self.types.rung != "none":
            raise KernelError(_NO_REGISTERS)

    def _known_functions(self) -> set[str]:
        return functions_of(self._wanted_functions(), self.types.path)

    def _known_variables(self) -> set[str]:
        """Those that the kernel's own BTF has: no file that stands in for it has any."""
        if not self.types.path:
            return variables_of(self._wanted("variable"))
        return {_OF_PREEMPTIBLE} if preempts_tracepoints(os.uname().release) else set()

    def _wanted_functions(self) -> set[str]:
        return self._wanted("function")

    def _wanted(self, what: str) -> set[str]:
        """What programs and maps need, or need the lack of, of that sort."""
        needs = [
            need.removeprefix("no ").partition(":")
            for sensor in self._catalogue.values()
            for tagged in (*(p.needs for p in sensor.programs), *(m.needs for m in sensor.maps))
            for need in tagged
        ]
        return {name for sort, _, name in needs if sort == what}

    def _try_function(self) -> str:
        trial = self._open(CORE)
        try:
            for one in trial.maps.values():
                one.leave_out()
            for program in trial.programs.values():
                program.autoload(program.name == _TRY_FUNCTION)
            trial.load()
        except OSError as error:
            return f"programs at functions (fentry, fexit) do not load: {error.strerror}"
        finally:
            trial.close()
        return ""

    def _open(self, name: str) -> Object:
        directory = self._directory
        if self.types.path:
            directory = os.path.join(directory, types.WITHOUT_BTF)
        path = os.path.join(directory, f"{name}.bpf.o")
        try:
            return Object(path, self.types.path)
        except OSError as error:
            raise KernelError(f"cannot open the BPF object {path}: {error.strerror}") from error

    def _entries(self, sized: str, options: Mapping[str, int], targets: Targets) -> int:
        """How many entries a map is to have; 0 where its own number is right."""
        if sized == "cpus":
            return self.cpus
        if sized == "cpus,kinds":
            return self.cpus * KIND_END
        if sized == "cpus,slots":
            return self.cpus * _PERF_SLOTS
        if sized == "cpus,interfaces":
            return self.cpus * len(targets.interfaces)
        kind, _, name = sized.partition(":")
        if kind == "cpus,table":
            return self.cpus * options.get(name, 0)
        return options.get(name, 0) if kind == "table" else 0

    # ------------------------------------------------------------ sensors

    def load(self, sensor: str, options: Mapping[str, int]) -> Loaded:
        """Load a sensor's programs, the best way to each hook that loads; attach none.

        `options` are sizes of tables and settings that are on (1), by name.

        Raises:
            KernelError: there is no such sensor, it is loaded already, or the core is not.
        """
        if sensor not in self._catalogue or sensor == CORE:
            raise KernelError(f"there is no sensor {sensor}")
        if sensor in self._sensors or self._core is None:
            raise KernelError(f"{sensor} cannot be loaded now")
        told = {**options, **self._own_options()}
        made = _Sensor(self._catalogue[sensor], told, self._targets.get(sensor, Targets()))
        self._plan(made)
        try:
            self._load_together(made)
        except BaseException:
            made.close()
            raise
        self._sensors[sensor] = made
        self._share(made)
        own = {name: found.fd for name, found in self._own_maps(made).items()}
        return Loaded(made.report(), own)

    def _share(self, made: _Sensor) -> None:
        """Give other sensors the maps that they have in common with this one."""
        for info in made.info.maps:
            if info.common and info.name in made.maps and info.name not in self._common:
                self._common[info.name] = os.dup(made.maps[info.name].fd)

    def _forget_common(self) -> None:
        """Let go of what no sensor that is loaded has any more."""
        loaded = [info for made in self._sensors.values() for info in made.info.maps]
        for name in self._common.keys() - {info.name for info in loaded if info.common}:
            os.close(self._common.pop(name))

    def _own_maps(self, made: _Sensor) -> dict[str, Map]:
        return {
            name: found
            for name, found in _named(made.maps).items()
            if name not in self._shared and self._is_wanted(made, name)
        }

    def _plan(self, made: _Sensor) -> None:
        """Which ways to each hook can be tried here, best first."""
        opened = self._open(made.info.name)
        sections = {program.name: program.section for program in opened.programs.values()}
        opened.close()
        for info in made.info.programs:
            section = sections.get(info.name, "")
            if not self._is_given(made, info.needs):
                if self._lacks_cgroups_alone(made, info):
                    made.note(info, section, FAILED, NO_CGROUPS)
                continue
            reason = self._obstacle(section) if section else self._why_absent()
            if reason:
                made.note(info, section, FAILED, reason)
            else:
                made.waiting.setdefault(info.hook, []).append(_Attempt(info, section))

    def _why_absent(self) -> str:
        if self.types.path:  # objects for kernels without BTF lack some
            return "it takes BTF of the kernel's own"
        return "the object has no such program"

    def _lacks_cgroups_alone(self, made: _Sensor, info: ProgramInfo) -> bool:
        """Whether it would stand in for another way to its hook, if only cgroups could be seen."""
        ways = [one for one in made.info.programs if one.hook == info.hook]
        others = [need for need in info.needs if need != _CGROUP]
        return len(ways) > 1 and _CGROUP in info.needs and self._is_given(made, others)

    def _is_given(self, made: _Sensor, needs: Iterable[str]) -> bool:
        at_functions = "no fentry" if self.no_functions else "fentry"
        given = {platform.machine(), at_functions, *made.targets.given()}
        if not self.types.path:
            given.add("own btf")
        for need in needs:
            what, _, name = need.partition(":")
            if what == "option":
                met = bool(made.options.get(name))
            elif name:
                met = (name in self._known) != what.startswith("no ")
            else:
                met = need in given
            if not met:
                return False
        return True

    def _obstacle(self, section: str) -> str:
        """Why a program cannot be attached there, as far as that is known beforehand."""
        if section.startswith(_AT_FUNCTION):
            return self.no_functions
        kind, _, event = section.partition("/")
        if kind in ("tracepoint", "tp"):
            trouble = ensure_tracefs()
            if trouble:
                return trouble
        places = (os.path.join(place, "events", event) for place in TRACEFS)
        if kind == "tracepoint" and not any(map(os.path.isdir, places)):
            return f"this kernel has no {section}"
        return ""

    def _load_together(self, made: _Sensor) -> None:
        """All at once, with the best way to each hook; if that fails, those that load alone."""
        best = {hook: attempts[0] for hook, attempts in made.waiting.items()}
        if not best:
            return
        try:
            loaded = self._try_load(made, [attempt.info.name for attempt in best.values()])
        except OSError:
            for hook in list(made.waiting):
                self._load_next(made, hook)
            self._gather(made)
        else:
            made.objects.append(loaded)
            for hook, attempt in best.items():
                made.waiting[hook].pop(0)
                self._take(made, loaded, attempt)
        self._name_numbers(made)

    def _gather(self, made: _Sensor) -> None:
        """Have one object in place of several, each of which keeps half a megabyte.

        Where they do not load together though each does alone, for want of memory, they remain.
        """
        if len(made.objects) < 2:
            return
        names = {hook: program.name for hook, program in made.programs.items()}
        try:
            together = self._try_load(made, names.values())
        except OSError:
            return
        for alone in made.objects:
            alone.close()
        made.objects = [together]
        made.programs = {hook: together.programs[name] for hook, name in names.items()}

    def _name_numbers(self, made: _Sensor) -> None:
        """Put the kernel's own names into the maps that are to have them."""
        for info in made.info.maps:
            if info.names and info.name in made.maps:
                table = made.maps[info.name]
                for number, name in sorted(_names_in(info.names, self.types.path).items()):
                    text = name.encode()[: table.value_size - 1]
                    with suppress(OSError):  # a number that the table has no room for
                        table.update(
                            number.to_bytes(4, "little"), text.ljust(table.value_size, b"\0")
                        )

    def _take(self, made: _Sensor, loaded: Object, attempt: _Attempt) -> None:
        made.programs[attempt.info.hook] = loaded.programs[attempt.info.name]
        made.note(attempt.info, attempt.section, LOADED)

    def _load_next(self, made: _Sensor, hook: str) -> None:
        """The next way to a hook that loads, alone, if there is one."""
        while made.waiting[hook]:
            attempt = made.waiting[hook].pop(0)
            try:
                loaded = self._try_load(made, [attempt.info.name])
            except OSError as error:
                reason = _load_reason(attempt, error)
                if self.types.rung == "none":
                    reason = self.types.reason
                made.note(attempt.info, attempt.section, FAILED, reason)
                continue
            made.objects.append(loaded)
            self._take(made, loaded, attempt)
            return

    def _try_load(self, made: _Sensor, names: Collection[str], function: str = "") -> Object:
        """Load only those programs, the ones that attach to functions for that one or the first.

        Raises OSError, with the verifier's log for a single one.
        """
        try:
            return self._load_only(made, names, function, _keep_figures)
        except _LoadError as error:
            if error.errno == errno.ENOSPC and len(names) == 1:  # it may be the log that has none
                return self._load_only(made, names, function, None)
            if not _UNRESOLVED.search(error.log):
                raise
            try:
                return self._load_only(made, names, function, _keep_instructions)
            except _LoadError as explained:
                raise (error if explained.errno == errno.ENOSPC else explained) from None

    def _load_only(
        self,
        made: _Sensor,
        names: Collection[str],
        function: str,
        keep_log: Callable[[Program], None] | None,
    ) -> Object:
        """`keep_log` is how, of a single one, unless it is None."""
        opened = self._open(made.info.name)
        log = next(iter(names)) if len(names) == 1 else None
        try:
            self._prepare_maps(made, opened)
            for program in opened.programs.values():
                program.autoload(program.name in names)
                if program.name in names and _is_copied(made.info, program):
                    program.set_function(function or self._typed_functions(made)[0])
            if log and keep_log:
                keep_log(opened.programs[log])
            opened.load()
        except OSError as error:
            text = opened.programs[log].log if log else ""
            opened.close()
            raise _LoadError(error, text) from error
        return opened

    def _prepare_maps(self, made: _Sensor, opened: Object) -> None:
        kept, shared = made.maps, self._shared
        sized = {info.name: info.sized for info in made.info.maps}
        for name, one in opened.maps.items():
            if name.startswith(_OPTION_SECTION):
                value = made.options.get(name.removeprefix(_OPTION_SECTION), 0)
                one.write_initial(value.to_bytes(8, "little"))
            elif name.endswith(_VARIABLES) or not self._is_wanted(made, name):
                one.leave_out()
            elif one.internal:
                continue  # the compiler's: it puts there what it likes, such as a switch's table
            elif name in shared:
                one.reuse(shared[name].fd)
            elif name in self._common:
                one.reuse(self._common[name])
            elif name in kept:
                one.reuse(kept[name].fd)
            else:
                entries = self._entries(sized.get(name, ""), made.options, made.targets)
                if entries:
                    one.resize(entries)

    def _typed_functions(self, made: _Sensor) -> list[str]:
        """The functions to attach to that are in the BTF. Raises OSError: there is none."""
        choices = [one.split("|") for one in made.targets.functions]
        known = functions_of({name for names in choices for name in names}, self.types.path)
        found = [next((name for name in names if name in known), "") for names in choices]
        if not any(found):
            raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
        return [name for name in found if name]

    def _is_wanted(self, made: _Sensor, name: str) -> bool:
        needs = next((info.needs for info in made.info.maps if info.name == name), ())
        return self._is_given(made, needs)

    def attach(self, sensor: str) -> Attached:
        """Attach what was loaded of a sensor, the next way to a hook where one cannot be.

        Once more, it attaches to interfaces that have come, or come back, since.

        Raises:
            KernelError: the sensor is not loaded.
        """
        made = self._loaded(sensor)
        # What is run from time to time prepares what the others need.
        for hook, program in sorted(made.programs.items(), key=lambda one: not _is_timed(one[1])):
            if made.states[program.name].status == LOADED:
                self._attach_hook(made, hook)
            elif program.section in _AT_INTERFACES:
                self._attach_to_interfaces(made, program)
        for attempts in made.waiting.values():
            for attempt in attempts:
                made.note(attempt.info, attempt.section, SPARE)
        descriptors = {program.name: program.fd for program in made.programs.values()}
        return Attached(made.report(), descriptors | made.copies)

    def _attach_hook(self, made: _Sensor, hook: str) -> None:
        if made.programs[hook].section in _AT_INTERFACES:
            self._attach_to_interfaces(made, made.programs[hook])
            return
        while hook in made.programs:
            program = made.programs.pop(hook)
            info = next(one for one in made.info.programs if one.name == program.name)
            try:
                links, way = self._attach_program(made, program)
            except OSError as error:
                made.note(info, program.section, FAILED, _attach_reason(program, error))
                self._load_next(made, hook)
            else:
                made.links += links
                unnamed = obstacles.what_is_unnamed(program.section, capabilities.effective())
                made.note(info, way, ATTACHED, unnamed)
                made.programs[hook] = program
                return

    def _attach_to_interfaces(self, made: _Sensor, program: Program) -> None:
        """To as many as can be. It is kept if that is none: there may be one later."""
        attached = made.at_interfaces.setdefault(program.name, {})
        errors = _attach_to_interfaces(
            lambda index: self._to_interface(program, index), made.targets.interfaces, attached
        )
        info = next(one for one in made.info.programs if one.name == program.name)
        where = (f"{name}:{one.mode}" for name, one in attached.items())
        reason = "; ".join(f"{name}: {error.strerror}" for name, error in errors.items())
        if attached:
            made.note(info, " ".join([program.section, *where]), ATTACHED, reason)
        else:
            reason = f"{program.section} cannot be attached: {reason}"
            made.note(info, program.section, FAILED, reason)

    def _to_interface(self, program: Program, index: int) -> _AtInterface:
        if program.section == "xdp":
            return _to_incoming(program, index)
        if self._filters is None:  # nobody has named any
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return _to_passing(program, index, self._filters)

    def _attach_program(self, made: _Sensor, program: Program) -> tuple[list[Link], str]:
        """The links, and where they attach. Raises OSError."""
        if _is_run(made.info, program):
            return [], "run by the agent"
        if _is_copied(made.info, program):
            return self._attach_copies(made, program)
        if _takes_functions(made.info, program) and program.section.startswith(_PROBES):
            return _to_functions(program, made.targets.functions)
        if program.section == _AT_A_RATE:
            return _attach_at_a_rate(program, made.targets.rate)
        return _attach(program, made.targets), program.section

    def _attach_copies(self, made: _Sensor, program: Program) -> tuple[list[Link], str]:
        """Attach a program to the function that it was loaded for, and a copy to each other one."""
        first, *others = self._typed_functions(made)
        links: list[Link] = []
        copies: dict[str, int] = {}
        try:
            links.append(program.attach())
            for function in others:
                opened = self._try_load(made, [program.name], function)
                try:
                    copy = opened.programs[program.name]
                    links.append(copy.attach())
                    copies[f"{program.name}:{function}"] = os.dup(copy.fd)
                finally:
                    opened.close()  # the link holds it
        except OSError:
            for link in links:
                link.destroy()
            for fd in copies.values():
                os.close(fd)
            raise
        made.copies |= copies
        kind = program.section.partition("/")[0]
        return links, " ".join([kind, first, *others])

    def run(self, sensor: str) -> None:
        """Run the programs of a sensor that are to be run every second.

        Raises:
            KernelError: the sensor is not loaded.
            OSError: the kernel refused.
        """
        for program in self._loaded(sensor).programs.values():
            if _is_timed(program):
                program.run()

    def detach(self, sensor: str) -> None:
        """Detach a sensor's programs, and keep them and their maps until `unload`.

        Raises:
            KernelError: the sensor is not loaded.
            OSError: the kernel refused; the others are detached.
        """
        self._loaded(sensor).detach()

    def run_program(self, sensor: str, program: str, repeat: int) -> int:
        """Run a program that is there to be run, so often; what it returned at last.

        Raises:
            KernelError: the sensor is not loaded, or has no such program.
            OSError: the kernel refused.
        """
        made = self._loaded(sensor)
        if not any(info.name == program and info.run for info in made.info.programs):
            raise KernelError(f"{sensor} has no program {program} to be run")
        for loaded in made.programs.values():
            if loaded.name == program:
                return loaded.run(repeat)
        raise KernelError(f"{program} is not loaded")

    def _loaded(self, sensor: str) -> _Sensor:
        if sensor not in self._sensors:
            raise KernelError(f"{sensor} is not loaded")
        return self._sensors[sensor]

    def unload(self, sensor: str) -> None:
        """Detach a sensor and let go of it.

        Raises:
            KernelError: the sensor is not loaded.
            OSError: the kernel refused to detach some of it; all else is done.
        """
        made = self._loaded(sensor)
        try:
            made.close()
        finally:
            del self._sensors[sensor]
            self._forget_common()

    # ------------------------------------------------------------ maps

    def update(self, map: str, key: bytes, value: bytes) -> None:
        """Set an element of a map.

        Raises:
            KernelError: there is no such map.
            OSError: the kernel refused.
        """
        self._map(map).update(key, value)

    def delete(self, map: str, key: bytes) -> None:
        """Remove an element of a map; raises as `update` does."""
        self._map(map).delete(key)

    def read(self, map: str) -> Iterator[tuple[bytes, bytes]]:
        """Key and value of every element of a map; raises as `update` does."""
        return self._map(map).entries()

    def take(self, map: str) -> Iterator[tuple[bytes, bytes]]:
        """Key and value of every element of a map, which is removed; raises as `update` does.

        Of a map that nothing else changes meanwhile.
        """
        return self._map(map).take()

    def locate(self, pid: int, start: int, image: int, addresses: Sequence[int]) -> Located:
        """Where code of a process is. See `processes.locate`."""
        return locate(pid, start, image, addresses)

    def open_module(self, pid: int, start: int, image: int, first: int, last: int) -> int:
        """A descriptor of a mapped file. See `processes.open_module`."""
        return open_module(pid, start, image, first, last)

    def _map(self, name: str) -> Map:
        if name in self._shared:
            return self._shared[name]
        for made in self._sensors.values():
            own = self._own_maps(made)
            if name in own:
                return own[name]
        raise KernelError(f"there is no map {name}")

    def close(self) -> None:
        """Detach and release everything. Harmless when done already.

        Raises:
            OSError: the kernel refused to detach some of it; all else is done.
        """
        errors = []
        for made in self._sensors.values():
            try:
                made.close()
            except OSError as error:
                errors.append(error)
        self._sensors = {}
        self._forget_common()
        if self._buffers is not None:
            self._buffers.close()
            self._buffers = None
        if self._core is not None:
            self._close_core(self._core)
            self._core, self._shared = None, {}
        if self._filters is not None:
            self._filters.close()
        _raise_all(errors)


def _why_not_destroyed(link: DescriptorLink | FilterLink) -> OSError | None:
    try:
        link.destroy()
    except OSError as error:
        return error
    return None


def _raise_all(errors: Sequence[OSError]) -> None:
    """As one OSError, if there is any."""
    if errors:
        raise OSError(errors[0].errno, "; ".join(str(error.strerror) for error in errors))


def _names_in(enum: str, btf: str | None) -> dict[int, str]:
    """What the kernel calls the numbers of one of its enums, without the enum's own name."""
    prefix = f"{enum.upper()}_"
    return {
        number: name.removeprefix(prefix)
        for number, name in names_of_enum(enum, btf).items()
        if name.startswith(prefix) and number >= 0
    }


def _named(maps: Mapping[str, Map]) -> dict[str, Map]:
    """Without the sections of global data."""
    return {name: one for name, one in maps.items() if not one.internal}


class _LoadError(OSError):
    """An object that did not load; `log` is what the verifier said."""

    def __init__(self, error: OSError, log: str) -> None:
        super().__init__(error.errno, error.strerror)
        self.log = log


def _load_reason(attempt: _Attempt, error: OSError) -> str:
    log = error.log if isinstance(error, _LoadError) else ""
    if error.errno == errno.ESRCH and not log:  # libbpf has not found it in the BTF
        return f"this kernel has no {attempt.section}"
    return f"{attempt.info.name} does not load: {_words_of(attempt.section, error, log)}"


def _words_of(section: str, error: OSError, log: str) -> str:
    lines = [line for line in log.splitlines() if line and not line.startswith(FIGURES)]
    # With EACCES the verifier says what is wrong with the program: no right would help.
    found_wrong = bool(lines) and error.errno == errno.EACCES
    if not found_wrong and (denied := obstacles.why_denied(section, error, obstacles.rights())):
        return denied
    return f"{error.strerror}: {lines[-1]}" if lines else str(error.strerror)


def _core_error(error: OSError) -> KernelError:
    if error.errno == errno.ENOSYS:
        return KernelError("no BPF in this kernel (CONFIG_BPF_SYSCALL): no event can be observed")
    refused = error.errno in (errno.EPERM, errno.EINVAL)
    denied = obstacles.why_denied("", error, obstacles.rights()) if refused else ""
    if denied or error.errno == errno.EPERM:
        return KernelError(f"not permitted to load BPF programs: {denied or 'lockdown'}")
    return KernelError(f"the BPF object does not load: {error.strerror}")


def _keep_figures(program: Program) -> None:
    program.keep_log()


def _keep_instructions(program: Program) -> None:
    program.keep_log(instructions=True, room=1 << 20)


def _is_copied(info: SensorInfo, program: Program) -> bool:
    """Whether each function takes a copy of the program: it is loaded for one."""
    return _takes_functions(info, program) and program.section.startswith(_AT_FUNCTION)


def _is_run(info: SensorInfo, program: Program) -> bool:
    """Whether the agent runs it, and it is attached nowhere."""
    return any(one.name == program.name and one.run for one in info.programs)


def _takes_functions(info: SensorInfo, program: Program) -> bool:
    """Whether it attaches to what the targets name, and not to what its section does."""
    needs = next((one.needs for one in info.programs if one.name == program.name), ())
    return "functions" in needs


def _is_timed(program: Program) -> bool:
    """Whether it is attached nowhere, and run by the agent every second."""
    return program.section == TIMED


def _attach(program: Program, targets: Targets) -> list[Link]:
    if _is_timed(program):
        program.run()
        return []
    if program.section.startswith("cgroup"):
        return _attach_to_each((targets.cgroup,), lambda path: _to_cgroup(program, path))
    return [program.attach()]


def _attach_at_a_rate(program: Program, rate: int) -> tuple[list[Link], str]:
    """By cycles on all CPUs, or by the clock on all. See `Loader._attach_program`."""
    cpus = [str(cpu) for cpu in online_cpus()]
    try:
        links = _attach_to_each(cpus, lambda cpu: _to_samples(program, int(cpu), rate, CYCLES))
        return links, f"{program.section} {CYCLES}"
    except OSError:
        links = _attach_to_each(cpus, lambda cpu: _to_samples(program, int(cpu), rate, CLOCK))
        return links, f"{program.section} {CLOCK}"


def _attach_to_each(names: Iterable[str], attach: Callable[[str], Link]) -> list[Link]:
    """To all of them, or to none."""
    links: list[Link] = []
    for name in names:
        try:
            links.append(attach(name))
        except OSError as error:
            for link in links:
                link.destroy()
            raise OSError(error.errno, f"{name}: {error.strerror}") from error
    return links


def _attach_to_interfaces(
    attach: Callable[[int], _AtInterface],
    names: Iterable[str],
    attached: dict[str, _AtInterface],
) -> dict[str, OSError]:
    """To each that it is not attached to yet: as it is now, which may be another than before.

    `attach` does so, by the index of the interface. Why not, of those where it cannot be.
    """
    errors: dict[str, OSError] = {}
    wanted: dict[str, int] = {}
    for name in names:
        try:
            wanted[name] = _index_of(name)
        except OSError as error:
            if error.errno == errno.EXDEV and name in attached:
                # Too much comes and goes to tell: where it is attached, it stays.
                wanted[name] = attached[name].number
            else:
                errors[name] = error
    # Before any is attached to: of two that have changed their names, each has the other's.
    for name in [name for name, one in attached.items() if one.number != wanted.get(name)]:
        if refused := _why_not_destroyed(attached.pop(name).link):
            errors[name] = refused
    for name in [name for name in wanted if name not in attached]:
        try:
            attached[name] = attach(wanted[name])
        except OSError as error:
            errors[name] = error
    return errors


def _to_incoming(program: Program, index: int) -> _AtInterface:
    """In the driver, where it can."""
    native, generic = XDP_MODES
    try:
        return _AtInterface(index, native, program.attach_to_interface(index, XDP_MODES[native]))
    except OSError as error:
        if error.errno == errno.EBUSY:  # another program is there, which stays
            raise
    link = program.attach_to_interface(index, XDP_MODES[generic])
    return _AtInterface(index, generic, link)


def _to_passing(program: Program, index: int, filters: TrafficFilters) -> _AtInterface:
    """By tcx, where the kernel has it."""
    try:
        return _AtInterface(index, "tcx", program.attach_to_traffic(index))
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EPERM):
            raise
    direction = program.section.partition("/")[2]
    return _AtInterface(index, "clsact", filters.attach(index, direction, program.fd))


def _to_functions(program: Program, functions: Iterable[str]) -> tuple[list[Link], str]:
    """To all of them that this kernel has. Raises OSError: it has none, or refuses one."""
    kind = program.section.partition("/")[0]
    links: dict[str, Link] = {}
    for choice in functions:
        try:
            name, link = _to_first(program, choice.split("|"))
        except FileNotFoundError:
            continue
        except OSError:
            for made in links.values():
                made.destroy()
            raise
        links[name] = link
    if not links:
        what = "tracepoints" if kind == "tp" else "kprobes"
        raise OSError(errno.ENOENT, f"this kernel has no {what}, or none of the functions")
    return [*links.values()], " ".join([kind, *links])


def _to_first(program: Program, names: list[str]) -> tuple[str, Link]:
    """To the first that is there, under the name by which it was found."""
    kind, _, event = program.section.partition("/")
    if kind == "tp":  # the names differ in what comes before that of the call
        category, _, moment = event.partition("/")
        name = f"{moment}_{names[0].partition('_sys_')[2]}"
        return name, program.attach_to_tracepoint(category, name)
    *better, last = names
    for name in better:
        with suppress(FileNotFoundError):
            return name, program.attach_to_function(name, returns=kind == "kretprobe")
    return last, program.attach_to_function(last, returns=kind == "kretprobe")


def _index_of(name: str) -> int:
    for _ in range(_LOOKS):
        ours = _interfaces()
        if os.fsencode(name) not in ours:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        # It shows the interfaces of whoever mounted it, whose indexes are others' here.
        with os.scandir(b"/sys/class/net") as entries:
            shown = {one.name for one in entries if one.is_dir()}
        if shown == ours:  # else one may have come or gone in between
            with open(f"/sys/class/net/{name}/ifindex") as file:
                return int(file.read())
    raise OSError(errno.EXDEV, "/sys/class/net is that of another network namespace")


def _interfaces() -> set[bytes]:
    """The names of all that are here. They are bytes, of any encoding, without ASCII spaces."""
    with open("/proc/self/net/dev", "rb") as file:
        return {line.partition(b":")[0].strip(b" ") for line in file if b":" in line}


def _to_cgroup(program: Program, path: str) -> Link:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return program.attach_to_cgroup(fd)
    finally:
        os.close(fd)


def _to_samples(program: Program, cpu: int, rate: int, source: str) -> Link:
    fd = open_sampling(cpu, rate, source)
    try:
        return program.attach_to_perf_event(fd)
    except OSError:
        os.close(fd)
        raise


def _attach_reason(program: Program, error: OSError) -> str:
    if error.errno == errno.ENOENT and error.strerror == os.strerror(errno.ENOENT):
        return f"this kernel has no {program.section}"
    denied = obstacles.why_denied(program.section, error, obstacles.rights())
    return f"{program.section} cannot be attached: {denied or error.strerror}"


# ---------------------------------------------------------------- what the kernel offers

TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


def has_tracefs() -> bool:
    """Whether tracefs is mounted where it is looked for."""
    return any(os.path.isdir(os.path.join(place, "events")) for place in TRACEFS)


def preempts_tracepoints(release: str) -> bool:
    """Whether a kernel that has no BTF to tell is of those that preempt programs at tracepoints.

    `release` is as `uname -r` says it. Mainline does since 7.0 (a46023d5616e).
    """
    major = re.match("[0-9]+", release)
    return major is not None and int(major[0]) >= 7


def ensure_tracefs() -> str:
    """Mount tracefs where the kernel expects it, if it is not there. Why not, or nothing.

    Debian mounts it at boot; a minimal system or container may not. The system-call hooks need
    it to be found, nothing else does.
    """
    if has_tracefs():
        return ""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tracefs", TRACEFS[0].encode(), b"tracefs", 0, None) == 0:
        return ""
    error = ctypes.get_errno()
    return obstacles.why_no_tracefs(_is_mounted("tracefs"), error, capabilities.effective())


def _is_mounted(kind: str) -> bool:
    with open("/proc/self/mounts") as file:
        return any(line.split(" ")[2] == kind for line in file)


def last_possible_cpu() -> int:
    """The highest number of a CPU that the kernel may ever bring up; there can be gaps below."""
    with open("/sys/devices/system/cpu/possible") as file:
        return max(_numbers_in(file.read()))


def younger_siblings() -> list[int]:
    """Processes that the parent of this one has started after it. Raises OSError."""
    parent = os.getppid()
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        children = [int(one) for one in file.read().split()]
    return children[children.index(os.getpid()) + 1 :]


def present_cpus() -> list[int]:
    """The CPUs that are there, up or not."""
    with open("/sys/devices/system/cpu/present") as file:
        return list(_numbers_in(file.read()))


def online_cpus() -> list[int]:
    """The CPUs that are up."""
    with open("/sys/devices/system/cpu/online") as file:
        return list(_numbers_in(file.read()))


def _numbers_in(ranges: str) -> Iterator[int]:
    """`0-1,4` is 0, 1 and 4."""
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
