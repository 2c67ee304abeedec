"""Which kinds of events to stream, chosen by globs."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

from streamer.errors import ConfigError

DEFAULT_EVENTS: tuple[str, ...] = (
    *("process.*", "xdp.*", "syscall.*"),
    *("net.connect", "net.accept", "net.close", "net.listen", "net.bind"),
    *("net.retransmit", "net.udp", "net.flow"),
)
"""What one leaves on in production. Left out are `file.open`, of which there are many,
`net.drop`, of which strangers can make many, and `net.dns`, for which every packet pays, and
whose names can be private."""

ALWAYS_ON = "stream."


def select(
    patterns: Sequence[str],
    known: Collection[str],
    where: str = "--events",
    missing: Mapping[str, str] = MappingProxyType({}),
) -> frozenset[str]:
    """The kinds that `patterns` choose out of `known`, in the order given.

    A pattern is a glob such as `net.*`, or `default` for the default set, and may be several
    with commas between them. A leading `-` or `!` takes kinds away; where the first pattern
    does, it takes from the default set, which is also what no pattern at all chooses. Kinds
    `stream.*` are always on: they are neither selectable nor in the result. Nor are those that are
    `missing`, for the reason given there; a pattern that chooses no others is an error.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing left. `where` is where the
            patterns are from, for the message.
    """
    possible = (kind for kind in known if not kind.startswith(ALWAYS_ON))
    selectable = frozenset(possible) - missing.keys()
    terms = list(_terms(patterns))
    chosen = _default(selectable) if not terms or terms[0][0] else frozenset[str]()
    for removes, glob in terms:
        matched = _default(selectable) if glob == "default" else _matching(glob, selectable)
        if not matched and glob != "default":
            reasons = [why for kind, why in missing.items() if fnmatchcase(kind, glob)]
            raise ConfigError(_no_match(where, glob, selectable, reasons))
        chosen = chosen - matched if removes else chosen | matched
    if not chosen:
        raise ConfigError(f"{where}: no kind of event is left, allowed: {_listing(selectable)}")
    return chosen


def _terms(patterns: Sequence[str]) -> Iterator[tuple[bool, str]]:
    """Each pattern as (whether it removes, glob)."""
    for pattern in patterns:
        for term in pattern.split(","):
            text = term.strip()
            removes = text.startswith(("-", "!"))
            glob = text[1:].strip() if removes else text
            if glob or removes:
                yield removes, glob


def _matching(glob: str, kinds: frozenset[str]) -> frozenset[str]:
    return frozenset(kind for kind in kinds if fnmatchcase(kind, glob))


def _default(selectable: frozenset[str]) -> frozenset[str]:
    return frozenset[str]().union(*(_matching(glob, selectable) for glob in DEFAULT_EVENTS))


def _no_match(where: str, glob: str, selectable: frozenset[str], reasons: list[str]) -> str:
    found = f"{where}: found {json.dumps(glob)}"
    if reasons:
        return f"{found}, and {reasons[0]}"
    if glob.startswith(ALWAYS_ON):
        return f"{found}, but {ALWAYS_ON}* is always on and cannot be chosen"
    return f"{found}, which matches no event, allowed: {_listing(selectable)}"


def _listing(selectable: frozenset[str]) -> str:
    return "default, or globs of " + ", ".join(sorted(selectable))
