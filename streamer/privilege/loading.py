"""What the helper has done for the worker in the kernel: the interface of a loader.

The loader is in the helper. In the worker a stand-in with the same methods asks for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, Protocol


class ProgramState(NamedTuple):
    """What became of a program. `way` is the attach type that was taken of those it has."""

    name: str
    hook: str
    way: str
    status: Literal["loaded", "attached", "failed", "spare"]
    reason: str


class Loaded(NamedTuple):
    """A sensor's programs, and the descriptors of the maps that are its own."""

    programs: list[ProgramState]
    maps: dict[str, int]


class Loader(Protocol):
    """Loads the core object, then sensors. Every method raises KernelError or OSError."""

    def load_core(self, rings: Mapping[str, int], btf: str | None) -> dict[str, int]:
        """Load what all sensors share; `rings` are sizes in bytes. Maps and their descriptors."""

    def load(self, sensor: str, options: Mapping[str, int]) -> Loaded:
        """Load a sensor, with sizes of tables and settings that are on (1). Attaches nothing."""

    def attach(self, sensor: str) -> list[ProgramState]:
        """Attach a loaded sensor's programs."""

    def unload(self, sensor: str) -> None:
        """Detach a sensor and release it."""

    def update(self, map: str, key: bytes, value: bytes) -> None:
        """Set an element of a map."""

    def delete(self, map: str, key: bytes) -> None:
        """Remove an element of a map."""

    def read(self, map: str) -> Iterable[tuple[bytes, bytes]]:
        """Keys and values of a map."""

    def missed(self) -> dict[str, int]:
        """Per program, how many of its runs the kernel left out."""

    def close(self) -> None:
        """Detach and release everything."""
