"""A kernel side in memory: what the programs would write, without a kernel that runs them.

The maps are memfds, laid out as the kernel lays them out, below the real `KernelState`: ring
reader, counters and decoder are the real ones and need no privilege.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count

from streamer.config.settings import Settings
from streamer.errors import HelperGone, KernelError
from streamer.events.kinds import HEADER, KINDS
from streamer.kernel.loader import (
    ATTACHED,
    LOADED,
    TIMED,
    Attached,
    Loaded,
    ProgramState,
    Transport,
)
from streamer.kernel.objects import CONTRACT, KIND_END, KIND_NUMBERS, SENSORS
from streamer.kernel.processes import Located
from streamer.kernel.state import KernelState, sensors_of, size_of
from streamer.kernel.tags import RINGS
from streamer.kernel.types import KernelTypes
from tests.golden import cases
from tests.unit.ring import DATA_OFFSET, SimulatedRing, producer_bytes

CPUS = 2
INITIAL_MNTNS = 4026531841
_AT = {name: offset for name, offset, _ in CONTRACT["cpu_counters"]}
_COUNTED = [name for name, _, _ in CONTRACT["kind_counters"]]
_FAULTS = [name for name, _, _ in CONTRACT["enum fault"]]
_WAKE_NEVER = {name: number for name, number, _ in CONTRACT["enum wake"]}["WAKE_NEVER"]
_U64 = struct.Struct("<Q")


def _template(kind: str) -> bytes:
    """The shortest golden record of a kind."""
    found = [case.record for case in cases.load() if case.event["event"] == kind]
    return min(found, key=len)


class RingFd:
    """What a ring's descriptor is to its reader: memory to map, and something to wait for.

    No descriptor of an ordinary user is both, so it is a memfd to whom asks for a number, as `mmap`
    does, and an eventfd to whom asks for a file, as the event loop does.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __index__(self) -> int:
        return self._memory

    def fileno(self) -> int:
        return self._event

    def wake(self) -> None:
        os.eventfd_write(self._event, 1)

    def calm(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)

    def close(self) -> None:
        os.close(self._event)
        os.close(self._memory)


