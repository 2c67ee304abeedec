"""JSON Schema of what is published, from the Structs.

A schema says exactly what this release sends: no other field (`additionalProperties`), and which
fields every release sends (`required`). A reader takes what it knows and ignores the rest, since a
later release may send more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import inspect

DIALECT = "https://json-schema.org/draft/2020-12/schema"

OPTIONAL = {"optional": True}
"""`Meta(extra=…)` of a field that is always sent now, and was not by an older release."""


def any_of(structs: Sequence[type]) -> dict[str, Any]:
    """The schema of an event that is one of `structs`."""
    choices, components = _components(structs)
    choice = choices[0] if len(choices) == 1 else {"anyOf": list(choices)}
    return {"$schema": DIALECT, **choice, "$defs": components}


def of_kind(kind: str, struct: type) -> dict[str, Any]:
    """The schema of a kind, with its fields at the top."""
    _, components = _components([struct])
    own = components.pop(struct.__name__)
    return {"$schema": DIALECT, **own, "title": kind} | (
        {"$defs": components} if components else {}
    )


def _components(structs: Sequence[type]) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    choices, components = msgspec.json.schema_components(structs, ref_template="#/$defs/{name}")
    optional = {struct.__name__: set(_optional(struct)) for struct in structs}
    for name, component in components.items():
        if "properties" in component:
            later = optional.get(name, set())
            component["required"] = [one for one in component["required"] if one not in later]
            component["additionalProperties"] = False
    return choices, components


def _optional(struct: type) -> Iterator[str]:
    node = inspect.type_info(struct)
    assert isinstance(node, inspect.StructType)
    for field in node.fields:
        if isinstance(field.type, inspect.Metadata) and field.type.extra == OPTIONAL:
            yield field.encode_name
