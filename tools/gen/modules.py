"""The text of the generated modules, `events/kinds.py` and `kernel/objects.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from streamer.events.schema import OPTIONAL
from streamer.kernel.contract import Layout
from streamer.kernel.tags import SensorInfo
from tools.gen.model import Field, Model, Record

_EVENTS_HEAD = '''"""GENERATED from bpf/events.h by `make gen`: do not edit.

One Struct per kind of event, as it is published, and the layout table of its record.
"""

# ruff: noqa: E501
from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from streamer.events.clock import Timed
from streamer.events.dns import DnsAnswer
from streamer.events.layout import FieldInfo, FieldLayout, KindInfo, RecordLayout
from streamer.events.parsed import PARSED

SCHEMA_VERSION = {version}
"""The published `schema`: raised when a field changes its meaning."""

Ring = Literal[{rings}]
"""The rings, in the order of their numbers."""

Count = Annotated[int, Meta(ge=0, le=4294967295)]
'''

_OBJECTS_HEAD = '''"""GENERATED from bpf/ by `make gen`: do not edit.

What the compiled objects hold, for whoever loads them and reads their maps. Imports little: the
privileged process needs it.
"""

# ruff: noqa: E501
from __future__ import annotations

from streamer.kernel.tags import MapInfo, ProgramInfo, SensorInfo
'''

_WORDS = {"int": "integer", "str": "string", "bool": "boolean"}
_WORDS |= {"list[str]": "array of strings", "tuple[str, ...]": "array of strings"}
_WORDS |= {"list[DnsAnswer]": "array of objects"}
_WORDS |= {"tuple[Count, ...]": "array of integers"}


# What the decoder makes of an address of either version.
_ADDRESS = "^[0-9a-f:.]{2,45}$"


def words_of(field: Field) -> str:
    """A field's type in words, as JSON has it, with its values where `events.h` says which."""
    if field.among:
        return " or ".join(map(json.dumps, field.among))
    if field.span is None:
        return _WORDS[field.type]
    low, high = field.span
    return f"integer from {low}" if high is None else f"integer from {low} to {high}"


def _annotation(field: Field) -> str:
    """The type of a Struct's attribute: with what a value may be, and what it means."""
    kind = f"Literal[{', '.join(map(json.dumps, field.among))}]" if field.among else field.type
    kind = "Ring" if field.name == "ring" else kind
    return f"Annotated[{kind}, Meta({', '.join(_meta(field))})]"


def _meta(field: Field) -> Iterator[str]:
    low, high = (None, None) if field.among else field.range
    if low is not None:
        yield f"ge={low}"
    if high is not None:
        yield f"le={high}"
    if field.op == "cstr":
        yield f"max_length={int(str(field.argument)) - 1}"
    if field.op == "counts":
        yield f"min_length={field.argument}"
        yield f"max_length={field.argument}"
    if field.op == "ip":
        yield f'pattern="{_ADDRESS}"'
    yield f"description={_quoted(field.doc)}"
    if field.optional:
        yield f"extra={OPTIONAL!r}"


# ------------------------------------------------------------------ events.py


def events_module(model: Model) -> str:
    """The text of `streamer/events/kinds.py`."""
    rings = ", ".join(map(_quoted, model.rings))
    parts = [_EVENTS_HEAD.format(version=model.version, rings=rings), *_bases(model)]
    parts += [_struct(record) for record in model.records]
    parts += ["\n".join(_tables(model))]
    return "\n\n".join(parts)


def _bases(model: Model) -> Iterator[str]:
    head = 'class Event(Timed, tag_field="event", gc=False):\n'
    yield head + '    """What every event begins with."""\n\n' + _attributes(model.base.fields)
    head = "class TaskEvent(Event, gc=False):\n"
    yield head + '    """What every event of a task begins with."""\n\n' + _attributes(model.task)


def _struct(record: Record) -> str:
    base = "TaskEvent" if record.has_task else "Event"
    head = f'class {record.class_name}({base}, tag="{record.kind}", gc=False):\n'
    return head + f"    {_docstring(record.doc)}\n\n" + _attributes(record.fields)


def _attributes(fields: tuple[Field, ...]) -> str:
    if not fields:
        return "    pass\n"
    return "".join(f"    {field.name}: {_annotation(field)}\n" for field in fields)


