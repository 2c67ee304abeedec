"""The published schemas: what a consumer may rely on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from streamer.events.catalogue import PUBLISHED
from streamer.events.envelope import Envelope
from streamer.events.kinds import KINDS, Ring
from streamer.events.schema import any_of
from streamer.events.stream import StreamLoss
from streamer.kernel.tags import RINGS
from tests.golden.cases import Case, load
from tools import schemas

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = {kind: json.loads((ROOT / "schemas" / f"{kind}.json").read_text()) for kind in PUBLISHED}


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
    if kind == "array" and "prefixItems" in node:
        (one,) = {shape(part, components) for part in node["prefixItems"]}
        return f"array of {one}"
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


@pytest.mark.parametrize("kind", [kind for kind in PUBLISHED if kind not in KINDS])
def test_the_streams_own_records_are_numbered_and_have_no_ring_of_their_own(kind: str) -> None:
    schema = SCHEMAS[kind]
    assert "seq" in schema["required"]
    assert {"ring", "cpu"}.isdisjoint(schema["required"])


def test_the_number_of_a_stream_record_is_that_of_its_id() -> None:
    envelope = Envelope("here")
    made = [envelope.record(StreamLoss, stage="sink", count=1, kinds={}) for _ in range(3)]
    assert [record.seq for record in made] == [1, 2, 3]
    assert [record.id for record in made] == [f"{envelope.run_id}-stream-{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("case", load(), ids=lambda case: case.event["event"])
def test_what_the_kernel_wrote_is_within_its_schema(case: Case) -> None:
    """Reading it back into its Struct checks types, ranges and choices."""
    schema = SCHEMAS[case.event["event"]]
    assert case.event.keys() <= schema["properties"].keys()
    assert case.event.keys() >= set(schema["required"])
    msgspec.convert(case.event, KINDS[case.event["event"]].struct, strict=True)


def tables(node: Any) -> Iterator[dict[str, Any]]:
    """Every description of an object with named fields, at any depth."""
    if isinstance(node, dict):
        if "properties" in node:
            yield node
        for inner in node.values():
            yield from tables(inner)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_no_other_field_is_sent(kind: str) -> None:
    printed = any_of([PUBLISHED[kind].struct])
    for found in (*tables(SCHEMAS[kind]), *tables(printed)):
        assert found["additionalProperties"] is False


def test_the_rings_are_those_of_the_programs() -> None:
    assert get_args(Ring) == RINGS


# ---------------------------------------------------------------- against the last release

Change = Callable[[dict[str, Any]], object]


def field(name: str, **change: Any) -> Change:
    return lambda schema: schema["properties"][name].update(change)


def part(name: str, field: str, **change: Any) -> Change:
    return lambda schema: schema["$defs"][name]["properties"][field].update(change)


def new_field(*, required: bool) -> Change:
    def add(schema: dict[str, Any]) -> None:
        schema["properties"]["more"] = {"type": "integer"}
        schema["required"] += ["more"] if required else []

    return add


REFUSED: dict[str, tuple[str, Change, str]] = {
    "field removed": (
        "net.connect",
        lambda schema: (schema["properties"].pop("fd", 0), schema["properties"].pop("errno")),
        "net.connect: errno: is gone",
    ),
    "type changed": (
        "process.exit",
        field("signal", type="string"),
        "process.exit: signal: was ",
    ),
    "range widened": ("net.close", field("remote_port", maximum=1 << 17), "net.close: remote_port"),
    "range narrowed": ("net.close", field("remote_port", minimum=1), "net.close: remote_port: was"),
    "a value more": (
        "net.close",
        field("direction", enum=["unknown", "outbound", "inbound", "lost"]),
        "net.close: direction: was ",
    ),
    "a value less": (
        "net.close",
        field("direction", enum=["outbound", "inbound"]),
        "net.close: direction: was ",
    ),
    "items": (
        "process.exec",
        field("argv", items={"type": "integer"}),
        "process.exec: argv[]: was",
    ),
    "values of a table": (
        "stream.loss",
        field("kinds", additionalProperties={"type": "string"}),
        "stream.loss: kinds.*: was ",
    ),
    "required no more": (
        "file.open",
        lambda schema: schema["required"].remove("path"),
        "file.open: path: was always there, and need not be now",
    ),
    "required now": (
        "stream.loss",
        lambda schema: schema["required"].append("reason"),
        "stream.loss: reason: need not be in records of the last release, and is required now",
    ),
    "new and required": (
        "file.open",
        new_field(required=True),
        "file.open: more: is new, and has to be OPTIONAL: the last release lacks it",
    ),
    "within a table": (
        "stream.heartbeat",
        part("KindCounts", "lost", type="string"),
        "stream.heartbeat: counts.*.lost: was ",
    ),
    "within a list": (
        "stream.manifest",
        lambda schema: schema["$defs"]["ProgramReport"]["properties"].pop("hook"),
        "stream.manifest: programs[].hook: is gone",
    ),
    "a table no more": (
        "stream.heartbeat",
        lambda schema: schema["properties"].update(reader={"type": "string"}),
        'stream.heartbeat: reader: was {"properties": ',
    ),
    "null no more": ("stream.loss", field("cpu", anyOf=[{"type": "integer"}]), "stream.loss: cpu:"),
}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A tree in which today's schemas are the released ones, by the command itself."""
    shutil.copytree(ROOT / "schemas", tmp_path / "schemas", ignore=lambda *_: ["released"])
    assert schemas.main(["--root", str(tmp_path)]) == 0
    assert schemas.main(["--root", str(tmp_path), "--release"]) == 0
    names = {path.stem for path in (tmp_path / "schemas" / "released").iterdir()}
    own = {"check.schema", "status.schema", "verify.schema"}
    assert names == SCHEMAS.keys() | own
    return tmp_path


