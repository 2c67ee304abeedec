"""Derives everything on the Python side from the record definitions in `bpf/events.h`.

Reads the BTF of the compiled object and writes `streamer/events.py`, `schemas/*.json`,
`docs/events.md` and `docs/configuration.md`. `python -m streamer.gen --check` writes nothing and
fails, naming the files, when one of them is stale.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import keyword
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec

from streamer.errors import ContractError, StreamerError
from streamer.kernel.btf import Btf, Member, Type
from streamer.kernel.contract import contract_of, dotted, kind_names
from streamer.layout import HEADER_FIELDS, KindInfo

_HEAD = '''"""GENERATED from bpf/events.h by `make gen`: do not edit.

One Struct per kind of event, as it is published, and the layout table of its record.
"""

# ruff: noqa: E501
from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from streamer.layout import FieldInfo, FieldLayout, KindInfo, ProgramInfo, RecordLayout

SCHEMA_VERSION = {version}
"""The published `schema`: raised when a field changes its meaning."""
'''

_PYTHON_TYPES = {"cstr": "str", "ip": "str", "names": "str", "str": "str", "line": "str"}
_PYTHON_TYPES |= {"argv": "list[str]", "bool": "bool", "flag": "bool", "invalid_utf8": "bool"}
_PYTHON_TYPES |= {"id": "str", "const": "str"}


# What the decoder reads for each way to publish a field, in bytes; others have any size.
_SIZES = {"bool": 1, "names": 1, "ns": 8, "boottime": 8, "ip": 16, "str": 2, "argv": 2}


class Field(NamedTuple):
    """A published field: its layout in the record, its type and its meaning."""

    name: str
    op: str
    offset: int
    argument: object
    doc: str

    @property
    def type(self) -> str:
        """The field's Python type."""
        return "int" if self.name == "schema" else _PYTHON_TYPES.get(self.op, "int")


class Record(NamedTuple):
    """A kind: its number, names, ring, meaning and own fields."""

    number: int
    name: str
    stream: str
    doc: str
    size: int
    fields: tuple[Field, ...]

    @property
    def kind(self) -> str:
        """The published kind, such as `process.exec`."""
        return dotted(self.name)

    @property
    def class_name(self) -> str:
        """The Struct's name, such as `ProcessExec`."""
        return "".join(part.capitalize() for part in self.name.split("_"))


class Program(NamedTuple):
    """A BPF program, the kinds that it reports, and what is not observed without it."""

    name: str
    kinds: tuple[str, ...]
    covers: str


class Model(NamedTuple):
    """All that is generated from."""

    version: int
    header: dict[str, int]
    envelope: tuple[Field, ...]
    records: tuple[Record, ...]
    programs: tuple[Program, ...]
    contract: dict[str, Any]


def read_model(btf: Btf) -> Model:
    """The model of an object.

    Raises:
        ContractError: a struct or field that cannot be published, with its name.
    """
    header = _header(btf)
    envelope = tuple(_envelope(btf))
    return Model(
        version=btf.enum("event_schema")["SCHEMA_VERSION"],
        header=header,
        envelope=envelope,
        records=tuple(_record(btf, name, n, envelope) for name, n in kind_names(btf).items()),
        programs=tuple(_programs(btf)),
        contract=contract_of(btf),
    )


def _header(btf: Btf) -> dict[str, int]:
    _, struct = btf.structure("event_header")
    members = {m.name: m for m in struct.members}
    for name, width in HEADER_FIELDS.items():
        if name not in members or btf.size_of(members[name].type_id) != width:
            raise ContractError(f"event_header.{name} must be there and have {width} bytes")
    return {name: members[name].offset for name in HEADER_FIELDS} | {"header_size": struct.size}


