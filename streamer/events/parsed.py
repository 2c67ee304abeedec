"""What is made of bytes of a record by a function of our own: op `parsed` of `layout.py`.

The function gets the bytes, and whether they were cut. It gives a tuple: first the value of the
field that has the bytes in `truncated`, then the other parts. It never raises, whatever the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from streamer.events import dns
from streamer.events.layout import RecordLayout


class Parsed(NamedTuple):
    """A function, and the parts that it gives: names in order, with their types and meanings."""

    parse: Callable[[bytes, bool], tuple[Any, ...]]
    parts: dict[str, tuple[str, str]]


def _parts(result: type, docs: dict[str, str]) -> dict[str, tuple[str, str]]:
    types = {name: hint.__forward_arg__ for name, hint in result.__annotations__.items()}
    if list(types) != list(docs):
        raise TypeError(f"{result.__name__} and what is said of its parts differ")
    return {name: (types[name], doc) for name, doc in docs.items()}


def hiding(records: Mapping[int, RecordLayout], names: Sequence[str]) -> dict[int, RecordLayout]:
    """The layouts whose DNS messages leave out what is in front of these names."""
    parse = dns.hiding(names)
    return {
        number: record._replace(
            fields=tuple(
                field._replace(argument=parse) if field.argument is dns.parse else field
                for field in record.fields
            )
        )
        for number, record in records.items()
    }


PARSED: dict[str, Parsed] = {"dns": Parsed(dns.parse, _parts(dns.DnsMessage, dns.PARTS))}
"""By the name that `bpf/events.h` has for it."""
