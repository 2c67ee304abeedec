"""The golden records: raw records of every kind, as the kernel wrote them, and their events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

FILE = Path(__file__).parent / "records.json"
PLACE = Path("/tmp/streamer-golden")
CLOCK_OFFSET_NS = 1_700_000_000_000_000_000
CONSTANTS = {
    "schema": 3,
    "host": "golden",
    "boot_id": "00000000-0000-0000-0000-000000000000",
}
ID_PREFIX = "golden"


class Case(NamedTuple):
    """A record, the ring that it came from, and the event that is published for it."""

    ring: str
    record: bytes
    event: dict[str, Any]


def constants(ring: str) -> dict[str, object]:
    """What the decoder of a ring is given."""
    return {**CONSTANTS, "ring": ring, "time": msgspec.UNSET, "replayed": msgspec.UNSET}


def published(event: msgspec.Struct) -> dict[str, Any]:
    """An event as a consumer gets it."""
    found: dict[str, Any] = json.loads(msgspec.json.encode(event))
    return found


def load() -> list[Case]:
    rows = json.loads(FILE.read_text())
    return [Case(row["ring"], bytes.fromhex(row["record"]), row["event"]) for row in rows]


def save(cases: list[Case]) -> None:
    rows = [{"ring": case.ring, "record": case.record.hex(), "event": case.event} for case in cases]
    FILE.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
