"""Configuration mistakes in words: where, what was found, what is allowed.

msgspec stops at the first mistake and says where it is, as `$.sinks[0].port`, but not what it
found there. So the data and the types are walked along that path, and the words are made here.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

MAX_SHOWN = 60
"""Most characters of a found value that a message repeats."""

_STEP = re.compile(r"\.(\w+)|\[(\d+)\]|\[(\.\.\.)\]")
_SOME_ENTRY = "..."
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_HUGE = 1 << 128


@cache
def type_of(root: Any) -> inspect.Type:
    """What msgspec knows of a type, with the limits and descriptions of its fields."""
    return inspect.type_info(root)


def explain(error: msgspec.ValidationError, data: Any, root: Any) -> str:
    """The mistake that msgspec met when it converted `data` into the type `root`.

    One line without the source: `rings.bulk_bytes: found "big" (string), allowed: …`.
    """
    node, value, key = type_of(root), data, ""
    for step in _steps(str(error)):
        if step == _SOME_ENTRY:
            step = _wrong_entry(node, value)
        node = _child(node, value, step)
        value = value[step]
        key = join(key, step)
    return _mistake(key, value, node)


def mistake(key: str, value: Any, allowed_values: str) -> str:
    """`key: found VALUE, allowed: …`; the value is left out where it may be a secret."""
    shown = "a value (not shown)" if "password" in key.rpartition(".")[2] else found(value)
    return f"{key}: found {shown}, allowed: {allowed_values}"


def join(key: str, step: str | int) -> str:
    """`sinks`, then 0, then `port` become `sinks[0].port`."""
    if isinstance(step, int):
        return f"{key}[{step}]"
    name = step if _BARE_KEY.fullmatch(step) else quoted(step)
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
        case inspect.StrType():
            return _texts(node)
        case inspect.BoolType():
            return "true or false"
        case inspect.VarTupleType():
            few = "a non-empty array" if node.min_length else "an array"
            return f"{few} (each: {allowed(node.item_type)})"
        case inspect.DictType():
            return f"a table (each: {allowed(node.value_type)})"
        case inspect.StructType():
            return "a table" if node.tag is None else f"a table with type = {_listing([node.tag])}"
    return _either(node)


def structs(node: inspect.Type) -> tuple[inspect.StructType, ...]:
    """The tables among the types that `node` allows."""
    match node:
        case inspect.Metadata():
            return structs(node.type)
        case inspect.UnionType():
            return tuple(table for part in node.types for table in structs(part))
        case inspect.StructType():
            return (node,)
    return ()


def item(node: inspect.Type) -> inspect.Type | None:
    """The type of the items of an array; None where `node` is no array."""
    if isinstance(node, inspect.Metadata):
        return item(node.type)
    return node.item_type if isinstance(node, inspect.VarTupleType) else None


def _entries(node: inspect.Type) -> inspect.Type | None:
    """The type of the values of a table with keys of any name; None where `node` is none."""
    if isinstance(node, inspect.Metadata):
        return _entries(node.type)
    return node.value_type if isinstance(node, inspect.DictType) else None


def _steps(text: str) -> Iterator[str | int]:
    path = text.rpartition(" - at `$")[2] if " - at `$" in text else ""
    for name, index, some in _STEP.findall(path):
        yield name or some or int(index)


def _wrong_entry(node: inspect.Type, value: Mapping[str, Any]) -> str:
    """The first key in a table of numbers whose value is wrong: msgspec does not say which."""
    numbers = _entries(node)
    assert isinstance(numbers, inspect.IntType)
    low, high = numbers.ge or 0, numbers.le or _HUGE
    return next(
        key for key, found in value.items() if type(found) is not int or not low <= found <= high
    )


def _child(node: inspect.Type, value: Any, step: str | int) -> inspect.Type:
    if entries := _entries(node):
        return entries
    if isinstance(step, int):
        inner = item(node)
        assert inner is not None, "msgspec gives indices into arrays only"
        return inner
    tables = structs(node)
    if step == tables[0].tag_field:
        return _tags(tables)
    table = _table(tables, value)
    return next(field.type for field in table.fields if field.encode_name == step)


def _table(tables: Sequence[inspect.StructType], value: Any) -> inspect.StructType:
    """The table of several that the tag in `value` chooses."""
    tag = value.get(tables[0].tag_field) if tables[0].tag_field else None
    return next(table for table in tables if table.tag == tag)


def _tags(tables: Iterable[inspect.StructType]) -> inspect.LiteralType:
    return inspect.LiteralType(tuple(str(table.tag) for table in tables))


def _mistake(key: str, value: Any, node: inspect.Type) -> str:
    tables = structs(node)
    if not tables or not isinstance(value, Mapping):
        return mistake(key, value, allowed(node))
    tag_field = tables[0].tag_field
    if tag_field is not None and tag_field not in value:
        return f"{join(key, tag_field)}: missing, allowed: {allowed(_tags(tables))}"
    return _table_mistake(key, value, _table(tables, value))


def _table_mistake(key: str, value: Mapping[str, Any], table: inspect.StructType) -> str:
    names = [field.encode_name for field in table.fields]
    known = {*names, table.tag_field} if table.tag_field else set(names)
    for name in value:
        if name not in known:
            return unknown_key(join(key, name), name, sorted(known))
    lacking = next(field for field in table.fields if field.required and field.name not in value)
    return f"{join(key, lacking.encode_name)}: missing, allowed: {allowed(lacking.type)}"


def unknown_key(key: str, name: str, known: Sequence[str]) -> str:
    """`key: unknown key, …` with the nearest of the `known` names, if one is near."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{key}: unknown key{hint}, allowed: {', '.join(known)}"


def _numbers(node: inspect.IntType | inspect.FloatType) -> str:
    noun = "an integer" if isinstance(node, inspect.IntType) else "a number"
    low = "" if node.gt is None else f" above {_number(node.gt)}"
    low = low if node.ge is None else f" from {_number(node.ge)}"
    upto = " to" if node.gt is None else " and at most"
    high = "" if node.le is None else f"{upto} {_number(node.le)}"
    return f"{noun}{low}{high}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _texts(node: inspect.StrType) -> str:
    if node.max_length is not None:
        return f"a string of {node.min_length or 0} to {node.max_length} characters"
    return "a non-empty string" if node.min_length else "a string"


def _either(node: inspect.Type) -> str:
    """A choice: TOML has no null, so `None` is a key left out and is not mentioned."""
    tables = structs(node)
    if len(tables) > 1:
        return f"a table with type = {_listing(table.tag for table in tables)}"
    words = [_listing(literals)] if (literals := list(_literals(node))) else []
    if isinstance(node, inspect.UnionType):
        words += [allowed(part) for part in node.types if not _is_choice(part)]
    return " or ".join(words)


def _is_choice(node: inspect.Type) -> bool:
    return isinstance(node, inspect.LiteralType | inspect.NoneType)


def _literals(node: inspect.Type) -> Iterator[Any]:
    if isinstance(node, inspect.LiteralType):
        yield from node.values
    elif isinstance(node, inspect.UnionType):
        for part in node.types:
            yield from _literals(part)


def _listing(values: Iterable[Any]) -> str:
    return ", ".join(json.dumps(value) for value in values)
