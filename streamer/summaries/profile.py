"""`profile.sample`: stacks and how often they were met, as `bpf/perf_sampler.bpf.c` counted them.

Two sets of tables take turns: one is filled while the other is read, through the helper, and
cleared. That takes a while, so it is done in a thread, and so is the reading of files.
"""

from __future__ import annotations

import logging
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import Lock
from typing import Literal, NamedTuple

from streamer.errors import StreamerError
from streamer.events.envelope import Envelope
from streamer.events.summaries import ProfileSample
from streamer.kernel.objects import CONTRACT
from streamer.kernel.state import KernelState, size_of
from streamer.summaries.kallsyms import KernelFunctions
from streamer.summaries.symbols import NOTHING, UNKNOWN, Named, Process, Symbols

MOST_RECORDS = 1000
"""Of a period; what is in no record of its own is in one for all the others."""
MOST_STACKS = 4 * MOST_RECORDS
"""That are looked up in a period. Several can have the same functions, and become one record."""
MOST_CHARACTERS = 12_000
"""Of the functions of a record, which so fits into a message."""
HURRY_SECONDS = 1.5
"""How long names are looked for at the end: what has none by then is published without."""
DEPTH = size_of("profile_stack") // 8

LOST, OTHER = "[lost]", "[other]"

_NO_STACK, _COLLIDED = -1, 1 << 24  # bpf/core/tables.h
_QUIET_SECONDS = 1.0
_LOOK_SECONDS = 0.005
_RELOAD_SECONDS = 60.0

