"""What is asked of a loader (`kernel/loader.py`), in the helper or through it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from streamer.kernel.loader import Attached, Loaded, Transport
from streamer.kernel.processes import Located
from streamer.kernel.types import KernelTypes


class LoaderLike(Protocol):
    """A `Loader`, or the worker's stand-in for one. See `Loader` for what each method does."""

    cpus: int
    no_functions: str
    transport: Transport
    types: KernelTypes

    def load_core(
        self, rings: Mapping[str, int], btf: str | None, transport: str = "auto"
    ) -> dict[str, int]:
        """Load what all sensors share; maps and their descriptors."""

    def open_buffers(self, cpu: int) -> dict[str, int]:
        """Descriptors of a CPU's perf buffers."""

    def load(self, sensor: str, options: Mapping[str, int]) -> Loaded:
        """Load a sensor."""

    def attach(self, sensor: str) -> Attached:
        """Attach a loaded sensor's programs."""

    def unload(self, sensor: str) -> None:
        """Detach and release a sensor."""

    def run(self, sensor: str) -> None:
        """Run what a sensor has to be run every second."""

    def detach(self, sensor: str) -> None:
        """Detach a sensor's programs, and keep them."""

    def run_program(self, sensor: str, program: str, repeat: int) -> int:
        """Run a program of a sensor so often; what it returned at last."""

    def update(self, map: str, key: bytes, value: bytes) -> None:
        """Set an element of a map."""

    def delete(self, map: str, key: bytes) -> None:
        """Remove an element of a map."""

    def read(self, map: str) -> Iterable[tuple[bytes, bytes]]:
        """Keys and values of a map."""

    def take(self, map: str) -> Iterable[tuple[bytes, bytes]]:
        """Keys and values of a map, which is empty afterwards."""

    def locate(self, pid: int, start: int, image: int, addresses: Sequence[int]) -> Located:
        """Where code of a process is."""

    def open_module(self, pid: int, start: int, image: int, first: int, last: int) -> int:
        """A descriptor of a mapped file."""

    def close(self) -> None:
        """Detach and release everything."""