def _envelope(btf: Btf) -> Iterator[Field]:
    """What every event begins with: fields made by the decoder, and the header's own."""
    type_id, struct = btf.structure("event_header")
    _check_padding(btf, struct)
    own = {f.name: f for m in struct.members for f in _fields(btf, type_id, m)}
    flags = next(m.offset for m in struct.members if m.name == "flags")
    yield Field("schema", "const", 0, "schema", "version of the meaning of the fields")
    yield Field("id", "id", 0, None, "unique and stable id: run, stream, cpu, seq")
    yield Field("time_ns", "time", 0, None, "when it happened, nanoseconds since the epoch")
    yield own.pop("boot_ns")
    yield Field("host", "const", 0, "host", "name of the host")
    yield Field("boot_id", "const", 0, "boot_id", "the kernel's random id of this boot")
    yield Field("stream", "const", 0, "stream", "ring that carried it: critical or bulk")
    yield from own.values()
    for name, mask in btf.enum("event_flags").items():
        doc = "whether a string was cut at its limit or could not be read to its end"
        yield Field(name.removeprefix("FLAG_").lower(), "flag", flags, mask, doc)
    doc = "whether bytes that are not UTF-8 were replaced by U+FFFD"
    yield Field("invalid_utf8", "invalid_utf8", 0, None, doc)


def _record(btf: Btf, name: str, number: int, envelope: tuple[Field, ...]) -> Record:
    type_id, struct = btf.structure(name)
    stream, doc = btf.tag(type_id, "stream"), btf.tag(type_id, "doc")
    first = struct.members[0]
    if stream is None or doc is None:
        raise ContractError(f"struct {name} needs STREAM and DOC")
    if first.name != "header" or btf.resolve(first.type_id).name != "event_header":
        raise ContractError(f"struct {name} must begin with `struct event_header header`")
    _check_padding(btf, struct)
    fields = tuple(f for m in struct.members[1:] for f in _fields(btf, type_id, m))
    _check_names(name, [f.name for f in (*envelope, *fields)])
    return Record(number, name, stream, doc, _fixed_size(struct), fields)


def _check_names(struct: str, names: list[str]) -> None:
    """Names become attributes of a class and keys of one flat object."""
    for name in names:
        if keyword.iskeyword(name) or not name.isidentifier():
            raise ContractError(f"struct {struct}: {name!r} cannot be the name of a field")
        if names.count(name) > 1 or name == "event":
            raise ContractError(f"struct {struct}: {name} is published twice")


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
    try:
        yield from _shown(btf, struct, member, shown, argument, doc)
    except (KeyError, ValueError):
        where = f"struct {struct.name}: {member.name}"
        raise ContractError(f'{where}: cannot publish as "{shown}:{argument}"') from None


def _shown(
    btf: Btf, struct: Type, member: Member, shown: str, argument: str, doc: str
) -> Iterator[Field]:
    name, offset, size = member.name, member.offset, btf.size_of(member.type_id)
    if size != _SIZES.get(shown, size):
        raise ValueError(size)
    match shown:
        case "":
            yield Field(name, _integer(btf, member), offset, None, doc)
        case "bool" | "ns":
            yield Field(name, shown, offset, None, doc)
        case "boottime":
            yield Field(name.replace("_boot_ns", "_time_ns"), shown, offset, None, doc)
        case "cstr":
            yield Field(name, "cstr", offset, size, doc)
        case "ip":
            version = {m.name: m.offset for m in struct.members}[argument]
            yield Field(name, "ip", offset, version, doc)
        case "names":
            yield Field(name, "names", offset, tuple(argument.split(",")), doc)
        case "str":
            yield Field(argument, "str", offset, None, doc)
        case "argv":
            array, line = argument.split(",")
            array_doc, _, line_doc = doc.partition("|")
            yield Field(array, "argv", offset, None, array_doc)
            yield Field(line, "line", offset, None, line_doc)
        case _:
            raise ValueError(shown)


def _integer(btf: Btf, member: Member) -> str:
    op = f"{'s' if btf.is_signed(member.type_id) else 'u'}{8 * btf.size_of(member.type_id)}"
    if not btf.is_integer(member.type_id) or op not in ("u8", "u16", "u32", "u64", "s32", "s64"):
        raise ValueError(op)
    # Numbers that seldom repeat are not worth the decoder's cache.
    return "ns" if member.name in ("boot_ns", "seq") else op


