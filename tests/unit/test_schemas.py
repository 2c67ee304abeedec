"""The published schemas: what a consumer may rely on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamer.events.envelope import Envelope
from streamer.events.kinds import KINDS
from streamer.events.stream import STREAM_KINDS, StreamLoss

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = {
    kind: json.loads((ROOT / "schemas" / f"{kind}.json").read_text())
    for kind in (*KINDS, *STREAM_KINDS)
}


def shape(node: dict[str, Any], components: dict[str, Any]) -> str:
    """The type of a column that holds such values, nullable or not: what a table reader infers."""
    if "$ref" in node:
        return shape(components[node["$ref"].rpartition("/")[2]], components)
    if "anyOf" in node:
        (one,) = {shape(part, components) for part in node["anyOf"]} - {"null"}
        return one
    if "enum" in node:
        (one,) = {type(value).__name__ for value in node["enum"]} - {"NoneType"}
        return {"str": "string", "int": "integer"}[one]
    kind = node["type"]
    if kind == "array":
        return f"array of {shape(node['items'], components)}"
    if kind == "object" and "properties" in node:
        inner = (f"{k}: {shape(v, components)}" for k, v in sorted(node["properties"].items()))
        return "{" + ", ".join(inner) + "}"
    if kind == "object":
        return f"table of {shape(node['additionalProperties'], components)}"
    return str(kind)


def columns(kinds: list[str]) -> Iterator[tuple[str, str, str]]:
    for kind in kinds:
        schema = SCHEMAS[kind]
        for name, node in schema["properties"].items():
            yield name, shape(node, schema.get("$defs", {})), kind


def test_one_name_has_one_type_in_all_kinds() -> None:
    """By default all kinds travel in one topic, which a table reader reads into one table."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, type_name, kind in columns(list(SCHEMAS)):
        found.setdefault(name, {}).setdefault(type_name, []).append(kind)
    assert {name: types for name, types in found.items() if len(types) > 1} == {}


@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_the_streams_own_records_are_numbered_and_have_no_ring_of_their_own(kind: str) -> None:
    schema = SCHEMAS[kind]
    assert "seq" in schema["required"]
    assert {"ring", "cpu"}.isdisjoint(schema["required"])


def test_the_number_of_a_stream_record_is_that_of_its_id() -> None:
    envelope = Envelope("here")
    made = [envelope.record(StreamLoss, stage="sink", count=1, kinds={}) for _ in range(3)]
    assert [record.seq for record in made] == [1, 2, 3]
    assert [record.id for record in made] == [f"{envelope.run_id}-stream-{n}" for n in (1, 2, 3)]