def _tables(model: Model) -> Iterator[str]:
    yield f"HEADER: dict[str, int] = {json.dumps(model.header)}"
    yield '"""Where the reader finds what it needs of a record, in its base."""\n'
    base = model.base
    blocks = {"_BASE": base.head, "_MARKS": base.marks, "_TASK": model.task, "_END": base.end}
    for name, fields in blocks.items():
        yield from (f"{name} = (", *(f"    {_layout(field)}" for field in fields), ")\n")
    yield "RECORDS: dict[int, RecordLayout] = {"
    for record in model.records:
        yield from _record_layout(model, record)
    yield from ("}", '"""The layout of each kind\'s records, by number."""\n')
    blocks = {"_BASE_INFO": base.fields, "_TASK_INFO": model.task, "_END_INFO": base.end}
    for name, fields in blocks.items():
        yield from (f"{name} = (", *(f"    {_info(field)}" for field in fields), ")\n")
    yield "KINDS: dict[str, KindInfo] = {"
    for record in model.records:
        yield from _kind_info(record)
    yield from ("}", '"""What each kind is, for people."""\n')


def _record_layout(model: Model, record: Record) -> Iterator[str]:
    head = f'{record.number}: RecordLayout("{record.kind}", {record.class_name}'
    yield f"    {head}, {record.size}, {record.max_size}, ("
    yield "        *_BASE,"
    yield f"        {_layout(model.base.cut._replace(argument=record.cuts))}"
    yield "        *_MARKS,"
    if record.has_task:
        yield "        *_TASK,"
    yield from (f"        {_layout(field)}" for field in record.fields)
    yield "        *_END,"
    yield "    )),"


def _kind_info(record: Record) -> Iterator[str]:
    head = f'"{record.kind}": KindInfo("{record.kind}", {record.class_name}'
    yield f'    {head}, "{record.ring}", {_quoted(record.doc)}, ('
    yield "        *_BASE_INFO,"
    if record.has_task:
        yield "        *_TASK_INFO,"
    yield from (f"        {_info(field)}" for field in record.fields)
    yield "        *_END_INFO,"
    yield f"    ), {_strings(record.unseen)}),"


def _layout(field: Field) -> str:
    argument = f"{field.argument!r}"
    if field.op == "parsed":
        argument = f'PARSED["{field.argument}"].parse'
    return f'FieldLayout("{field.name}", "{field.op}", {field.offset}, {argument}),'


def _info(field: Field) -> str:
    return f'FieldInfo("{field.name}", {_quoted(words_of(field))}, {_quoted(field.doc)}),'


# ------------------------------------------------------------------ objects.py


def objects_module(
    contract: dict[str, Layout],
    kind_numbers: dict[str, int],
    end: int,
    sensors: Iterable[SensorInfo],
) -> str:
    """The text of `streamer/kernel/objects.py`."""
    lines = [_OBJECTS_HEAD, "CONTRACT: dict[str, tuple[tuple[str, int, int], ...]] = {"]
    lines += [f'    "{name}": {layout!r},' for name, layout in contract.items()]
    lines += ["}", '"""Every shared struct: its members with offset and size in bytes; and']
    lines += ['every shared enum: its names with their numbers, and 0."""\n']
    lines += [f"KIND_NUMBERS: dict[str, int] = {json.dumps(kind_numbers)}"]
    lines += ['"""The number of each kind."""\n', f"KIND_END = {end}"]
    lines += ['"""What is kept by kind has so many entries for each CPU."""\n']
    lines += ["SENSORS: dict[str, SensorInfo] = {"]
    for sensor in sensors:
        lines += _sensor(sensor)
    lines += ["}", '"""The objects by name: their programs and maps."""\n']
    return "\n".join(lines)


def _sensor(sensor: SensorInfo) -> Iterator[str]:
    yield f'    "{sensor.name}": SensorInfo("{sensor.name}", ('
    for program in sensor.programs:
        names = f'"{program.name}", "{program.hook}", {_strings(program.kinds)}'
        covers, needs = _quoted(program.covers), _strings(program.needs)
        more = "" if program.reports else ", False"
        if program.keeps:
            more += f", keeps={_strings(program.keeps)}"
        if program.lacks:
            more += f", lacks={_quoted(program.lacks)}"
        if program.run:
            more += ", run=True"
        yield f"        ProgramInfo({names}, {covers}, {needs}{more}),"
    yield "    ), ("
    for one in sensor.maps:
        needs = _strings(one.needs)
        more = ", common=True" if one.common else ""
        more += f', names="{one.names}"' if one.names else ""
        yield f'        MapInfo("{one.name}", "{one.sized}", {one.shared}, {needs}{more}),'
    yield "    )),"


def _strings(values: Sequence[str]) -> str:
    inner = ", ".join(map(_quoted, values))
    return f"({inner},)" if len(values) == 1 else f"({inner})"


def _docstring(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"""{escaped}"""'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
