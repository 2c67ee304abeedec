"""What is published of each record, read from the structs of `bpf/events.h`."""

from __future__ import annotations

import keyword
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from streamer.errors import ContractError
from streamer.events.layout import HEADER_FIELDS, MAX_STRINGS
from streamer.events.parsed import PARSED
from streamer.kernel.btf import Btf, Member, Type
from streamer.kernel.contract import dotted, kind_names

_PYTHON_TYPES = {"cstr": "str", "ip": "str", "names": "str", "str": "str", "line": "str"}
_PYTHON_TYPES |= {"argv": "list[str]", "cut": "tuple[str, ...]", "counts": "tuple[Count, ...]"}
_PYTHON_TYPES |= {"bool": "bool", "flag": "bool", "invalid_utf8": "bool"}
_PYTHON_TYPES |= {"id": "str", "const": "str"}

# What the decoder reads for each way to publish a field, in bytes; others have any size.
# Of every integer that is published so; the widest have no end that JSON Schema could be given.
_RANGES: dict[str, tuple[int | None, int | None]] = {
    **{f"u{bits}": (0, (1 << bits) - 1) for bits in (8, 16, 32)},
    "s32": (-1 << 31, (1 << 31) - 1),
    **dict.fromkeys(("u64", "ns", "moment", "start", "serial", "time", "boottime"), (0, None)),
}

_SIZES = {"bool": 1, "names": 1, "ip": 16}
_SIZES |= dict.fromkeys(("ns", "moment", "start", "serial", "boottime"), 8)
_SIZES |= dict.fromkeys(("str", "argv", "parsed"), 2)
_STRINGS = ("str", "argv", "parsed")


class Field(NamedTuple):
    """A published field: its layout in the record, its type, its values and its meaning.

    `span` is what RANGE says, and `among` what AMONG does. An `optional` field is one that older
    releases do not send. `made` is the type of what a function gives.
    """

    name: str
    op: str
    offset: int
    argument: object
    doc: str
    span: tuple[int | None, int | None] | None = None
    among: tuple[int | str, ...] = ()
    optional: bool = False
    made: str = ""

    @property
    def type(self) -> str:
        """The field's Python type, apart from what values it has."""
        if self.name == "schema":
            return "int"
        return self.made or _PYTHON_TYPES.get(self.op, "int")

    @property
    def range(self) -> tuple[int | None, int | None]:
        """The least and the largest value of an integer; None where it has no such limit."""
        if self.made:
            return (0, None) if self.made == "int" else (None, None)
        return self.span or _RANGES.get(self.op, (None, None))


