"""docs/reliability.md: a line for each fault."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from tests.kernel.agent import ROOT

PAGE = ROOT / "docs" / "reliability.md"
HEAD = (
    *("fault", "offered", "delivered", "duplicates", "accounted", "unexplained"),
    *("peak memory, MB", "recovery, s"),
)
BEGIN, END = "<!-- table: written by `make test-faults WRITE=--write` -->", "<!-- end of table -->"


class Row(msgspec.Struct, frozen=True):
    """What came of one fault."""

    fault: str
    offered: int
    """Events that the test made, by its own count."""
    delivered: int
    """Of them, those that an independent client found at the broker, each once."""
    duplicates: int
    """Further copies of them."""
    accounted: int
    """Of those offered, the ones that the stream itself says are lost."""
    unexplained: int
    """What `streamer verify` cannot explain."""
    peak_mb: float
    """Most resident memory of worker and helper together."""
    recovery: float | None
    """Seconds from the end of the fault until events arrive at the offered rate; None: it has
    no end of its own, or there is nothing to measure.
    """
    note: str = ""

    @property
    def line(self) -> str:
        """A line of the table."""
        counts = (self.offered, self.delivered, self.duplicates, self.accounted, self.unexplained)
        recovery = "-" if self.recovery is None else f"{self.recovery:.1f}"
        fault = f"{self.fault} ({self.note})" if self.note else self.fault
        cells = (fault, *(f"{one:,}" for one in counts), f"{self.peak_mb:.0f}", recovery)
        return f"| {' | '.join(cells)} |"


def written(page: str, rows: Mapping[str, Row]) -> str:
    """The page with these rows in place of the same faults' before; new ones at the end."""
    before, _, rest = page.partition(BEGIN)
    old, ended, after = rest.partition(END)
    assert ended, f"{PAGE} has no place for the table"
    lines = {fault_of(line): line for line in old.splitlines() if line.startswith("| ")}
    for title in (HEAD[0], "---"):
        lines.pop(title, None)
    for row in rows.values():
        key = next((fault for fault in lines if fault == fault_of(row.line)), None)
        lines[key or fault_of(row.line)] = row.line
    top = [f"| {' | '.join(HEAD)} |", f"| --- |{' ---: |' * (len(HEAD) - 1)}"]
    return "\n".join([before + BEGIN, "", *top, *lines.values(), "", END]) + after


def fault_of(line: str) -> str:
    """The fault that a line of the table is about, without its note."""
    return line.removeprefix("| ").split(" | ")[0].partition(" (")[0]