def _programs(btf: Btf) -> Iterator[Program]:
    for type_id, name in btf.functions():
        kinds = btf.tag(type_id, "emits")
        if kinds:
            yield Program(name, tuple(kinds.split(",")), btf.tag(type_id, "doc") or "")


def events_module(model: Model) -> str:
    """The text of `streamer/events.py`."""
    parts = [_HEAD.format(version=model.version), _base(model)]
    parts += [_struct(record) for record in model.records]
    parts += [_tables(model)]
    return "\n\n".join(parts)


def _base(model: Model) -> str:
    head = 'class Event(Struct, tag_field="event", gc=False):\n'
    return head + '    """What every event begins with."""\n\n' + _attributes(model.envelope)


def _struct(record: Record) -> str:
    head = f'class {record.class_name}(Event, tag="{record.kind}", gc=False):\n'
    return head + f"    {_docstring(record.doc)}\n\n" + _attributes(record.fields)


def _attributes(fields: tuple[Field, ...]) -> str:
    return "".join(
        f"    {f.name}: Annotated[{f.type}, Meta(description={_quoted(f.doc)})]\n" for f in fields
    )


def _tables(model: Model) -> str:
    lines = [f"HEADER: dict[str, int] = {json.dumps(model.header)}"]
    lines += ['"""Where the reader finds what it needs of a record\'s header."""\n']
    lines += ["_ENVELOPE = (", *map(_layout, model.envelope), ")\n"]
    lines += ["RECORDS: dict[int, RecordLayout] = {"]
    for record in model.records:
        head = f'    {record.number}: RecordLayout("{record.kind}", {record.class_name}'
        lines += [f"{head}, {record.size}, (", "        *_ENVELOPE,"]
        lines += [f"    {_layout(field)}" for field in record.fields]
        lines += ["    )),"]
    lines += ["}", '"""The layout of each kind\'s records, by number."""\n']
    lines += ["_ENVELOPE_INFO = (", *map(_info, model.envelope), ")\n"]
    lines += ["KINDS: dict[str, KindInfo] = {"]
    for record in model.records:
        programs = tuple(p.name for p in model.programs if record.kind in p.kinds)
        head = f'    "{record.kind}": KindInfo("{record.kind}", {record.class_name}'
        lines += [
            f'{head}, "{record.stream}", {_quoted(record.doc)}, (',
            "        *_ENVELOPE_INFO,",
        ]
        lines += [f"    {_info(field)}" for field in record.fields]
        lines += [f"    ), {programs!r}),"]
    lines += ["}", '"""What each kind is, for people."""\n']
    lines += ["PROGRAMS: dict[str, ProgramInfo] = {"]
    for program in model.programs:
        info = f"{program.kinds!r}, {_quoted(program.covers)}"
        lines += [f'    "{program.name}": ProgramInfo("{program.name}", {info}),']
    lines += ["}", '"""The BPF programs, and what is not observed without each."""\n']
    lines += ["CONTRACT: dict[str, tuple[tuple[str, int, int], ...]] = {"]
    lines += [f'    "{name}": {layout!r},' for name, layout in model.contract.items()]
    lines += ["}", '"""Every shared struct: its members with offset and size in bytes."""\n']
    return "\n".join(lines)


def _layout(field: Field) -> str:
    return f'    FieldLayout("{field.name}", "{field.op}", {field.offset}, {field.argument!r}),'


def _info(field: Field) -> str:
    kind = "array of strings" if field.type == "list[str]" else _WORDS[field.type]
    return f'    FieldInfo("{field.name}", "{kind}", {_quoted(field.doc)}),'


_WORDS = {"int": "integer", "str": "string", "bool": "boolean"}