_KEY = struct.Struct("<QQQIiiI16s")  # struct profile_key
_SET = struct.Struct(f"<{size_of('profile_set') // 8}Q")
_AT = {name: offset // 8 for name, offset, _ in CONTRACT["profile_set"]}
assert _KEY.size == size_of("profile_key")

_log = logging.getLogger("streamer")

Mode = Literal["user", "kernel", "other"]
Stack = tuple[int, ...]
KernelFrame = Callable[[int], str]


class Sampled(NamedTuple):
    """Samples of one process and stack, not looked up yet: addresses from the innermost on.

    A stack is None if there is one that was lost, and empty if there is none.
    """

    process: Process
    comm: str
    cgroup_id: int
    cpu_mode: Mode
    kernel: Stack | None
    user: Stack | None
    met: int


class Period(NamedTuple):
    """What one set of tables held, and its counters: see `struct profile_set`."""

    stacks: list[Sampled]
    taken: int
    idle: int
    filtered: int

    @property
    def lost(self) -> int:
        """Samples that were taken and are nowhere else."""
        counted = sum(one.met for one in self.stacks)
        return max(self.taken - self.idle - self.filtered - counted, 0)


class Record(NamedTuple):
    """What makes a record: samples that differ in none of it are one."""

    pid: int
    start_boot_ns: int
    comm: str
    cgroup_id: int
    cpu_mode: Mode
    frames: tuple[str, ...]
    truncated: tuple[Literal["frames"], ...]
    incomplete: bool


class Counted(NamedTuple):
    """A record, how many samples went into it, and the build ids of its files."""

    record: Record
    met: int
    modules: dict[str, str]


# ---------------------------------------------------------------- the tables


class Tables:
    """The two sets of tables of the program."""

    def __init__(self, kernel: KernelState) -> None:
        """Raises KeyError: the sensor is not loaded. Raises OSError: a table cannot be mapped."""
        self._kernel = kernel
        self._settings = kernel.table(
            "profile_settings", size_of("profile_settings"), writable=True
        )
        self._counts = kernel.table("profile_counts", size_of("profile_counts") * kernel.cpus)
        self._active = 0
        self._before = [Counter[str](), Counter[str]()]

    def switch(self) -> Period | None:
        """What came since the last time; the other set is filled from now on.

        None if samples are being taken and do not end: it is all in the next period.
        """
        filled = self._active
        self._fill(1 - filled)
        if not self._is_quiet(filled):
            self._fill(filled)
            return None
        return self._take(filled)

    def last(self) -> Period:
        """The same at the end, when no more samples are taken."""
        self._is_quiet(self._active)
        return self._take(self._active)

    def _fill(self, chosen: int) -> None:
        self._settings[:8] = chosen.to_bytes(8, "little")
        self._active = chosen

    def _is_quiet(self, chosen: int) -> bool:
        """Whether every sample that has begun in a set has ended."""
        deadline = time.monotonic() + _QUIET_SECONDS
        while time.monotonic() < deadline:
            # Also for what a processor has seen, and the others not yet.
            time.sleep(_LOOK_SECONDS)
            ended = self._sums(chosen)["ended"]
            if self._sums(chosen)["begun"] == ended:
                return True
        return False

    def _sums(self, chosen: int) -> Counter[str]:
        sums = Counter[str]()
        for cpu in range(self._kernel.cpus):
            words = _SET.unpack_from(self._counts, (2 * cpu + chosen) * _SET.size)
            sums.update({name: words[at] for name, at in _AT.items() if name != "pad"})
        return sums

    def _take(self, chosen: int) -> Period:
        now = self._sums(chosen)
        new, self._before[chosen] = now - self._before[chosen], now
        stacks: list[Sampled] = []
        try:
            stacks = list(self._stacks(chosen))
        except (OSError, StreamerError) as error:  # counted as lost, with what is read of them
            _log.warning("samples of the profile cannot be read: %s", error)
        return Period(stacks, new["taken"], new["idle"], new["filtered"])

    def _stacks(self, chosen: int) -> Iterator[Sampled]:
        samples = self._kernel.take(f"profile_samples_{chosen}")
        places: dict[int, Stack] = {}
        for table, base in (("stacks", 0), ("collided", _COLLIDED)):
            for key, value in self._kernel.take(f"profile_{table}_{chosen}"):
                places[base + int.from_bytes(key, "little")] = addresses_of(value)
        for key, value in samples:
            yield sampled(key, int.from_bytes(value, "little"), places)


def addresses_of(value: bytes) -> Stack:
    """The addresses of a stack, up to the first that is 0."""
    found = memoryview(value).cast("Q").tolist()
    return tuple(found[: found.index(0)] if 0 in found else found)


def sampled(key: bytes, count: int, places: Mapping[int, Stack]) -> Sampled:
    """An entry of a table of samples; `places` are those of stacks."""
    start, cgroup, image, pid, kernel, user, user_mode, comm = _KEY.unpack(key)
    return Sampled(
        process=Process(pid, start, image),
        comm=comm.partition(b"\0")[0].decode("utf-8", "replace"),
        cgroup_id=cgroup,
        cpu_mode="user" if user_mode else "kernel",
        kernel=() if kernel == _NO_STACK else places.get(kernel),
        user=() if user == _NO_STACK else places.get(user),
        met=count,
    )


# ---------------------------------------------------------------- the records


class ProfileSummary:
    """Makes a record for each process and stack that was met."""

    kind = "profile.sample"

    def __init__(self, kernel: KernelState, envelope: Envelope) -> None:
        """Raises KeyError: the sensor is not loaded. Raises OSError: a table cannot be mapped."""
        self._envelope = envelope
        self._rate = kernel.kernel_settings.profile_hz
        self._tables = Tables(kernel)
        self._symbols = Symbols(kernel)
        self._kallsyms = kernel.kallsyms
        self._functions: KernelFunctions | None = None
        self._loaded_at: float | None = None
        self._warned = False
        self._held: Period | None = None
        self._ended = False
        self._lock = Lock()

    def hold(self) -> None:
        """Read what is left, as nothing is sampled any more, and the tables are about to go."""
        self._symbols.hurry(HURRY_SECONDS)
        with self._lock:
            self._held, self._ended = self._tables.last(), True

    def collect(self, period_ns: int) -> list[ProfileSample]:
        """The records of a period, in nanoseconds, that ends now. Takes its time: see `hold`."""
        with self._lock:
            period, self._held = self._held, None
            if not self._ended:
                period = self._tables.switch()
        if period is None or not period.taken:
            return []
        self._symbols.begin()
        chosen, rest = most(period.stacks, MOST_STACKS)
        merged = records_of(chosen, rest, self._named(chosen), self._kernel_frame)
        return [self._record(one, period, period_ns) for one in merged]

    def _named(self, stacks: Iterable[Sampled]) -> dict[Process, Named]:
        """The frames of each process, those that were met most first: time is limited."""
        addresses: dict[Process, dict[int, None]] = defaultdict(dict)
        met = Counter[Process]()
        for one in stacks:
            if one.user:
                met[one.process] += one.met
                addresses[one.process].update(dict.fromkeys(looked_up(one.user)))
        return {
            process: self._symbols.name(process, addresses[process])
            for process, _ in met.most_common()
        }

    def _kernel_frame(self, address: int) -> str:
        found = self._functions.name_at(address) if self._functions is not None else None
        if found is None and self._may_reload():
            self._load_functions()
            found = self._functions.name_at(address) if self._functions is not None else None
        return found or f"[kernel]`{UNKNOWN}"

    def _load_functions(self) -> None:
        known = bool(self._functions)
        try:
            if self._kallsyms is not None:
                self._functions = KernelFunctions(self._kallsyms, lambda: self._symbols.hurried)
        except OSError as error:
            _log.warning("functions of the kernel cannot be read: %s", error.strerror)
        if self._symbols.hurried:
            return
        if not self._functions and (known or not self._warned):
            self._warned = True
            _log.warning("functions of the kernel have no names: kernel.kptr_restrict hides them")

    def _may_reload(self) -> bool:
        """Modules come and go. Only so often, because it takes a while."""
        now = time.monotonic()
        if self._loaded_at is not None and now < self._loaded_at + _RELOAD_SECONDS:
            return False
        self._loaded_at = now
        return True

    def _record(self, one: Counted, period: Period, period_ns: int) -> ProfileSample:
        return self._envelope.record(
            ProfileSample,
            period_ns=period_ns,
            **one.record._asdict(),
            count=one.met,
            rate_hz=self._rate,
            modules=one.modules,
            taken=period.taken,
            idle=period.idle,
            filtered=period.filtered,
            lost=period.lost,
        )


def records_of(
    stacks: Iterable[Sampled],
    rest: int,
    named: Mapping[Process, Named],
    kernel_frame: KernelFrame,
) -> list[Counted]:
    """The records of `stacks`, and one for those beyond `MOST_RECORDS` and `rest` samples more.

    At least one, which says how many samples were taken.
    """
    counts, modules = Counter[Record](), dict[Record, Mapping[str, str]]()
    for one in stacks:
        names = named.get(one.process, NOTHING)
        record = record_of(one, names, kernel_frame)
        counts[record] += one.met
        modules[record] = names.build_ids
    made = [
        Counted(one, met, _modules_in(one.frames, modules[one]))
        for one, met in counts.most_common(MOST_RECORDS)
    ]
    others = counts.total() - sum(one.met for one in made) + rest
    if others or not made:
        made.append(Counted(Record(0, 0, "", 0, "other", (OTHER,), (), False), others, {}))
    return made


def _modules_in(frames: Iterable[str], build_ids: Mapping[str, str]) -> dict[str, str]:
    named = {frame.partition("`")[0] for frame in frames}
    return {name: build for name, build in build_ids.items() if name in named}


def most(stacks: list[Sampled], number: int) -> tuple[list[Sampled], int]:
    """The `number` of them that were met most, and how often the others were."""
    ordered = sorted(stacks, key=lambda one: one.met, reverse=True)
    return ordered[:number], sum(one.met for one in ordered[number:])


def looked_up(stack: Stack) -> Iterator[int]:
    """The addresses by which functions are found.

    All but the innermost are where a call returns to, which can be behind the end of a function
    that does not expect it.
    """
    yield from stack[:1]
    yield from (address - 1 for address in stack[1:])


def record_of(one: Sampled, names: Named, kernel_frame: KernelFrame) -> Record:
    """The record that samples go into, from the outermost function on."""
    user = [LOST] if one.user is None else _frames(one.user, names.frames)
    in_kernel = [LOST] if one.kernel is None else [kernel_frame(at) for at in looked_up(one.kernel)]
    frames = [*reversed(user), *reversed(in_kernel)]
    deep = any(len(stack or ()) >= DEPTH for stack in (one.user, one.kernel))
    kept = innermost(frames, MOST_CHARACTERS)
    return Record(
        pid=one.process.pid,
        start_boot_ns=one.process.start_boot_ns,
        comm=one.comm,
        cgroup_id=one.cgroup_id,
        cpu_mode=one.cpu_mode,
        frames=tuple(kept),
        truncated=("frames",) if deep or len(kept) < len(frames) else (),
        incomplete=one.user is None or one.kernel is None,
    )


def _frames(stack: Stack, frames: Mapping[int, str]) -> list[str]:
    return [frames.get(address, UNKNOWN) for address in looked_up(stack)]


def innermost(frames: list[str], characters: int) -> list[str]:
    """As many of the last frames as have so many characters together."""
    for i in range(len(frames) - 1, -1, -1):
        characters -= len(frames[i])
        if characters < 0:
            return frames[i + 1 :]
    return frames
