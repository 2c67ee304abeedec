"""The table in docs/reliability.md."""

from __future__ import annotations

from tests.faults.table import BEGIN, END, HEAD, Row, fault_of, written


def row(fault: str, offered: int, note: str = "") -> Row:
    return Row(fault, offered, offered, 0, 0, 0, 99.4, 0.25, note)


def test_rows_are_put_in_place_of_their_own() -> None:
    page = f"before\n\n{BEGIN}\n{END}\nafter\n"
    for one in (row("first", 1), row("second (of two)", 2), row("first", 3000, "again")):
        page = written(page, {one.fault: one})
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert lines[0] == f"| {' | '.join(HEAD)} |"
    assert lines[2:] == [
        "| first (again) | 3,000 | 3,000 | 0 | 0 | 0 | 99 | 0.2 |",
        "| second (of two) | 2 | 2 | 0 | 0 | 0 | 99 | 0.2 |",
    ]
    assert page.startswith("before\n\n")
    assert page.endswith(f"{END}\nafter\n")
    assert fault_of(lines[2]) == "first"
