"""What the commands `check`, `events` and `schema` print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import inspect

from streamer.config.selection import select
from streamer.errors import ConfigError
from streamer.events.kinds import KINDS
from streamer.events.layout import FieldInfo, KindInfo
from streamer.events.stream import STREAM_KINDS
from streamer.kernel.objects import SENSORS
from streamer.terminal.lines import printable

if TYPE_CHECKING:
    from streamer.kernel.report import CheckReport

DEGRADED = 1
"""Exit code of `check` when a part of what was asked for cannot be observed."""

NOTHING = 3
"""Exit code of `check` when nothing of what was asked for can be observed."""

_TYPE_WORDS: Mapping[type[inspect.Type], str] = {
    inspect.IntType: "integer",
    inspect.FloatType: "number",
    inspect.BoolType: "boolean",
    inspect.StrType: "string",
    inspect.LiteralType: "string",
    inspect.DictType: "object",
    inspect.StructType: "object",
    inspect.ListType: "array",
    inspect.VarTupleType: "array",
    inspect.NoneType: "null",
}


def all_kinds() -> dict[str, KindInfo]:
    """Every kind that can be published: those of the kernel, then those of the stream itself."""
    return KINDS | {kind: stream_kind(kind, struct) for kind, struct in STREAM_KINDS.items()}


def stream_kind(kind: str, struct: type) -> KindInfo:
    """What there is to say about a kind that the agent makes itself, read from its Struct."""
    node = inspect.type_info(struct)
    assert isinstance(node, inspect.StructType), "a kind is a Struct"
    fields = tuple(_field(field) for field in node.fields)
    return KindInfo(kind, struct, "agent", (struct.__doc__ or "").partition("\n")[0], fields)


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


def check_code(report: CheckReport, kinds: frozenset[str]) -> int:
    """0 when every kind of `kinds` is full, 3 when none can be observed, else 1."""
    statuses = {report.kinds[kind].status if kind in report.kinds else "missing" for kind in kinds}
    if statuses <= {"full"}:
        return 0
    return NOTHING if statuses == {"missing"} else DEGRADED


def check_text(report: CheckReport) -> str:
    """The report of `check` for people: what is offered, what attaches, what is lost and why."""
    held = [[name, "yes" if there else "no"] for name, there in report.capabilities.items()]
    programs = [
        [p.hook, p.way, ",".join(p.kinds), p.status, p.reason]
        for p in report.programs
        if p.status != "spare"
    ]
    kinds = [[kind, found.status, found.reason] for kind, found in report.kinds.items()]
    sections = [
        f"kernel {report.kernel}: {'ok' if report.ok else 'not everything can be observed'}",
        table(["capability", "held"], held),
        table(["feature", "found"], [list(pair) for pair in report.features.items()]),
        table(["hook", "attached to", "kinds", "status", "reason"], programs),
        table(["event", "status", "reason"], kinds),
    ]
    return "\n\n".join(sections)


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
    return "on" if kind in select((), KINDS) else "off"


def _field(field: inspect.Field) -> FieldInfo:
    node = field.type
    extra = node.extra_json_schema if isinstance(node, inspect.Metadata) else None
    meaning = str((extra or {}).get("description", ""))
    return FieldInfo(field.encode_name, " or ".join(_type_words(node)), meaning)


def _type_words(node: inspect.Type) -> Iterator[str]:
    match node:
        case inspect.Metadata():
            yield from _type_words(node.type)
        case inspect.UnionType():
            for part in node.types:
                yield from _type_words(part)
        case _:
            yield _TYPE_WORDS[type(node)]
