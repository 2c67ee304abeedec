"""A privileged helper whose loader keeps maps in memory: `python -I -S FILE DESCRIPTOR`.

Protocol, files, /proc and confinement are the real ones, and no kernel support is needed.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from streamer.errors import KernelError
from streamer.kernel.loader import Attached, Loaded, ProgramState, Transport
from streamer.kernel.processes import Located, locate, open_module
from streamer.kernel.types import KernelTypes
from streamer.privilege.helper import main

MANY = 1 << 16


class MemoryLoader:
    """Sensors: `good` loads; `bad` is refused by the kernel; `broken` shows a defect of ours."""

    cpus = 1
    no_functions = "none here"
    transport = Transport("perf", {"bulk": 4096}, "there are no rings")
    filters_packets = False
    types = KernelTypes()

    def __init__(self) -> None:
        self.maps: dict[str, dict[bytes, bytes]] = {"small": {}, "empty": {}}
        self.maps["large"] = {i.to_bytes(4, "little"): bytes([i % 251] * 24) for i in range(MANY)}

    def prepare(self, headers: str) -> None:
        pass

    def load_core(
        self, rings: Mapping[str, int], btf: str | None, transport: str = "auto"
    ) -> dict[str, int]:
        told = {b"ring": repr(dict(rings)), b"btf_": repr(btf), b"tran": repr(transport)}
        self.maps["told"] = {key: text.encode().ljust(300) for key, text in told.items()}
        return {name: os.open("/proc/self/status", os.O_RDONLY) for name in rings}

    def open_buffers(self, cpu: int) -> dict[str, int]:
        if cpu:
            return {}
        return {ring: os.open("/proc/self/stat", os.O_RDONLY) for ring in ("critical", "bulk")}

    def load(self, sensor: str, options: Mapping[str, int]) -> Loaded:
        if sensor == "bad":
            raise KernelError("the verifier said no")
        if sensor == "broken":
            raise ZeroDivisionError
        state = ProgramState("on_good", "raw_tp/good", "raw_tp", "loaded", "")
        fds = {name: os.open("/proc/self/stat", os.O_RDONLY) for name in options}
        return Loaded([state], fds)

    def attach(self, sensor: str) -> Attached:
        state = ProgramState("on_good", "raw_tp/good", "raw_tp", "attached", "")
        return Attached([state], {"on_good": os.open("/proc/self/stat", os.O_RDONLY)})

    def run(self, sensor: str) -> None:
        self.maps.setdefault("runs", {})[sensor.encode()] = b"run"

    def unload(self, sensor: str) -> None:
        pass

    def detach(self, sensor: str) -> None:
        pass

    def run_program(self, sensor: str, program: str, repeat: int) -> int:
        return repeat

    def update(self, map: str, key: bytes, value: bytes) -> None:
        self._map(map)[key] = value

    def delete(self, map: str, key: bytes) -> None:
        if self._map(map).pop(key, None) is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    def read(self, map: str) -> Iterator[tuple[bytes, bytes]]:
        yield from self._map(map).items()

    def take(self, map: str) -> Iterator[tuple[bytes, bytes]]:
        taken = self._map(map)
        yield from [(key, taken.pop(key)) for key in list(taken)]

    def locate(self, pid: int, start: int, image: int, addresses: Sequence[int]) -> Located:
        return locate(pid, start, image, addresses)

    def open_module(self, pid: int, start: int, image: int, first: int, last: int) -> int:
        return open_module(pid, start, image, first, last)

    def close(self) -> None:
        pass

    def _map(self, name: str) -> dict[bytes, bytes]:
        if name not in self.maps:
            raise KernelError(f"no map {name}")
        return self.maps[name]


if __name__ == "__main__":
    further = [int(one) for one in sys.argv[2:]]
    sys.exit(main(int(sys.argv[1]), further, make_loader=lambda targets, workers: MemoryLoader()))
