"""What a configuration that was read anew changes in a run, and what it may not change: pure.

`reloading.py` does what is planned here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any, NamedTuple

import msgspec

from streamer.config.settings import AnySink, Settings, spool_mode, with_budgets
from streamer.events.summaries import SUMMARIES
from streamer.kernel.flows import KIND as FLOWS
from streamer.kernel.loader import Targets
from streamer.kernel.objects import SENSORS
from streamer.kernel.state import sensors_of
from streamer.privilege.files import NamedFile
from streamer.privilege.named import files_of_sink

CHANGEABLE = frozenset(
    (
        *("events", "filters", "sinks", "kernel.sample", "log_level"),
        *("heartbeat_seconds", "summary_seconds", "grace_seconds"),
    )
)
"""Keys, and sections, that a run can change. All others are `FIXED`."""

_PRIVILEGES = "it takes privileges, which the agent has given up"
_LOADED = "it is a constant, or the size of a table, of programs that are loaded"
_TARGET = "what programs may attach to was told to the helper at the start, and to no more"
_RINGS = "the rings were made like this, and are read like this"
_LISTENS = "the agent listens since its start, and has given up the privileges for another place"
FIXED: Mapping[str, str] = {
    "host": "the events of a run all have the name that it began with",
    "btf": "programs were loaded with it",
    "rfc3339_time": "the decoders were made with it",
    "user": _PRIVILEGES,
    "workers": "the processes were started with privileges",
    "oom_score_adj": _PRIVILEGES,
    "nice": _PRIVILEGES,
    "state_file": _PRIVILEGES,
    "rings": _RINGS,
    "kernel": _LOADED,
    "kernel.headers": "programs were loaded with them",
    "kernel.dns_redact": "the decoders were made with it",
    "kernel.interfaces": _TARGET,
    "kernel.syscalls": _TARGET,
    "kernel.profile_hz": _TARGET,
    "timing": "the decoders were made with it, and its key read with privileges",
    "metrics": _LISTENS,
    "control": _LISTENS,
    "spool": "the spool was opened with privileges, at the start",
    "shedding": "what is measured, and the rates, are those of the start",
}
"""Why a setting, or a section, cannot be changed while the agent runs."""

_OF_WORKERS = "several workers have it from the start of a run to its end (workers)"
_SPOOL = "what has a spool has it from the start of a run to its end"
_TABLES = "what counts it is set up at the start, and read until the end"
_UNTOLD = "the privileged helper opens only what it was told of at the start: "
_OF_TARGETS = ("interface", "cgroup", "functions", "rate")


class Refusal(NamedTuple):
    """A setting that cannot be what it is to be, and why not."""

    key: str
    reason: str

    def __str__(self) -> str:
        """As it is logged."""
        return f"{self.key}: {self.reason}"


class Running(NamedTuple):
    """What a run goes by, and what it can do without its privileges."""

    settings: Settings
    kinds: Set[str]
    sensors: Mapping[str, Set[str]]
    """Those that are loaded, each with the kinds that were wanted when it was."""
    targets: Mapping[str, Targets]
    """What the helper was told that sensors attach to."""
    files: Set[NamedFile]
    """What the helper was told that it may open."""
    at_functions: bool = True
    """Whether programs at functions (fentry) load."""


class Wanted(NamedTuple):
    """What the configuration says now. Paths of sinks that are relative are so to `directory`."""

    settings: Settings
    kinds: Set[str]
    directory: str = "/"


class Plan(NamedTuple):
    """What there is to do. `changes` says it in words, one for each; none: nothing has changed."""

    changes: tuple[str, ...] = ()
    filters: bool = False
    """Whether they are others."""
    load: tuple[str, ...] = ()
    unload: tuple[str, ...] = ()
    """Sensors."""
    kept: tuple[int | None, ...] = ()
    """For each of the new sinks, which of the old ones it is; None: it has to be made."""


def plan(running: Running, wanted: Wanted) -> Plan | list[Refusal]:
    """What leads from the one to the other, or all that forbids it."""
    kept = _kept(running.settings.sinks, wanted.settings.sinks)
    refused = [
        *_fixed(running.settings, wanted.settings),
        *_kinds(running, wanted.kinds),
        *_sinks(running, wanted, kept),
    ]
    if refused:
        return refused
    loaded, needed = list(running.sensors), sensors_of(wanted.kinds)
    return Plan(
        changes=tuple(_changes(running, wanted, kept)),
        filters=running.settings.filters != wanted.settings.filters,
        load=tuple(one for one in needed if one not in loaded),
        unload=tuple(one for one in loaded if one not in needed),
        kept=kept,
    )


# ---------------------------------------------------------------- settings


def differing(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """The keys, as `kernel.sample`, in which two sections are not the same."""
    for name in old.__struct_fields__:
        one, other = getattr(old, name), getattr(new, name)
        if one == other:
            continue
        if isinstance(one, msgspec.Struct) and type(one) is type(other):
            yield from differing(one, other, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def why_fixed(key: str) -> str:
    """Why a key cannot be changed; empty: it can."""
    section = key.partition(".")[0]
    if not CHANGEABLE.isdisjoint((key, section)):
        return ""
    return FIXED.get(key) or FIXED[section]


def _fixed(old: Settings, new: Settings) -> Iterator[Refusal]:
    for key in differing(old, new):
        reason = why_fixed(key)
        if reason:
            yield Refusal(key, reason)


# ---------------------------------------------------------------- kinds


def _kinds(running: Running, wanted: Set[str]) -> Iterator[Refusal]:
    for kind in sorted(running.kinds ^ wanted):
        if kind in SUMMARIES or kind == FLOWS:
            yield Refusal("events", f"{kind}: {_TABLES}")
        elif kind in wanted:
            reason = _why_not_on(running, kind)
            if reason:
                yield Refusal("events", f"{kind}: {reason}")


def _why_not_on(running: Running, kind: str) -> str:
    """Why a kind cannot be observed from now on; empty: it can."""
    absent = "fentry" if not running.at_functions else "no fentry"
    for sensor in sensors_of([kind]):
        for program in SENSORS[sensor].programs:
            if kind not in program.kinds or absent in program.needs:
                continue
            if sensor in running.sensors:
                options = {f"option:kind.{one}" for one in running.sensors[sensor]}
                needs = {need for need in program.needs if need.startswith("option:kind.")}
                if not needs <= options:
                    return f"its programs are part of {sensor}, which is loaded without them"
                continue
            given = set(running.targets.get(sensor, Targets()).given())
            for need in program.needs:
                if need in _OF_TARGETS and need not in given:
                    return f"it attaches by {need}, and {_TARGET}"
    return ""


# ---------------------------------------------------------------- sinks


def _core(sink: AnySink) -> AnySink:
    """Without what can change while it runs."""
    return msgspec.structs.replace(sink, budget_bytes=None, on_full="auto")


def _kept(old: tuple[AnySink, ...], new: tuple[AnySink, ...]) -> tuple[int | None, ...]:
    left = dict(enumerate(map(_core, old)))
    kept: list[int | None] = []
    for sink in map(_core, new):
        found = next((i for i, one in left.items() if one == sink), None)
        if found is not None:
            del left[found]
        kept.append(found)
    return tuple(kept)


def _gone(running: Running, kept: tuple[int | None, ...]) -> list[AnySink]:
    return [sink for i, sink in enumerate(running.settings.sinks) if i not in kept]


def _sinks(running: Running, wanted: Wanted, kept: tuple[int | None, ...]) -> Iterator[Refusal]:
    for sink in _gone(running, kept):
        if running.settings.workers > 1:
            yield Refusal("sinks", f"{sink.name}: {_OF_WORKERS}")
        if spool_mode(sink) != "off":
            yield Refusal("sinks", f"{sink.name}: {_SPOOL}")
    for index, (sink, found) in enumerate(zip(wanted.settings.sinks, kept, strict=True)):
        key = f"sinks[{index}]"
        if found is None:
            yield from _to_make(running, wanted, sink, key)
            continue
        before = running.settings.sinks[found]
        if spool_mode(sink) != "off" and before.budget_bytes != sink.budget_bytes:
            yield Refusal(f"{key}.budget_bytes", "it is shared out between sink and spool")
        if running.settings.workers > 1 and _core(sink) == _core(before) and sink != before:
            yield Refusal(key, _OF_WORKERS)
    names = [sink.name for sink in wanted.settings.sinks]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Refusal(f"sinks[{index}]", f"found the same one twice: {name}")


def _to_make(running: Running, wanted: Wanted, sink: AnySink, key: str) -> Iterator[Refusal]:
    if running.settings.workers > 1:
        yield Refusal(key, _OF_WORKERS)
    if spool_mode(sink) != "off":
        yield Refusal(f"{key}.spool", _SPOOL)
    paths = {file.path: file for file in running.files if file.use == "append"}
    for file in files_of_sink(sink, wanted.directory):
        if file in running.files:
            continue
        if file.use == "append" and file.path in paths:
            yield Refusal(f"{key}.mode", f"{_UNTOLD}{file.path} with mode "
                          f"0{paths[file.path].bits:03o}")  # fmt: skip
        else:
            yield Refusal(key, f"{_UNTOLD}not {file.path}")


# ---------------------------------------------------------------- in words


def _changes(running: Running, wanted: Wanted, kept: tuple[int | None, ...]) -> Iterator[str]:
    old, new = running.settings, wanted.settings
    yield from (f"events: {kind} off" for kind in sorted(running.kinds - wanted.kinds))
    yield from (f"events: {kind} on" for kind in sorted(wanted.kinds - running.kinds))
    yield from (key for key in differing(old, new) if key not in ("events", "sinks"))
    made = [sink for sink, found in zip(new.sinks, kept, strict=True) if found is None]
    gone = {sink.name for sink in _gone(running, kept)}
    yield from (f"sinks: {name} gone" for name in sorted(gone - {sink.name for sink in made}))
    for sink in made:
        yield f"sinks: {sink.name} {'changed' if sink.name in gone else 'new'}"
    budgets = with_budgets(old.sinks), with_budgets(new.sinks)
    for index, (sink, found) in enumerate(zip(new.sinks, kept, strict=True)):
        if found is None:
            continue
        if spool_mode(sink) == "off" and budgets[0][found].budget != budgets[1][index].budget:
            yield f"sinks: {sink.name} holds {budgets[1][index].budget} bytes"
        if old.sinks[found].on_full != sink.on_full:
            yield f"sinks: {sink.name} on_full"
