"""The text of the JSON Schemas and of `docs/events.md`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from streamer.events.layout import KindInfo
from streamer.events.schema import of_kind
from tools.gen.model import Field, Model, Record
from tools.gen.modules import words_of

_HEAD = """\
<!-- GENERATED from bpf/events.h by `make gen`: do not edit. -->
# Events

One flat JSON object (or MessagePack map) per event. A reader takes what it knows and ignores other
fields: a later release may send more, and takes none away. `schemas/` has the values of
each. Every event of the kernel begins with the same fields:
"""


def schemas(structs: dict[str, type]) -> dict[str, str]:
    """The text of `schemas/KIND.json` for every published Struct."""
    return {f"{kind}.json": pretty(of_kind(kind, cls)) for kind, cls in structs.items()}


def pretty(value: object) -> str:
    """`value` as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def events_page(
    model: Model, summaries: Iterable[KindInfo], stream_kinds: Iterable[KindInfo]
) -> str:
    """The text of `docs/events.md`."""
    lines = [_HEAD, *_table((*model.base.fields, *model.base.end))]
    lines += ["", "Then, where the event has a task, who it was:", "", *_table(model.task)]
    for record in model.records:
        lines += _section(record)
    lines += ["", "# Summaries", ""]
    lines += ["What programs counted, made into records by the agent every `summary_seconds`."]
    lines += _made_by_agent(summaries)
    lines += ["", "# Records of the stream itself", ""]
    lines += ["Made by the agent, in the same topics; always on."]
    lines += _made_by_agent(stream_kinds)
    return "\n".join(lines) + "\n"


def _made_by_agent(kinds: Iterable[KindInfo]) -> Iterator[str]:
    for info in kinds:
        yield from ("", f"## {info.kind}", "", info.doc, "")
        yield from _rows((f.name, f.type, f.doc) for f in info.fields)


def _section(record: Record) -> Iterator[str]:
    task = "" if record.has_task else " It has no task."
    yield from ("", f"## {record.kind}", "", f"{record.doc} Ring: {record.ring}.{task}")
    if record.unseen:
        yield from ("", f"Never observed: {'; '.join(record.unseen)}.")
    yield from ("", *_table(record.fields))


def _table(fields: tuple[Field, ...]) -> list[str]:
    return _rows((f.name, words_of(f), f.doc) for f in fields)


def _rows(fields: Iterable[tuple[str, str, str]]) -> list[str]:
    rows = [f"| `{name}` | {words} | {_cell(doc)} |" for name, words, doc in fields]
    return ["| field | type | meaning |", "| --- | --- | --- |", *rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
