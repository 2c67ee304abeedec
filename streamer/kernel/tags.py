"""What programs and maps say of themselves in `bpf/core/tags.h`, as `objects.py` has it.

Plain tuples of plain values: the privileged process reads them, and imports little.
"""

from __future__ import annotations

from typing import NamedTuple

RINGS = ("critical", "bulk")
"""In the order of `RING_CRITICAL` and so on in `bpf/core/settings.h`."""


class ProgramInfo(NamedTuple):
    """A BPF program.

    Programs of one `hook` are ways to the same thing, best first. `kinds` is what it reports, or
    only completes where it does not report (`reports`), and `covers` what is not observed without
    it: empty where that is all of its kinds. It is used only where all of `needs` is given: see
    `bpf/core/tags.h`. `keeps` are kinds of another sensor that use what it keeps, and `lacks` is
    what is not observed where it is the way that is used. One that is to `run` is never attached:
    the agent runs it.
    """

    name: str
    hook: str
    kinds: tuple[str, ...]
    covers: str = ""
    needs: tuple[str, ...] = ()
    reports: bool = True
    keeps: tuple[str, ...] = ()
    lacks: str = ""
    run: bool = False


class MapInfo(NamedTuple):
    """A map that says something of itself.

    `sized` is what its number of entries follows: `cpus`, `cpus,kinds`, `cpus,interfaces`,
    `table:NAME`, `cpus,table:NAME`, or nothing. A `shared` one is made by the object `core` and
    used by all. It is made where all of `needs` is given, as a program is used. A `common` one is
    made with the first sensor that has it, and used by all that have. `names` is the enum of the
    kernel whose names it holds, by number.
    """

    name: str
    sized: str = ""
    shared: bool = False
    needs: tuple[str, ...] = ()
    common: bool = False
    names: str = ""


class SensorInfo(NamedTuple):
    """A compiled object, `NAME.bpf.o`: its programs in the order of its source, and its maps."""

    name: str
    programs: tuple[ProgramInfo, ...] = ()
    maps: tuple[MapInfo, ...] = ()