class Base(NamedTuple):
    """What every event begins with: `head`, then `cut` with the record's strings, then `marks`.

    `end` is what it can end with: none of it is there as a rule.
    """

    head: tuple[Field, ...]
    cut: Field
    marks: tuple[Field, ...]
    end: tuple[Field, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        """What every event begins with, in order."""
        return (*self.head, self.cut, *self.marks)


class Record(NamedTuple):
    """A kind: its number, names, ring, meaning and own fields.

    `size` is that of the fixed part, `max_size` with the longest strings, in bytes.
    """

    number: int
    name: str
    ring: str
    doc: str
    unseen: tuple[str, ...]
    size: int
    max_size: int
    has_task: bool
    fields: tuple[Field, ...]

    @property
    def kind(self) -> str:
        """The published kind, such as `process.exec`."""
        return dotted(self.name)

    @property
    def class_name(self) -> str:
        """The Struct's name, such as `ProcessExec`."""
        return "".join(part.capitalize() for part in self.name.split("_"))

    @property
    def strings(self) -> tuple[str, ...]:
        """Names of the strings in `data`, in its order."""
        return tuple(field.name for field in self.fields if field.op in _STRINGS)

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of what may be cut: the strings, and a line that is made of one."""
        lines = (field.name for field in self.fields if field.op == "line")
        return (*self.strings, *lines)


class Model(NamedTuple):
    """All that is generated from. `header` is where the reader finds what it needs."""

    version: int
    rings: tuple[str, ...]
    header: dict[str, int]
    base: Base
    task: tuple[Field, ...]
    records: tuple[Record, ...]


def read_model(btf: Btf) -> Model:
    """The model of an object.

    Raises:
        ContractError: a struct or field that cannot be published, with its name.
    """
    header, base, task = _header(btf), _base(btf), _task(btf)
    return Model(
        version=btf.constant("event_schema", "SCHEMA_VERSION"),
        rings=ring_names(btf),
        header=header,
        base=base,
        task=task,
        records=tuple(_record(btf, name, n, base, task) for name, n in kind_names(btf).items()),
    )


def ring_names(btf: Btf) -> tuple[str, ...]:
    """The rings in the order of their numbers: `("critical", "bulk")`."""
    values = btf.enum("event_ring")
    ordered = sorted((number, name) for name, number in values.items())
    return tuple(name.removeprefix("RING_").lower() for _, name in ordered[:-1])


def _header(btf: Btf) -> dict[str, int]:
    _, struct = btf.structure("event_base")
    members = {m.name: m for m in struct.members}
    for name, width in HEADER_FIELDS.items():
        if name not in members or btf.size_of(members[name].type_id) != width:
            raise ContractError(f"event_base.{name} must be there and have {width} bytes")
    return {name: members[name].offset for name in HEADER_FIELDS} | {"header_size": struct.size}


def _base(btf: Btf) -> Base:
    """Fields made by the decoder, and the base's own."""
    own, at = _published(btf, "event_base"), _offsets(btf, "event_base")
    names = ("boot_ns", "seq", "cpu", "weight")
    rings = ring_names(btf)
    missing = [name for name in names if name not in own] + [
        n for n in ("cut", "flags") if n not in at
    ]
    if missing:
        raise ContractError(f"event_base.{missing[0]} must be there and be published")
    head = (
        Field("schema", "const", 0, "schema", "version of the meaning of the fields", (1, None)),
        Field("id", "id", 0, None, "unique and stable id: run, ring, cpu, seq"),
        Field("time_ns", "time", 0, None, "when it happened, nanoseconds since the epoch"),
        own.pop("boot_ns"),
        Field("host", "const", 0, "host", "name of the host"),
        Field("boot_id", "const", 0, "boot_id", "the kernel's random id of this boot"),
        Field("ring", "const", 0, "ring", "ring that carried it", None, rings),
        *(own.pop(name) for name in names[1:]),
        *own.values(),
    )
    doc = "names of the strings that were cut, or could not be read to their end; mostly empty"
    cut = Field("truncated", "cut", at["cut"], (), doc)
    mask = btf.constant("event_flags", "FLAG_INCOMPLETE")
    doc = "whether a read in the kernel failed, so that a field is 0 or empty that need not be"
    incomplete = Field("incomplete", "flag", at["flags"], mask, doc)
    doc = "whether bytes that are not UTF-8 were replaced by U+FFFD"
    marks = (incomplete, Field("invalid_utf8", "invalid_utf8", 0, None, doc))
    doc = "at the end, with `rfc3339_time` alone: the same as `time_ns`, in RFC 3339"
    time = Field("time", "const", 0, "time", doc)
    doc = "at the end, and true, of what was in the spool before it was sent"
    replayed = Field("replayed", "const", 0, "replayed", doc, made="bool")
    return Base(head, cut, marks, (time, replayed))


def _task(btf: Btf) -> tuple[Field, ...]:
    """Fields of the task block, at their offsets in a record: it follows the base."""
    _, base = btf.structure("event_base")
    fields = _published(btf, "event_task").values()
    return tuple(field._replace(offset=field.offset + base.size) for field in fields)


def _published(btf: Btf, name: str) -> dict[str, Field]:
    type_id, struct = btf.structure(name)
    _check_padding(btf, struct)
    return {f.name: f for m in struct.members for f in _fields(btf, type_id, m)}


def _offsets(btf: Btf, name: str) -> dict[str, int]:
    return {m.name: m.offset for m in btf.structure(name)[1].members}


def _record(btf: Btf, name: str, number: int, base: Base, task: tuple[Field, ...]) -> Record:
    type_id, struct = btf.structure(name)
    ring, doc = btf.tag(type_id, "ring"), btf.tag(type_id, "doc")
    if ring is None or doc is None:
        raise ContractError(f"struct {name} needs RING and DOC")
    if ring not in ring_names(btf):
        raise ContractError(f'struct {name}: RING("{ring}"), which is none of enum event_ring')
    if not _is(btf, struct, 0, "base"):
        raise ContractError(f"struct {name} must begin with `struct event_base base`")
    has_task = _is(btf, struct, 1, "task")
    _check_padding(btf, struct)
    own = struct.members[2 if has_task else 1 :]
    fields = tuple(f for m in own for f in _fields(btf, type_id, m))
    given = (*base.fields, *base.end, *(task if has_task else ()))
    _check_names(name, [f.name for f in (*given, *fields)])
    unseen = btf.tag(type_id, "unseen")
    missing = tuple(unseen.split("|")) if unseen else ()
    size = _fixed_size(struct)
    record = Record(number, name, ring, doc, missing, size, struct.size, has_task, fields)
    _check_strings(record)
    return record


def _is(btf: Btf, struct: Type, index: int, block: str) -> bool:
    """Whether the member at that place is `struct event_BLOCK BLOCK`."""
    if len(struct.members) <= index:
        return False
    member = struct.members[index]
    return member.name == block and btf.resolve(member.type_id).name == f"event_{block}"


def _check_names(struct: str, names: list[str]) -> None:
    """Names become attributes of a class and keys of one flat object."""
    for name, count in Counter(names).items():
        if keyword.iskeyword(name) or not name.isidentifier():
            raise ContractError(f"struct {struct}: {name!r} cannot be the name of a field")
        if count > 1 or name == "event":
            raise ContractError(f"struct {struct}: {name} is published twice")


def _check_strings(record: Record) -> None:
    count = len(record.strings)
    if count > MAX_STRINGS:
        raise ContractError(f"struct {record.name}: {count} strings, more than {MAX_STRINGS}")
    if count and record.size == record.max_size:
        raise ContractError(f"struct {record.name}: strings, and no `data` at its end")


def _check_padding(btf: Btf, struct: Type) -> None:
    """Refuse bytes without a name: nothing would say what they hold."""
    expected = 0
    for member in struct.members:
        if member.offset != expected:
            raise ContractError(f"struct {struct.name}: padding before {member.name} needs a name")
        expected += btf.size_of(member.type_id)
    if expected != struct.size:
        raise ContractError(f"struct {struct.name}: padding at the end needs a name")


def _fixed_size(struct: Type) -> int:
    last = struct.members[-1]
    return last.offset if last.name == "data" else struct.size


def _fields(btf: Btf, type_id: int, member: Member) -> Iterator[Field]:
    struct = btf.types[type_id]
    shown, _, argument = (btf.tag(type_id, "as", member.index) or "").partition(":")
    if shown == "hidden":
        return
    doc = btf.tag(type_id, "doc", member.index)
    if doc is None:
        raise ContractError(f"struct {struct.name}: {member.name} needs DOC (or HIDDEN)")
    where = f"struct {struct.name}: {member.name}"
    try:
        fields = list(_shown(btf, struct, member, shown, argument, doc))
    except (KeyError, ValueError):
        raise ContractError(f'{where}: cannot publish as "{shown}:{argument}"') from None
    span, among, optional = (
        btf.tag(type_id, key, member.index) for key in ("range", "among", "optional")
    )
    for field in fields:
        limited = _limited(field, where, span, among)
        yield limited._replace(optional=optional is not None)


def _limited(field: Field, where: str, span: str | None, among: str | None) -> Field:
    """The field with the values that RANGE or AMONG say of an integer."""
    if span is None and among is None:
        return field
    try:
        if field.type != "int" or None not in (span, among):
            raise ValueError(field.type)
        if among is not None:
            values = tuple(map(int, among.split(",")))
            return _within(field._replace(among=values), min(values), max(values), where)
        low, high = _ends(span or "", field.range)
    except ValueError:
        raise ContractError(f"{where}: RANGE or AMONG that makes no sense") from None
    return _within(field._replace(span=(low, high)), low, high, where)


def _ends(text: str, most: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    """The ends of `A..B`; where one is left out, that of the type."""
    low, dots, high = text.partition("..")
    if not dots:
        raise ValueError(text)
    return int(low) if low else most[0], int(high) if high else most[1]


def _within(field: Field, low: int | None, high: int | None, where: str) -> Field:
    """The field, if its C type holds these values."""
    least, most = _RANGES.get(field.op, (None, None))
    if least is not None and (low is None or low < least):
        raise ContractError(f"{where}: {low} is less than the field can hold")
    if most is not None and (high is None or high > most):
        raise ContractError(f"{where}: {high} is more than the field can hold")
    return field


def _shown(
    btf: Btf, struct: Type, member: Member, shown: str, argument: str, doc: str
) -> Iterator[Field]:
    name, offset, size = member.name, member.offset, btf.size_of(member.type_id)
    if size != _SIZES.get(shown, size):
        raise ValueError(size)
    match shown:
        case "":
            yield Field(name, _integer(btf, member), offset, None, doc)
        case "bool" | "ns" | "moment" | "start" | "serial" | "boottime":
            yield Field(name, shown, offset, None, doc)
        case "cstr":
            yield Field(name, "cstr", offset, size, doc)
        case "counts":
            element = btf.resolve(member.type_id).element
            if not size or btf.size_of(element) != 4 or btf.is_signed(element):
                raise ValueError(size)
            yield Field(name, "counts", offset, size // 4, doc)
        case "ip":
            version = {m.name: m.offset for m in struct.members}[argument]
            yield Field(name, "ip", offset, version, doc)
        case "names":
            names = tuple(argument.split(","))
            yield Field(name, "names", offset, names, doc, among=tuple(dict.fromkeys(names)))
        case "str":
            yield Field(argument, "str", offset, None, doc)
        case "argv":
            array, line = argument.split(",")
            array_doc, _, line_doc = doc.partition("|")
            yield Field(array, "argv", offset, None, array_doc)
            yield Field(line, "line", offset, None, line_doc)
        case "parsed":
            what, whole = argument.split(",")
            yield from _parts(what, whole, offset)
        case _:
            raise ValueError(shown)


def _parts(what: str, whole: str, offset: int) -> Iterator[Field]:
    """What a function makes of bytes: first what has them in `truncated`."""
    parts = PARSED[what].parts
    if whole != next(iter(parts)):
        raise ValueError(whole)
    for index, (name, (made, doc)) in enumerate(parts.items()):
        op, argument = ("part", index) if index else ("parsed", what)
        yield Field(name, op, 0 if index else offset, argument, doc, made=made)


def _integer(btf: Btf, member: Member) -> str:
    op = f"{'s' if btf.is_signed(member.type_id) else 'u'}{8 * btf.size_of(member.type_id)}"
    if not btf.is_integer(member.type_id) or op not in ("u8", "u16", "u32", "u64", "s32", "s64"):
        raise ValueError(op)
    return op
