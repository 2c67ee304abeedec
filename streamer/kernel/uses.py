"""What the compiled objects use of a kernel: types of programs and maps, helpers, places.

Read from the objects themselves, so that none of it is written down twice. Helpers are the calls
in a program's instructions and in those of the functions that it calls. Of some there are several
ways to the same thing, of which a kernel needs only one: what is used here is all that is tried.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from streamer.errors import ContractError
from streamer.kernel.instructions import Calls
from streamer.kernel.libbpf import PERF_EVENT_ARRAY, Object
from streamer.kernel.loader import CORE, OBJECTS
from streamer.kernel.objects import SENSORS
from streamer.kernel.tags import RINGS, ProgramInfo, SensorInfo
from streamer.kernel.types import WITHOUT_BTF

_SUFFIX = ".bpf.o"


class ProgramUse(NamedTuple):
    """A program of an object. `type` and `attach` are numbers of the kernel's enums."""

    section: str
    type: int
    attach: int
    helpers: frozenset[int]
    info: ProgramInfo | None
    """None of what is run once, and attached nowhere."""


class MapUse(NamedTuple):
    """A sort of map, and an object that has one. `type` is the number of the kernel's enum."""

    type: int
    flags: int
    path: str
    name: str


class Uses(NamedTuple):
    """What objects use."""

    programs: tuple[ProgramUse, ...]
    maps: tuple[MapUse, ...]
    """One of each type with the same flags."""


def uses_of(directory: str = OBJECTS, sensors: Mapping[str, SensorInfo] = SENSORS) -> Uses:
    """What the objects of `sensors` use that are in the directory, or below it.

    Raises:
        ContractError: an object cannot be read.
    """
    programs: list[ProgramUse] = []
    maps: dict[tuple[int, int], MapUse] = {}
    for path in sorted(Path(directory).rglob(f"*{_SUFFIX}")):
        sensor = sensors.get(path.name.removesuffix(_SUFFIX))
        if sensor is None:
            continue
        try:
            used, made = _uses_of_object(path, sensor)
        except (OSError, struct.error, IndexError, ValueError) as error:
            raise ContractError(f"cannot read the BPF object {path}: {error}") from None
        programs += used
        # Those for kernels without BTF have no functions of the kernel's, which libbpf looks for in
        # its BTF even where no program is loaded.
        anywhere = path.parent.name == WITHOUT_BTF
        for one in made:
            if anywhere or (one.type, one.flags) not in maps:
                maps[one.type, one.flags] = one
    return Uses(tuple(programs), tuple(maps.values()))


def _uses_of_object(path: Path, sensor: SensorInfo) -> tuple[list[ProgramUse], list[MapUse]]:
    helpers = Calls(path.read_bytes()).helpers()
    infos = {info.name: info for info in sensor.programs}
    opened = Object(path)
    try:
        programs = [
            ProgramUse(
                program.section, program.type, program.attach_type, helpers[name], infos.get(name)
            )
            for name, program in opened.programs.items()
            if name in infos or sensor.name == CORE
        ]
        made = {name: one for name, one in opened.maps.items() if not one.internal}
        maps = [MapUse(one.type, one.flags, os.fspath(path), name) for name, one in made.items()]
        # What a ring becomes where the kernel refuses ring buffers.
        maps += [
            MapUse(PERF_EVENT_ARRAY, 0, one.path, one.name) for one in maps if one.name in RINGS
        ]
    finally:
        opened.close()
    return programs, maps
