"""Configuration mistakes in words: where, what was found, what is allowed.

msgspec says that data is not of a type, but not what it found there. So where it refuses, data
and type are walked together, and the words are made here.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import inspect

MAX_SHOWN = 60
"""Most characters of a found value that a message repeats."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_HUGE = 1 << 128


def mistakes(value: Any, hint: Any, key: str = "", *, strict: bool = True) -> Iterator[str]:
    """Every place at which `value`, itself found at `key`, is not of the type `hint`.

    One line each, without the source: `rings.bulk_bytes: found "big" (string), allowed: …`.
    `strict` as for `msgspec.convert`.
    """
    parts = list(_parts(hint))
    tables = [part for part in parts if isinstance(part, type) and issubclass(part, msgspec.Struct)]
    if tables and isinstance(value, Mapping):
        yield from _in_table(value, tables, key, strict)
        return
    try:
        msgspec.convert(value, hint, strict=strict)
    except msgspec.ValidationError:
        inner = (mistakes(*one, strict=strict) for one in _inner(value, parts, key))
        deeper = [line for lines in inner for line in lines]
        yield from deeper or [mistake(key, value, allowed(inspect.type_info(hint)))]


def mistake(key: str, value: Any, allowed_values: str) -> str:
    """`key: found VALUE, allowed: …`; the value is left out where it may be a secret."""
    shown = "a value (not shown)" if "password" in key.rpartition(".")[2] else found(value)
    return f"{key}: found {shown}, allowed: {allowed_values}"


def join(key: str, step: str | int) -> str:
    """`sinks`, then 0, then `port` become `sinks[0].port`."""
    if isinstance(step, int):
        return f"{key}[{step}]"
    plain = len(step) <= MAX_SHOWN and _BARE_KEY.fullmatch(step)
    name = step if plain else quoted(step)
    return f"{key}.{name}" if key else name


def quoted(text: str) -> str:
    """`text` in double quotes, cut, with everything escaped that is not printable."""
    cut = text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
    return json.dumps(cut, ensure_ascii=not cut.isprintable())


def found(value: Any) -> str:
    """A value as TOML would name it, such as `5 (integer)`."""
    match value:
        case str():
            return f"{quoted(value)} (string)"
        case bool():
            return f"{str(value).lower()} (boolean)"
        case int():
            return f"{value} (integer)" if abs(value) < _HUGE else "a huge integer"
        case float():
            return f"{value} (float)"
        case Mapping():
            return "a table"
        case list() | tuple():
            return "an array" if value else "an empty array"
        case datetime.date() | datetime.time():
            return f"{value.isoformat()} (date or time)"
    return type(value).__name__


def allowed(node: inspect.Type) -> str:
    """The values of a type, in words, such as `an integer from 1 to 65535`."""
    match node:
        case inspect.Metadata():
            return str((node.extra or {}).get("allowed") or allowed(node.type))
        case inspect.IntType() | inspect.FloatType():
            return _numbers(node)
        case inspect.StrType(max_length=int(most)):
            return f"a string of {node.min_length or 0} to {most} characters"
        case inspect.StrType():
            return "a non-empty string" if node.min_length else "a string"
        case inspect.BoolType():
            return "true or false"
        case inspect.VarTupleType():
            few = "a non-empty array" if node.min_length else "an array"
            return f"{few} (each: {allowed(node.item_type)})"
        case inspect.DictType():
            return f"a table (each: {allowed(node.value_type)})"
        case inspect.StructType(tag=None):
            return "a table"
        case inspect.StructType() | inspect.LiteralType():
            return _choice([node])
        case inspect.UnionType():
            return _choice(node.types)
    raise TypeError(f"no setting is of type {node}")


def listing(values: Iterable[Any]) -> str:
    """The values with commas between them, as in JSON."""
    return ", ".join(map(json.dumps, values))


def _parts(hint: Any) -> Iterator[Any]:
    """The types that a type hint allows, without what `Annotated` says of them."""
    if get_origin(hint) is Annotated:
        yield from _parts(get_args(hint)[0])
    elif get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            yield from _parts(part)
    else:
        yield hint


def _inner(value: Any, parts: list[Any], key: str) -> Iterator[tuple[Any, Any, str]]:
    """The entries of an array or table: each with its type and key."""
    for part in parts:
        arguments = get_args(part)
        if get_origin(part) is tuple and isinstance(value, list | tuple):
            yield from ((one, arguments[0], join(key, i)) for i, one in enumerate(value))
        if get_origin(part) is dict and isinstance(value, Mapping):
            yield from ((one, arguments[1], join(key, name)) for name, one in value.items())


def _in_table(value: Mapping[str, Any], tables: list[Any], key: str, strict: bool) -> Iterator[str]:
    table, tag = tables[0], tables[0].__struct_config__.tag_field
    if tag is not None:
        by_tag = {one.__struct_config__.tag: one for one in tables}
        named = value.get(tag)
        if not isinstance(named, str) or named not in by_tag:
            where, choices = join(key, tag), listing(by_tag)
            lacks = f"{where}: missing, allowed: {choices}"
            yield mistake(where, named, choices) if tag in value else lacks
            return
        table = by_tag[named]
    hints = get_type_hints(table, include_extras=True)
    for name, part in value.items():
        if name in hints:
            yield from mistakes(part, hints[name], join(key, name), strict=strict)
        elif name != tag:
            known = sorted([*hints, tag] if tag else hints)
            yield _unknown_key(join(key, name), name, known)
    for field in msgspec.structs.fields(table):
        if field.required and field.name not in value:
            where, node = join(key, field.name), inspect.type_info(hints[field.name])
            yield f"{where}: missing, allowed: {allowed(node)}"


def _unknown_key(key: str, name: str, known: Sequence[str]) -> str:
    """`key: unknown key, …` with the nearest of the `known` names, if one is near."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{key}: unknown key{hint}, allowed: {', '.join(known)}"


def _numbers(node: inspect.IntType | inspect.FloatType) -> str:
    limits = ((" from ", node.ge), (" above ", node.gt), (" to ", node.le))
    text = "".join(f"{word}{limit}" for word, limit in limits if limit is not None)
    noun = "an integer" if isinstance(node, inspect.IntType) else "a number"
    return noun + (text.replace(" to ", " and at most ") if node.gt is not None else text)


def _choice(nodes: Iterable[inspect.Type]) -> str:
    """One of several: TOML has no null, so `None` is a key left out and is not mentioned."""
    literals = [one for n in nodes if isinstance(n, inspect.LiteralType) for one in n.values]
    tags = [n.tag for n in nodes if isinstance(n, inspect.StructType) and n.tag is not None]
    words = [listing(literals)] if literals else []
    words += [f"a table with type = {listing(tags)}"] if tags else []
    named = (inspect.LiteralType, inspect.NoneType)
    others = [n for n in nodes if not isinstance(n, named) and not getattr(n, "tag", None)]
    return " or ".join([*words, *map(allowed, others)])
