"""Every kind that can be published, and every one that can be asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec import inspect

from streamer.events.kinds import KINDS
from streamer.events.layout import FieldInfo, KindInfo
from streamer.events.stream import STREAM_KINDS
from streamer.events.summaries import SUMMARIES

BY_AGENT = "agent"
"""In place of a ring, for what the agent makes itself."""

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


def made_by_agent(kind: str, struct: type) -> KindInfo:
    """What there is to say about a kind that the agent makes itself, read from its Struct."""
    node = inspect.type_info(struct)
    assert isinstance(node, inspect.StructType), "a kind is a Struct"
    fields = tuple(_field(field) for field in node.fields)
    return KindInfo(kind, struct, BY_AGENT, _first_paragraph(struct), fields)


def _first_paragraph(struct: type) -> str:
    return " ".join((struct.__doc__ or "").partition("\n\n")[0].split())


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


SELECTABLE: dict[str, KindInfo] = KINDS | {
    kind: made_by_agent(kind, struct) for kind, struct in SUMMARIES.items()
}
"""The kinds that can be asked for: those of the kernel's rings, and the summaries."""

PUBLISHED: dict[str, KindInfo] = SELECTABLE | {
    kind: made_by_agent(kind, struct) for kind, struct in STREAM_KINDS.items()
}
"""Those, and the records of the stream itself, which are always on."""
