"""What the commands `events` and `schema` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from streamer.config.selection import select
from streamer.errors import ConfigError
from streamer.events.catalogue import SELECTABLE
from streamer.events.layout import KindInfo
from streamer.events.stream import STREAM_KINDS
from streamer.kernel.objects import SENSORS
from streamer.terminal.lines import printable


def named(known: Mapping[str, KindInfo], kind: str) -> KindInfo:
    """The kind of that name.

    Raises:
        ConfigError: there is none; the message lists them.
    """
    if kind not in known:
        raise ConfigError(f"{kind!r} is no kind of event, allowed: {', '.join(known)}")
    return known[kind]


def kinds_text(kinds: Sequence[KindInfo]) -> str:
    """The table of kinds: ring, whether it is on by default, meaning."""
    rows = [[info.kind, info.ring, _default(info.kind), info.doc] for info in kinds]
    return table(["kind", "ring", "default", "meaning"], rows)


def kind_text(info: KindInfo) -> str:
    """A kind with the table of its fields."""
    rows = [[field.name, field.type, field.doc] for field in info.fields]
    when = {"always": "always on", "on": "on by default", "off": "off by default"}
    head = f"{info.kind} ({info.ring}, {when[_default(info.kind)]}): {info.doc}"
    unseen = [f"Never observed: {'; '.join(info.unseen)}."] if info.unseen else []
    return "\n\n".join([head, *unseen, table(["field", "type", "meaning"], rows)])


def kinds_data(kinds: Sequence[KindInfo]) -> list[dict[str, Any]]:
    """The kinds and their fields as plain data."""
    return [
        {
            "kind": info.kind,
            "ring": info.ring,
            "default": _default(info.kind) != "off",
            "doc": info.doc,
            "unseen": info.unseen,
            "programs": _programs_of(info.kind),
            "fields": [field._asdict() for field in info.fields],
        }
        for info in kinds
    ]


def _programs_of(kind: str) -> list[str]:
    programs = (program for sensor in SENSORS.values() for program in sensor.programs)
    return [program.name for program in programs if kind in program.kinds]


def json_text(value: object) -> str:
    """`value` as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Left-aligned columns with two spaces between them; each row is one line."""
    lines = [heads, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _default(kind: str) -> str:
    if kind in STREAM_KINDS:
        return "always"
    return "on" if kind in select((), SELECTABLE) else "off"
