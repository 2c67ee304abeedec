"""The configuration's reference, `docs/configuration.md`, and its JSON Schema, both made from
`settings.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

from streamer.config.messages import allowed
from streamer.config.selection import DEFAULT_EVENTS
from streamer.config.settings import Settings

EXAMPLE = """\
events = ["default", "file.open"]

[filters]
exclude_comms = ["node_exporter"]
path_prefixes = ["/etc", "/usr"]

[[sinks]]
type = "kafka"
bootstrap = ["kafka-1:9093", "kafka-2:9093"]
topic = "kernel-{category}"

[sinks.tls]
ca_file = "/etc/streamer/ca.pem"

[sinks.sasl]
username = "streamer"
password_file = "/etc/streamer/kafka-password"

[[sinks]]
type = "file"
path = "/var/log/streamer.ndjson"
"""

_HEAD = f"""\
<!-- GENERATED from streamer/config/settings.py by `make gen`: do not edit. -->
# Configuration

`streamer run -c FILE` reads a TOML file; without `-c`, `/etc/streamer/streamer.toml` if that is
there. Every setting has a default, so that `streamer run` works without a file. A mistake is one
line that names the file, the key, what was found and what is allowed, and ends with exit code 2.
Sizes are bytes.

```toml
{EXAMPLE}```

The command line wins over the file: an option replaces the setting of its name, `--sink`
replaces all of the file's sinks, and `--encoding` is for every sink whose URL does not name an
encoding itself. Secrets come from an environment variable or a file, never from the command
line or the configuration itself.

## Choosing events

`events` and `--events` take globs of the kinds that `streamer events` lists, as in
`["default", "file.*"]`. `default` is {", ".join(f"`{glob}`" for glob in DEFAULT_EVENTS)}. A leading
`-` or `!` takes kinds away: `["*", "-process.fork"]`. `stream.*` is always on.

## Sinks as URLs

| URL | sink |
| --- | --- |
| `stdout:` | standard output |
| `file:PATH` | a file |
| `kafka://HOST:PORT,HOST:PORT/TOPIC` | Kafka; `kafkas://` with TLS |
| `mqtt://USER@HOST:PORT/TOPIC/LEVELS` | MQTT; `mqtts://` with TLS |

`?key=value&key=value` sets the other settings of the sink, as in
`kafka://127.0.0.1:9092/events?encoding=msgpack&linger_ms=5`; those of its tables are written
`tls.ca_file=PATH`. The port is 9092, 1883 or, for `mqtts`, 8883 unless given.
"""


def documentation() -> str:
    """The text of `docs/configuration.md`: every setting with its limits, default and meaning."""
    return "\n".join([_HEAD, *_sections()]) + "\n"


def schema() -> dict[str, Any]:
    """The JSON Schema of the configuration."""
    made = msgspec.json.schema(Settings)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of streamer",
    }
    plain: dict[str, Any] = json.loads(msgspec.json.encode(head | made))
    return plain


def _sections() -> Iterator[str]:
    (root,) = structs(inspect.type_info(Settings))
    yield "## Top level\n"
    yield from _table(root)
    for field in root.fields:
        for table in structs(field.type):
            yield from _section(f"[{field.encode_name}]", table)
        for sink in structs(item(field.type) or field.type) if item(field.type) else ():
            yield from _sink(field.encode_name, sink)


def _sink(name: str, sink: inspect.StructType) -> Iterator[str]:
    yield from _section(f'[[{name}]] with type = "{sink.tag}"', sink)
    for field in sink.fields:
        for table in structs(field.type):
            title = f'[{name}.{field.encode_name}] of type = "{sink.tag}"'
            yield from _section(title, table)


def _section(title: str, table: inspect.StructType) -> Iterator[str]:
    yield f"\n## `{title}`\n"
    yield f"{_doc(table.cls)}\n"
    yield from _table(table)


def _doc(cls: type) -> str:
    return "\n".join(line.strip() for line in (cls.__doc__ or "").strip().splitlines())


def _table(table: inspect.StructType) -> Iterator[str]:
    yield "| key | allowed | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for field in table.fields:
        cells = (f"`{field.encode_name}`", allowed(field.type), _default(field), meaning(field))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def meaning(field: inspect.Field) -> str:
    """What a setting means, from its `doc`."""
    node = field.type
    extra = node.extra_json_schema if isinstance(node, inspect.Metadata) else None
    return str((extra or {}).get("description", ""))


def _default(field: inspect.Field) -> str:
    if field.required:
        return "required"
    if field.default_factory is dict:
        return "`{}`"
    if field.default is msgspec.NODEFAULT or field.default is None:
        return "none" if field.default is None else "see below"
    default = json.dumps(msgspec.to_builtins(field.default))
    return f"`{default}`"


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
