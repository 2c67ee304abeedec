"""The load: a BPF program that fills the real rings, paced so that nothing is lost."""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from benchmarks.measure import Shared
from streamer.agent.counters import KernelCounters
from streamer.config.settings import Rings, Settings
from streamer.events.envelope import Envelope
from streamer.kernel.contract import check_object
from streamer.kernel.libbpf import Object
from streamer.kernel.loader import Loader
from streamer.kernel.objects import CONTRACT, KIND_END, SENSORS
from streamer.kernel.state import KernelState, pack, size_of
from streamer.ring.reader import Source, open_sources

OBJECT = Path(__file__).parent.parent / "build" / "bpf" / "bench.bpf.o"
KINDS = ("file.open", "net.close")
BURST = 4096
"""Events of one run of the program: about 800 KiB, a twentieth of the default ring."""

_REQUEST = struct.Struct("<2Q")  # struct bench_request
_PROCESS = struct.Struct("<QIIII16s")  # struct bench_process
_PATH = struct.Struct("<I64s")  # struct bench_path
_WAIT = 0.0003
_OPTION = ".rodata."
_PERF_POSITIONS = 1024  # in struct perf_event_mmap_page: data_head and data_tail

Mix = Literal["open", "close", "mixed"]

COMMS = ("nginx", "postgres", "python3", "systemd", "sshd", "bash", "node", "kworker/u8:2")
PATHS = (
    "/usr/lib/x86_64-linux-gnu/libc.so.6",
    "/etc/ssl/certs/ca-certificates.crt",
    "/usr/lib/python3/dist-packages/yaml/__init__.py",
    "/var/lib/postgresql/15/main/base/16384/{:04d}",
    "/var/log/nginx/access-{:02d}.log",
    "/srv/app/releases/current/static/css/site-{:02d}.css",
    "/proc/{:04d}/status",
    "/opt/builder/.cache/pip/http/3/a/9/f/{:04d}",
)


class Ring:
    """Positions of a ring buffer, and the producer's view of what is pending."""

    def __init__(self, fd: int, size: int) -> None:
        """`size` is that of the data area, in bytes."""
        page = mmap.PAGESIZE
        self.fd = fd
        self.size = size
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)

    @property
    def pending(self) -> int:
        """Bytes written and not consumed."""
        (produced,) = struct.unpack_from("<Q", self._producer)
        (consumed,) = struct.unpack_from("<Q", self._consumer)
        return int(produced - consumed)

    def discard(self) -> None:
        """Consume everything unread: for a ring without a reader."""
        self._consumer[:8] = self._producer[:8]


class PerfBuffers:
    """The same of the perf buffers that the CPUs have in place of a ring buffer."""

    def __init__(self, fds: Iterable[int], size: int) -> None:
        """`size` is that of the data area of each, in bytes."""
        self._buffers = [mmap.mmap(fd, mmap.PAGESIZE + size) for fd in fds]

    @property
    def pending(self) -> int:
        """Bytes written and not consumed."""
        positions = (struct.unpack_from("<2Q", one, _PERF_POSITIONS) for one in self._buffers)
        return int(sum(head - tail for head, tail in positions))

    def discard(self) -> None:
        """Consume everything unread."""
        for one in self._buffers:
            at = _PERF_POSITIONS
            one[at + 8 : at + 16] = one[at : at + 8]


class _Core(Loader):
    """A loader that tells the descriptors of what it made, for whoever is to inherit them."""

    def load_core(
        self, rings: Mapping[str, int], btf: str | None, transport: str = "auto"
    ) -> dict[str, int]:
        self.descriptors = super().load_core(rings, btf, transport)
        return self.descriptors

    @property
    def options(self) -> dict[str, int]:
        """What programs are told of the rings."""
        return self._own_options()


