"""The command: `python -m tools.schemas` refuses what readers of the last release could not read.

`schemas/released/` holds the schemas of the last release as they were; `--release` puts today's
there. Hosts are not upgraded at once and topics keep old records, so readers of both releases get
records of both:

* a reader of the last release gets today's: what it requires is there, with no value that it does
  not allow (it ignores fields that it does not know);
* a reader of today's gets those of the last release: what is new is optional, and no value that
  was allowed is not any more.

So no kind and no field goes, a field keeps its type and its values, and a new one is `OPTIONAL`.
What has to be different gets a new name beside the old one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Schema = Mapping[str, Any]

_NOT_EVENTS = "config.schema.json"
_WORDS = frozenset({"$schema", "$defs", "title", "description", "default"})


def main(argv: list[str] | None = None) -> int:
    """Say what is incompatible, one line each; 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m tools.schemas", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("."), help="where schemas/ is")
    parser.add_argument("--release", action="store_true", help="make today's the released ones")
    arguments = parser.parse_args(argv)
    current = arguments.root / "schemas"
    released = current / "released"
    mistakes = list(incompatible(_read(released), _read(current)))
    for mistake in mistakes:
        print(f"schemas: {mistake}", file=sys.stderr)
    if arguments.release and not mistakes:
        released.mkdir(exist_ok=True)
        for path in _paths(current):
            shutil.copyfile(path, released / path.name)
    return 1 if mistakes else 0


def incompatible(released: Mapping[str, Schema], current: Mapping[str, Schema]) -> Iterator[str]:
    """What a reader of the one set of schemas, by kind, could not read of the other."""
    for kind, old in released.items():
        if kind in current:
            new = current[kind]
            yield from _differences(kind, _resolved(old, old), _resolved(new, new))
        else:
            yield f"{kind}: is gone"


def _differences(where: str, old: Schema, new: Schema) -> Iterator[str]:
    """`old` and `new` are what the place `where` allows, without references and words."""
    if "properties" in old and "properties" in new:
        yield from _of_fields(where, old, new)
    elif old.keys() == new.keys() == {"type", "items"}:
        yield from _differences(f"{where}[]", old["items"], new["items"])
    elif old.keys() == new.keys() == {"type", "additionalProperties"}:
        yield from _differences(
            f"{where}.*", old["additionalProperties"], new["additionalProperties"]
        )
    elif old != new:
        yield f"{where}: was {json.dumps(old)}, and is {json.dumps(new)}"


def _of_fields(where: str, old: Schema, new: Schema) -> Iterator[str]:
    before, now = old["properties"], new["properties"]
    for name in before:
        place = f"{where}: {name}" if ":" not in where else f"{where}.{name}"
        if name not in now:
            yield f"{place}: is gone"
            continue
        if name in old["required"] and name not in new["required"]:
            yield f"{place}: was always there, and need not be now"
        if name in new["required"] and name not in old["required"]:
            yield f"{place}: need not be in records of the last release, and is required now"
        yield from _differences(place, before[name], now[name])
    for name in now:
        if name not in before and name in new["required"]:
            yield f"{where}: {name}: is new, and has to be OPTIONAL: the last release lacks it"


def _resolved(node: Any, root: Schema) -> Any:
    """What `node` allows: references followed, words left out, choices in order."""
    if isinstance(node, list):
        return [_resolved(one, root) for one in node]
    if not isinstance(node, Mapping):
        return node
    if "$ref" in node:
        return _resolved(root["$defs"][node["$ref"].rpartition("/")[2]], root)
    if "properties" in node:
        fields = {name: _resolved(one, root) for name, one in node["properties"].items()}
        return {"properties": fields, "required": sorted(node.get("required", ()))}
    kept = {key: _resolved(one, root) for key, one in node.items() if key not in _WORDS}
    for key in kept.keys() & {"enum", "anyOf"}:
        kept[key] = sorted(kept[key], key=json.dumps)
    return kept


def _paths(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.glob("*.json")) if path.name != _NOT_EVENTS]


def _read(directory: Path) -> dict[str, Schema]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in _paths(directory)}


if __name__ == "__main__":
    sys.exit(main())