def change(root: Path, kind: str, change: Change) -> None:
    path = root / "schemas" / f"{kind}.json"
    schema = json.loads(path.read_text())
    change(schema)
    path.write_text(json.dumps(schema))


@pytest.mark.parametrize(("kind", "made", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_reader_of_the_last_release_cannot_read_is_refused(
    released: Path, capsys: pytest.CaptureFixture[str], kind: str, made: Change, message: str
) -> None:
    change(released, kind, made)
    assert schemas.main(["--root", str(released)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"schemas: {message}")
    assert schemas.main(["--root", str(released), "--release"]) == 1  # nor can it be released
    change(released, kind, lambda schema: schema.update(SCHEMAS[kind]))
    assert schemas.main(["--root", str(released)]) == 0


def test_a_kind_that_is_gone_is_refused(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (released / "schemas" / "file.open.json").unlink()
    assert schemas.main(["--root", str(released)]) == 1
    assert capsys.readouterr().err == "schemas: file.open: is gone\n"


ACCEPTED: dict[str, Change] = {
    "new and optional": new_field(required=False),
    "other words": field("direction", description="in other words", default="unknown"),
    "another order": lambda schema: (
        schema["properties"]["direction"]["enum"].reverse(),
        schema["required"].reverse(),
    ),
}


@pytest.mark.parametrize("made", ACCEPTED.values(), ids=ACCEPTED)
def test_what_both_can_read_is_accepted(released: Path, made: Change) -> None:
    change(released, "net.close", made)
    assert schemas.main(["--root", str(released)]) == 0


def test_a_new_kind_is_accepted(released: Path) -> None:
    directory = released / "schemas"
    shutil.copy(directory / "file.open.json", directory / "file.shut.json")
    assert schemas.main(["--root", str(released)]) == 0


def test_what_is_named_otherwise_and_means_the_same_is_accepted(released: Path) -> None:
    def rename(schema: dict[str, Any]) -> None:
        schema["$defs"]["Counts"] = schema["$defs"].pop("KindCounts")
        schema["properties"]["counts"]["additionalProperties"]["$ref"] = "#/$defs/Counts"

    change(released, "stream.heartbeat", rename)
    assert schemas.main(["--root", str(released)]) == 0
