"""The rooms of `streamer/`: each imports those below it, and none above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "streamer"

BELOW = {
    "cli": {"agent", "verify", "terminal", "operation", "privilege", "kernel", "config", "events"},
    "agent": {
        *("summaries", "profiles", "terminal", "operation", "spool", "sinks", "ring"),
        *("privilege", "kernel", "config", "events"),
    },
    "verify": {"terminal", "sinks", "config", "events"},
    "summaries": {"kernel", "events"},
    "profiles": set[str](),
    "terminal": {"operation", "kernel", "config", "events"},
    "operation": {"events"},
    "spool": {"sinks", "config", "events"},
    "sinks": {"privilege", "config", "events"},
    "ring": {"kernel", "events"},
    "privilege": {"kernel", "config"},
    "kernel": {"config", "events"},
    "config": {"events"},
    "events": set[str](),
}
"""What each room may import, `errors` and the package itself apart. In ARCHITECTURE.md, too."""


def imported(path: Path) -> Iterator[str]:
    """The rooms that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("streamer."):
                yield name.split(".")[1]


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_those_below_it(room: str) -> None:
    paths = list((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    found = {name for path in paths for name in imported(path)}
    assert found - {room, "errors", "__version__"} <= BELOW[room]


def test_no_room_is_missing() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == BELOW.keys() - {"cli"}
    below: set[str] = set()
    for room in reversed(BELOW):
        assert BELOW[room] <= below, f"{room} imports what is not below it"
        below.add(room)