def _docstring(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"""{escaped}"""'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def schemas(structs: dict[str, type]) -> dict[str, str]:
    """The text of `schemas/KIND.json` for every published Struct."""
    return {f"{kind}.json": _pretty(_schema(kind, cls)) for kind, cls in structs.items()}


def _schema(kind: str, cls: type) -> dict[str, Any]:
    _, components = msgspec.json.schema_components([cls], ref_template="#/$defs/{name}")
    own: dict[str, Any] = components.pop(cls.__name__)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": kind}
    return head | own | ({"$defs": components} if components else {})


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def events_page(model: Model, stream_kinds: Iterable[KindInfo]) -> str:
    """The text of `docs/events.md`."""
    lines = ["<!-- GENERATED from bpf/events.h by `make gen`: do not edit. -->", "# Events", ""]
    lines += ["One flat JSON object (or MessagePack map) per event. Every event of the kernel"]
    lines += ["begins with the same fields:", "", *_table(model.envelope)]
    for record in model.records:
        lines += ["", f"## {record.kind}", "", f"{record.doc} Ring: {record.stream}.", ""]
        lines += _table(record.fields)
    lines += ["", "# Records of the stream itself", ""]
    lines += ["Made by the agent, in the same topics; always on."]
    for info in stream_kinds:
        lines += ["", f"## {info.kind}", "", info.doc, ""]
        lines += ["| field | type | meaning |", "| --- | --- | --- |"]
        lines += [f"| `{f.name}` | {f.type} | {_cell(f.doc)} |" for f in info.fields]
    return "\n".join(lines) + "\n"


def _table(fields: tuple[Field, ...]) -> list[str]:
    rows = [
        f"| `{f.name}` | {'array of strings' if f.op == 'argv' else _WORDS[f.type]} "
        f"| {_cell(f.doc)} |"
        for f in fields
    ]
    return ["| field | type | meaning |", "| --- | --- | --- |", *rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def outputs(object_path: Path, root: Path) -> Iterator[tuple[Path, str]]:
    """Each generated file and its text; `events.py` first, since the others come from it."""
    model = read_model(Btf.of_object(object_path))
    source = events_module(model)
    yield root / "streamer" / "events.py", source
    events = _execute(source)
    kinds: dict[str, type] = {kind: info.struct for kind, info in events.KINDS.items()}
    # Imported only now: these import `events.py`, which may have been stale until this moment.
    from streamer import cli_text, config, stream_events

    own = stream_events.STREAM_KINDS
    for name, text in schemas(kinds | own).items():
        yield root / "schemas" / name, text
    yield root / "schemas" / "config.schema.json", _pretty(config.schema())
    yield (
        root / "docs" / "events.md",
        events_page(model, [cli_text.stream_kind(kind, struct) for kind, struct in own.items()]),
    )
    yield root / "docs" / "configuration.md", config.documentation()


def _execute(source: str) -> ModuleType:
    spec = importlib.util.spec_from_loader("streamer_events_generated", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # The annotations of the Structs are looked up in their module.
    sys.modules[module.__name__] = module
    exec(compile(source, "events.py", "exec"), module.__dict__)
    return module


def main(argv: list[str] | None = None) -> int:
    """Write the files, or with `--check` say which are stale; 1 if any is."""
    parser = argparse.ArgumentParser(prog="python -m streamer.gen", description=__doc__)
    parser.add_argument("--object", type=Path, default=Path("streamer/bpf/streamer.bpf.o"))
    parser.add_argument("--root", type=Path, default=Path("."), help="where to write")
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    arguments = parser.parse_args(argv)
    stale = 0
    try:
        for path, text in outputs(arguments.object, arguments.root):
            stale += _put(path, text, write=not arguments.check)
    except StreamerError as error:
        print(f"gen: {error}", file=sys.stderr)
        return 1
    return 1 if arguments.check and stale else 0


def _put(path: Path, text: str, *, write: bool) -> bool:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    print(f"gen: {path} {'written' if write else 'is stale: run `make gen`'}")
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
