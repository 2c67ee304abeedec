"""What docs/security_review.md and docs/limits.md name as proof is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamer.kernel.objects import CONTRACT, SENSORS
from streamer.privilege.requests import REQUESTS

ROOT = Path(__file__).resolve().parents[2]
REVIEW = (ROOT / "docs" / "security_review.md").read_text()
LIMITS = (ROOT / "docs" / "limits.md").read_text()
NAMED = sorted(
    set(re.findall(r"`([\w]+/[\w./-]+\.\w+(?:::\w+)?|Dockerfile|compose\.yaml)`", REVIEW + LIMITS))
)
STATUSES = {"holds", "in part", "open"}


def functions(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name


def test_it_names_proofs() -> None:
    assert len([name for name in NAMED if "::" in name]) > 80


@pytest.mark.parametrize("named", NAMED)
def test_what_it_names_is_there(named: str) -> None:
    """A test that is renamed takes its line with it."""
    path, _, test = named.partition("::")
    assert (ROOT / path).is_file()
    if test:
        assert test in functions(ROOT / path)


def rows() -> Iterator[list[str]]:
    """Of the tables whose second column is the status."""
    wanted = False
    for line in REVIEW.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            wanted = False
        elif cells[1] == "status":
            wanted = True
        elif wanted and not cells[0].startswith("---"):
            yield cells


def test_every_line_has_a_status_and_what_shows_it() -> None:
    for threat, status, *_, proof in rows():
        assert status in STATUSES, threat
        assert status == "open" or re.search(r"`\w+/[\w./-]+", proof), threat


def names_in_backticks(text: str = REVIEW) -> set[str]:
    return set(re.findall(r"`([\w.]+)`", text))


@pytest.mark.parametrize("text", [REVIEW, LIMITS], ids=["review", "limits"])
def test_every_table_of_every_sensor_has_a_line(text: str) -> None:
    """A new map needs one: what happens when it is full."""
    maps = {one.name for sensor in SENSORS.values() for one in sensor.maps}
    declared = {
        name
        for path in (ROOT / "bpf").rglob("*.[ch]")
        if not path.name.startswith(("bench", "test_"))
        for name in re.findall(r"^}\s*(\w+)\s+SEC\(\"\.maps\"\)", path.read_text(), re.M)
    }
    assert (maps | declared) - names_in_backticks(text) - {"name"} == set()


def test_every_fault_is_named_among_the_limits() -> None:
    """But for those that are about no table, and no input."""
    names = {name for name, _, _ in CONTRACT["enum fault"]} - {"FAULT_END"}
    faults = {name.removeprefix("FAULT_").lower() for name in names}
    others = {"unreadable", "change_unseen", "stack_unreadable"}
    assert faults - names_in_backticks(LIMITS) == others


def test_every_request_to_the_helper_has_a_line() -> None:
    assert REQUESTS.keys() - names_in_backticks() == set()
