"""The arithmetic of what a host pays for being observed, and what is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.audit import deleted, parsed, used_by_host
from benchmarks.cpu import Reading, Sample
from benchmarks.host import OPERATIONS, Observed, Pair, Spread, compared
from benchmarks.observers import IncompleteError, Observer, Place, Record
from benchmarks.report import as_markdown, as_text, host_table, unrelated_table
from tests.kernel.scope import Scope

STATUS = """\
enabled 1
failure 1
pid 812
backlog_limit 8192
lost 3
loginuid_immutable 0 unlocked
"""


def observed(ns: float, unrelated_ns: float, operations: int = len(OPERATIONS)) -> Observed:
    names = [operation.name for operation in OPERATIONS[:operations]]
    return Observed(dict.fromkeys(names, Sample(ns, ns / 10, 0)), unrelated_ns)


def test_a_sample_counts_threads_that_begin_and_not_those_that_end() -> None:
    before = Reading(1_000, 500, {2: 100, 30: 40, 71: 7})
    after = Reading(5_000, 900, {2: 120, 30: 440, 99: 80})
    sample = Sample.between(before, after, 10)
    assert sample == Sample(400, 40, 50)
    assert sample.total == 490
    assert sample.less(Sample(100, 50, 50)) == Sample(300, -10, 0)


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([9, 1, 5, 3, 7]) == Spread(5, 3, 7)
    assert Spread.of([4]) == Spread(4, 4, 4)


def test_each_turn_is_compared_with_the_one_before_it() -> None:
    """The machine gets slower, and that is not ascribed to the observer."""
    found = {
        "streamer": [
            Pair(observed(100, 200), observed(130, 220)),
            Pair(observed(300, 260), observed(330, 280)),
            Pair(observed(500, 300), observed(530, 320)),
        ]
    }
    cost = compared(found, {})
    alone, added = cost.operations[:2]
    assert [alone.observer, added.observer] == ["", "streamer"]
    assert alone.total.middle == pytest.approx(330)
    assert added.total == pytest.approx(Spread(33, 33, 33))
    assert added.parts == pytest.approx(Sample(30, 3, 0))
    assert [row.ns.middle for row in cost.unrelated] == [260, 20]


def test_an_observer_is_in_the_rows_of_what_was_measured_with_it() -> None:
    pair = Pair(observed(100, 200), observed(130, 220))
    few = Pair(observed(100, 200, 1), observed(140, 220, 1))
    cost = compared({"streamer": [pair], "streamer, default events": [few]}, {})
    names = [(row.operation, row.observer) for row in cost.operations]
    assert (OPERATIONS[0].name, "streamer, default events") in names
    assert (OPERATIONS[-1].name, "streamer, default events") not in names
    assert (OPERATIONS[-1].name, "streamer") in names
    targets = {row.observer for row in cost.operations if row.target}
    assert targets == {"streamer"}


def test_a_reason_is_told_of_who_has_no_number() -> None:
    pair = Pair(observed(100, 200), observed(130, 220))
    cost = compared({"bpftrace": [pair]}, {"bpftrace": "late", "auditd": "no audit here"})
    assert cost.reasons == {"auditd": "no audit here"}
    for text in (as_text(host_table(cost)), as_markdown(host_table(cost))):
        assert "auditd is left out: no audit here" in text
        assert "+0.03" in text
        assert "late" not in text
    assert "+20.0" in as_text(unrelated_table(cost))


def test_nothing_measured_makes_no_table() -> None:
    assert len(host_table(None)) == len(unrelated_table(None)) == 1


@pytest.mark.parametrize(
    ("found", "tolerance", "complete"),
    [(100, 0.0, True), (99, 0.0, False), (101, 0.0, False), (99, 0.01, True), (98, 0.01, False)],
)
def test_a_turn_counts_when_all_was_recorded(
    tmp_path: Path, found: int, tolerance: float, complete: bool
) -> None:
    class Recorder(Observer):
        records = (Record("exec", b"x", 2),)

        def _start(self) -> None:
            self.output.write_bytes(b"x" * found)

    Recorder.tolerance = tolerance
    scope = Scope(tmp_path)
    with Recorder(Place(scope, 0, scope, tmp_path)) as recorder:
        if complete:
            recorder.stop({"exec": 50})
        else:
            with pytest.raises(IncompleteError, match=f"{found} records of exec, not 100"):
                recorder.stop({"exec": 50})
    assert not list(tmp_path.iterdir())


def test_audit_that_the_host_uses_is_left_alone() -> None:
    status = parsed(STATUS)
    assert status == {"enabled": 1, "failure": 1, "pid": 812, "backlog_limit": 8192, "lost": 3}
    assert "auditd is running" in used_by_host(status, ["No rules"])
    assert "locked" in used_by_host({"pid": 0, "enabled": 2}, ["No rules"])
    assert "rules of its own" in used_by_host({"pid": 0}, ["-w /etc/passwd -p wa"])
    for rules in (["No rules"], ["-a never,task"]):
        assert used_by_host({"pid": 0, "enabled": 0}, rules) == ""


def test_a_rule_is_taken_away_with_its_own_words() -> None:
    assert deleted(["-a", "task,never", "-F", "uid=5"]) == ["-d", "task,never", "-F", "uid=5"]
