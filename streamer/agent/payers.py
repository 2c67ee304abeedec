"""Who was refused room in a ring that filled up: what the programs count by who pays for it."""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from streamer.errors import KernelError
from streamer.events.stream import Refused
from streamer.kernel.objects import CONTRACT
from streamer.kernel.state import KernelState

MOST_PAYERS = 32
"""Those that are told by themselves in a heartbeat."""

_KINDS = tuple(
    name.removeprefix("PAID_").lower().replace("_", ".", 1)
    for name, _, _ in CONTRACT["enum paid"]
    if name != "PAID_END"
)
_PAYERS = {
    number: name.removeprefix("PAYER_").lower() for name, number, _ in CONTRACT["enum payer_kind"]
}
_KEY = struct.Struct("<QII")  # struct payer_key: id, kind, ring buffer
_COUNTS = struct.Struct(f"<{len(_KINDS)}Q")
_AT = {
    name: {field: offset for field, offset, _ in CONTRACT[name]} for name in ("pressure", "payer")
}


class Payers:
    """Reads who was refused what, if anybody was."""

    def __init__(self, kernel: KernelState) -> None:
        """Nothing is read yet."""
        self._kernel = kernel
        self._totals: tuple[int, ...] = (0,) * len(_KINDS)
        self._found: list[Refused] = []

    def refused(self) -> list[Refused]:
        """Those who were refused anything since the agent started, with how much, the most first.

        Together they are what the programs refused. If they cannot be asked now, what they said
        last.
        """
        totals = _COUNTS.unpack_from(self._kernel.pressure, _AT["pressure"]["refused"])
        if totals == self._totals:
            return self._found
        try:
            entries = self._kernel.read("payers")
        except (KernelError, OSError):
            return self._found
        self._totals, self._found = totals, told(totals, entries)
        return self._found


def told(totals: tuple[int, ...], entries: list[tuple[bytes, bytes]]) -> list[Refused]:
    """What is to be told of keys and values of `payers`, where all were refused `totals`.

    What is in the totals and in no entry is of those whose entries have made way.
    """
    rest = Counter(dict(zip(_KINDS, totals, strict=True)))
    known = list(_by_payer(entries))
    known.sort(key=lambda one: -sum(one.kinds.values()))
    for one in known[:MOST_PAYERS]:
        rest.subtract(one.kinds)
    others = {kind: count for kind, count in rest.items() if count > 0}
    return [*known[:MOST_PAYERS], *([Refused("others", 0, others)] if others else ())]


def _by_payer(entries: Iterable[tuple[bytes, bytes]]) -> Iterator[Refused]:
    """Those who were refused anything. Each has an entry for each ring buffer that he writes to."""
    found: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for key, value in entries:
        number, kind, _ = _KEY.unpack(key)
        counts = _COUNTS.unpack_from(value, _AT["payer"]["refused"])
        found[kind, number].update(dict(zip(_KINDS, counts, strict=True)))
    for (kind, number), kinds in found.items():
        if refused := {name: count for name, count in kinds.items() if count}:
            yield Refused(_PAYERS[kind], number, refused)  # type: ignore[arg-type]
