"""What an object's programs and maps say of themselves: see `bpf/core/tags.h`."""

from __future__ import annotations

from collections.abc import Iterator

from streamer.errors import ContractError
from streamer.kernel.btf import Btf
from streamer.kernel.contract import dotted, kind_names, summary_names
from streamer.kernel.tags import MapInfo, ProgramInfo, SensorInfo

_PLAIN_NEEDS = (
    *("x86_64", "aarch64", "own btf", "fentry", "no fentry"),
    *("interface", "cgroup", "rate", "functions"),
)
_GIVEN_BY = ("function:", "no function:", "variable:", "option:")
_SIZES = ("cpus", "cpus,kinds", "cpus,slots", "cpus,interfaces", "bulk_rings")
_TABLES = ("table:", "cpus,table:")
_CORE, _SENSORS = "core", "sensors"
_PROGRAM_TAGS = ("emits", "completes", "keeps", "lacks", "hook", "needs")


def read_sensor(name: str, btf: Btf, core: SensorInfo | None) -> SensorInfo:
    """The sensor of that name; `core` is the object whose maps it shares, unless it is that.

    Raises:
        ContractError: a tag that makes no sense, with the program or map that has it.
    """
    maps = tuple(sorted(_maps(name, btf)))
    made_by_core = {m.name for m in (maps if core is None else core.maps)}
    for one in maps:
        if one.shared and one.name not in made_by_core:
            raise _mistake(name, one.name, "SHARED, and the object core has no such map")
    return SensorInfo(name, tuple(_programs(name, btf)), maps)


def _programs(sensor: str, btf: Btf) -> Iterator[ProgramInfo]:
    known = {dotted(kind) for kind in kind_names(btf) | summary_names(btf)}
    for type_id, name in btf.functions():
        tags = {key: btf.tag(type_id, key) for key in _PROGRAM_TAGS}
        if not any(tags.values()):
            continue
        kinds, needs = _words(tags["emits"] or tags["completes"]), _words(tags["needs"])
        keeps = _words(tags["keeps"])
        if bool(tags["emits"]) == bool(tags["completes"]):
            raise _mistake(sensor, name, "one of EMITS and COMPLETES is to be there")
        for kind in (*kinds, *keeps):
            if kind not in known:
                raise _mistake(sensor, name, f'"{kind}" is no kind')
        _check_needs(sensor, name, needs)
        covers = btf.tag(type_id, "doc") or ""
        if tags["completes"] and not covers:
            raise _mistake(sensor, name, "COMPLETES without DOC")
        hook, reports, lacks = tags["hook"] or name, bool(tags["emits"]), tags["lacks"] or ""
        run = btf.tag(type_id, "run") is not None
        yield ProgramInfo(name, hook, kinds, covers, needs, reports, keeps, lacks, run)


def _maps(sensor: str, btf: Btf) -> Iterator[MapInfo]:
    for type_id, name in btf.variables():
        sized, shared = btf.tag(type_id, "sized"), btf.tag(type_id, "shared")
        names = btf.tag(type_id, "named") or ""
        needs = _words(btf.tag(type_id, "needs"))
        _check_needs(sensor, name, needs)
        if sized is not None and sized not in _SIZES and not _named(sized, _TABLES):
            raise _mistake(sensor, name, f'SIZED("{sized}"), which tags.h does not know')
        if shared not in (None, _CORE, _SENSORS):
            raise _mistake(sensor, name, f"shared by {shared}, and only {_CORE} shares")
        if sized is not None or shared is not None or needs or names:
            common = shared == _SENSORS
            yield MapInfo(name, sized or "", shared == _CORE, needs, common, names)


def _check_needs(sensor: str, name: str, needs: tuple[str, ...]) -> None:
    for need in needs:
        if need not in _PLAIN_NEEDS and not _named(need, _GIVEN_BY):
            raise _mistake(sensor, name, f'NEEDS("{need}"), which tags.h does not know')


def _words(tag: str | None) -> tuple[str, ...]:
    return tuple(tag.split(",")) if tag else ()


def _named(word: str, prefixes: tuple[str, ...]) -> bool:
    return any(word.startswith(prefix) and word != prefix for prefix in prefixes)


def _mistake(sensor: str, name: str, trouble: str) -> ContractError:
    return ContractError(f"{sensor}.bpf.c: {name}: {trouble}")