class MemoryPrograms:
    """The programs' side of the maps, and the loader that `KernelState` asks for them.

    `refused`: sensors that do not load; `unattached`: sensors whose programs do not attach. `done`
    is what was asked of the loader, in order.
    """

    def __init__(
        self, refused: frozenset[str] = frozenset(), unattached: frozenset[str] = frozenset()
    ) -> None:
        self.cpus = CPUS
        self.no_functions = "none in memory"
        self.transport = Transport("ring", {})
        self.types = KernelTypes()
        self.done: list[str] = []
        self.attached: set[str] = set()
        self.filters: dict[tuple[str, bytes], bytes] = {}
        self.rings: dict[str, SimulatedRing] = {}
        self.ring_fds: dict[str, RingFd] = {}
        self.skipped_numbers: Counter[tuple[str, int]] = Counter()
        self._refused, self._unattached = refused, unattached
        self._templates = {kind: _template(kind) for kind in KINDS}
        self._fds: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._boot_ns = count(1_000_000, 1_000)

    # ------------------------------------------------------------ a loader, see `loading.py`

    def load_core(
        self, rings: Mapping[str, int], btf: str | None, transport: str = "auto"
    ) -> dict[str, int]:
        self.done.append("load_core")
        self.transport = Transport("ring", rings)
        for name, size in rings.items():
            self._make_ring(name, size)
        self._make_map("counters", size_of("cpu_counters") * CPUS)
        self._make_map("kind_counters", size_of("kind_counters") * CPUS * KIND_END)
        self._make_map("faults", 8 * len(_FAULTS))
        self._make_map("reader", size_of("reader_state"))
        self._make_map("pressure", size_of("pressure"))
        self._make_map("settings", size_of("settings"))
        self._make_map("kind_settings", size_of("kind_settings") * KIND_END)
        self._make_map("identities", size_of("identity"))
        struct.pack_into(
            "<3I", self._maps["identities"], 0, os.getpid(), os.getpid(), INITIAL_MNTNS
        )
        return self._fds | self.ring_fds  # type: ignore[return-value]

    def open_buffers(self, cpu: int) -> dict[str, int]:
        raise KernelError("there are no perf buffers")

    def load(self, sensor: str, options: Mapping[str, int]) -> Loaded:
        self.done.append(f"load {sensor}")
        if sensor in self._refused:
            raise KernelError(f"{sensor} is refused")
        return Loaded(_states(sensor, LOADED), {})

    def attach(self, sensor: str) -> Attached:
        self.done.append(f"attach {sensor}")
        if sensor in self._unattached:
            return Attached(_states(sensor, "failed", "no such hook"), {})
        self.attached.add(sensor)
        return Attached(_states(sensor, ATTACHED), {})

    def run(self, sensor: str) -> None:
        self.done.append(f"run {sensor}")

    def unload(self, sensor: str) -> None:
        self.done.append(f"unload {sensor}")
        self.attached.discard(sensor)

    def detach(self, sensor: str) -> None:
        self.done.append(f"detach {sensor}")

    def run_program(self, sensor: str, program: str, repeat: int) -> int:
        raise KernelError(f"{program} cannot be run in memory")

    def update(self, map: str, key: bytes, value: bytes) -> None:
        self.filters[map, key] = value

    def delete(self, map: str, key: bytes) -> None:
        del self.filters[map, key]

    def read(self, map: str) -> Iterator[tuple[bytes, bytes]]:
        yield from ((key, value) for (name, key), value in self.filters.items() if name == map)

    def take(self, map: str) -> Iterator[tuple[bytes, bytes]]:
        raise KernelError(f"there is no map {map}")

    def locate(self, pid: int, start: int, image: int, addresses: Sequence[int]) -> Located:
        raise ProcessLookupError

    def open_module(self, pid: int, start: int, image: int, first: int, last: int) -> int:
        raise FileNotFoundError

    def close(self) -> None:
        self.done.append("close")
        self.attached.clear()

    # ------------------------------------------------------------ the programs

    def emit(self, kind: str, times: int = 1, cpu: int = 0, *, filtered: bool = False) -> int:
        """`times` events of a kind happen on a CPU. How many of them found room, or 0 if filtered.

        Without its programs attached nothing happens, as in the kernel.
        """
        if self.attached.isdisjoint(sensors_of([kind])):
            return 0
        return sum(self._event(kind, cpu, filtered) for _ in range(times))

    def _event(self, kind: str, cpu: int, filtered: bool) -> bool:
        self._count(kind, cpu, "produced")
        if filtered:
            self._count(kind, cpu, "filtered")
            return False
        ring = KINDS[kind].ring
        seq = self._next_seq(ring, cpu)
        record = self._record(kind, cpu, seq)
        if self.rings[ring].write(record) is None:
            self._count(kind, cpu, "lost")
            return False
        if self._asked(ring) != _WAKE_NEVER:
            self.ring_fds[ring].wake()
        return True

    def garbage(self, ring: str, cpu: int = 0, *, short: bool = False) -> None:
        """A record of a kind that nobody knows, or one that ends too early, with its number."""
        kind = next(kind for kind, info in KINDS.items() if info.ring == ring)
        record = bytearray(self._record(kind, cpu, self._next_seq(ring, cpu)))
        if short:
            del record[size_of("event_base") + 8 :]
            struct.pack_into("<I", record, HEADER["size"], len(record))
        else:
            struct.pack_into("<H", record, HEADER["kind"], KIND_END + 1)
        assert self.rings[ring].write(bytes(record)) is not None

    def fault(self, name: str, times: int = 1) -> None:
        """Something goes wrong in the kernel apart from numbered losses."""
        self._add("faults", 8 * _FAULTS.index(name), times)

    def enabled(self, kind: str) -> bool:
        at = KIND_NUMBERS[kind] * size_of("kind_settings")
        return bool(self._maps["kind_settings"][at])

    def sample(self, kind: str) -> int:
        """One in how many is reported."""
        offsets = {name: offset for name, offset, _ in CONTRACT["kind_settings"]}
        at = KIND_NUMBERS[kind] * size_of("kind_settings") + offsets["rates"]
        rates = struct.unpack_from("<4I", self._maps["kind_settings"], at)
        return int(rates[self.level])

    @property
    def level(self) -> int:
        """Of pressure, as the programs read it."""
        (offset,) = (at for name, at, _ in CONTRACT["pressure"] if name == "level")
        (found,) = struct.unpack_from("<Q", self._maps["pressure"], offset)
        return int(found)

    def memory(self, name: str) -> mmap.mmap:
        """A map as the programs see it."""
        return self._maps[name]

    def _record(self, kind: str, cpu: int, seq: int) -> bytes:
        record = bytearray(self._templates[kind])
        struct.pack_into("<Q", record, HEADER["boot_ns"], next(self._boot_ns))
        struct.pack_into("<Q", record, HEADER["seq"], seq)
        struct.pack_into("<H", record, HEADER["cpu"], cpu)
        record[HEADER["skipped"]] = 0
        return bytes(record)

    def _next_seq(self, ring: str, cpu: int) -> int:
        at = cpu * size_of("cpu_counters") + _AT["seq"] + 8 * RINGS.index(ring)
        return self._add("counters", at, 1)

    def _count(self, kind: str, cpu: int, what: str) -> None:
        row = cpu * KIND_END + KIND_NUMBERS[kind]
        self._add("kind_counters", row * size_of("kind_counters") + 8 * _COUNTED.index(what), 1)

    def _add(self, name: str, at: int, number: int) -> int:
        (before,) = _U64.unpack_from(self._maps[name], at)
        _U64.pack_into(self._maps[name], at, before + number)
        return int(before) + number

    def _asked(self, ring: str) -> int:
        (asked,) = struct.unpack_from("<I", self._maps["reader"], 4 * RINGS.index(ring))
        return int(asked)

    # ------------------------------------------------------------ memory

    def _make_ring(self, name: str, size: int) -> None:
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(fd, DATA_OFFSET + producer_bytes(size))
        consumer = mmap.mmap(fd, DATA_OFFSET)
        producer = mmap.mmap(fd, producer_bytes(size), offset=DATA_OFFSET)
        self.rings[name] = SimulatedRing(size, consumer=consumer, producer=producer)
        self.ring_fds[name] = RingFd(fd)

    def _make_map(self, name: str, size: int) -> None:
        self._fds[name] = fd = os.memfd_create(name, os.MFD_CLOEXEC)
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(fd, pages)
        self._maps[name] = mmap.mmap(fd, pages)

    def release(self) -> None:
        """Close what was made; what others have mapped stays."""
        for ring in self.ring_fds.values():
            ring.close()
        for fd in self._fds.values():
            os.close(fd)
        self.rings, self._maps = {}, {}


class MemoryKernel(KernelState):
    """The real state over programs in memory. `runs_missed` are what the kernel left out."""

    def __init__(
        self, settings: Settings, kinds: frozenset[str], programs: MemoryPrograms | None = None
    ) -> None:
        self.programs = programs or MemoryPrograms()
        self.runs_missed: Counter[str] = Counter()
        self.helper_is_gone = False
        super().__init__(self.programs, settings)
        for sensor in sensors_of(kinds):
            with suppress(KernelError):
                self.load(sensor)
        self.enable(kinds)

    def missed(self) -> dict[str, int]:
        return dict(self.runs_missed)

    def detach(self) -> None:
        if self.helper_is_gone:
            raise HelperGone("the privileged helper has ended")
        super().detach()


def _way(program: str) -> str:
    return TIMED if program == "every_second" else f"memory/{program}"


def _states(sensor: str, status: str, reason: str = "") -> list[ProgramState]:
    return [
        ProgramState(program.name, program.hook, _way(program.name), status, reason)
        for program in SENSORS[sensor].programs
        if "no fentry" not in program.needs
    ]