class Load:
    """The loaded programs, with the rings and counters that they write: those of the agent."""

    def __init__(self, rings: Rings | None = None) -> None:
        """Load them, into rings of the default sizes unless given.

        Raises:
            OSError, KernelError: they cannot be loaded.
            ContractError: the object is not up to date.
        """
        check_object(OBJECT)
        self._core = _Core()
        self._state = KernelState(self._core, Settings(rings=rings or Rings()))
        self._state.enable(KINDS)
        self._be_observed()
        self._object = Object(OBJECT)
        self._prepare()
        self._object.load()
        self._fill_tables()
        self.counters = KernelCounters(
            self._state.counters, self._state.kind_counters, self._state.cpus
        )
        fds, sizes = self._core.descriptors, self._state.transport.sizes
        if self._state.transport.name == "perf":
            self._find_buffers(sizes)
            return
        self.rings = {name: Ring(fds[name], size) for name, size in sizes.items()}
        self.shared = Shared(
            {name: (ring.fd, ring.size) for name, ring in self.rings.items()},
            fds["counters"],
            fds["kind_counters"],
            fds["faults"],
            fds["reader"],
            self._state.cpus,
        )

    def _find_buffers(self, sizes: Mapping[str, int]) -> None:
        buffers = self._state.buffers.values()
        self.perf = {
            name: PerfBuffers([fds[name] for fds in buffers], size) for name, size in sizes.items()
        }

    def sources(self) -> list[Source]:
        """The rings as the agent reads them."""
        state = self._state
        return open_sources(state.transport, state.ring_fds, state.buffers, Envelope(), state.cpus)

    def discard(self, ring: str) -> None:
        """Consume everything unread."""
        if self._state.transport.name == "perf":
            self.perf[ring].discard()
        else:
            self.rings[ring].discard()

    def _be_observed(self) -> None:
        """The programs run in this process, which would be left out as the agent."""
        initial = {"initial_mntns": self._state.identity.initial_mntns}
        self._core.update("identities", bytes(4), pack("identity", initial))

    def _prepare(self) -> None:
        core, own = ({info.name: info for info in SENSORS[name].maps} for name in ("core", "file"))
        for name, one in self._object.maps.items():
            if name in self._core.descriptors:
                one.reuse(self._core.descriptors[name])
            elif name.startswith(_OPTION):
                value = self._core.options.get(name.removeprefix(_OPTION), 0)
                one.write_initial(value.to_bytes(8, "little"))
            elif name in core and core[name].needs:
                one.leave_out()  # or it would be among the descriptors
            elif name in own and own[name].needs:
                one.leave_out()  # an option, which is off
            elif name in own and own[name].sized == "cpus":
                one.resize(self._state.cpus)
        for program in self._object.programs.values():
            program.autoload(program.name.startswith("bench_"))

    def _fill_tables(self) -> None:
        maps = self._object.maps
        for i, value in enumerate(processes()):
            maps["bench_processes"].update(i.to_bytes(4, "little"), value)
        for i, path in enumerate(paths()):
            maps["bench_paths"].update(i.to_bytes(4, "little"), _PATH.pack(len(path), path))

    def run(self, program: str, events: int, fd: int = 0) -> int:
        """Run a program of `bench.bpf.c` once, in the calling task; its return value."""
        request = _REQUEST.pack(events, fd)
        self._object.maps["bench_requests"].update(bytes(4), request)
        return self._object.programs[f"bench_{program}"].run()

    def emit(self, mix: Mix, events: int, alive: Callable[[], bool] = lambda: True) -> None:
        """Emit so many events as fast as the reader makes room: nothing is lost, and the reader
        never waits long. Gives up when `alive` turns false.
        """
        ring = self.rings["bulk"]
        while events and alive():
            if ring.pending > ring.size // 2:
                time.sleep(_WAIT)
                continue
            burst = min(BURST, events)
            self.run(mix, burst)
            events -= burst

    def emit_paced(self, mix: Mix, per_second: int, seconds: float) -> int:
        """Emit at a steady rate, a millisecond's worth at a time; how many events."""
        start, emitted = time.monotonic(), 0
        while (elapsed := time.monotonic() - start) < seconds:
            due = int(elapsed * per_second) - emitted
            if due > 0:
                self.run(mix, due)
                emitted += due
            time.sleep(0.001)
        return emitted

    def produced(self) -> int:
        """Events that the programs produced so far, those lost among them."""
        return sum(produced for produced, *_ in self.counters.of_kinds().values())

    def lost(self) -> int:
        """Events that found no room."""
        return sum(lost for *_, lost in self.counters.of_kinds().values())

    def close(self) -> None:
        """Release everything."""
        self._object.close()
        self._state.close()


class Counters:
    """The counters of the load, mapped: what `KernelState` has of the same names."""

    def __init__(self, shared: Shared) -> None:
        """Map them."""
        cpus = shared.cpus
        self.counters = _mapped(shared.counters_fd, size_of("cpu_counters") * cpus)
        self.kind_counters = _mapped(
            shared.kind_counters_fd, size_of("kind_counters") * cpus * KIND_END
        )
        self.faults = _mapped(shared.faults_fd, 8 * len(CONTRACT["enum fault"]))


def _mapped(fd: int, size: int) -> mmap.mmap:
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    return mmap.mmap(fd, pages, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)


def processes() -> Iterable[bytes]:
    """The processes that events are ascribed to, as `struct bench_process`."""
    for i in range(16):
        comm = COMMS[i % len(COMMS)].encode()
        user = (0, 33, 1000, 107)[i % 4]
        yield _PROCESS.pack(4000 + 37 * i, 1000 + 211 * i, 1 + 900 * (i % 2), user, 0, comm)


def paths() -> Iterable[bytes]:
    """The paths that are opened, of 17 to 54 bytes."""
    for i in range(64):
        yield PATHS[i % len(PATHS)].format(1000 + i).encode()
