"""From gaps in the sequence to losses: what counts as lost, when, and never twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.ring.gaps import MOST_GAPS, GapTracker, Loss

GRACE = 100
LATER = 1000
CPU = 3


class Line:
    """A ring of one CPU, as a reader sees it: numbers in the order in which they come."""

    def __init__(self, cpu: int = CPU, most: int = MOST_GAPS) -> None:
        self.tracker = GapTracker(GRACE, most)
        self.cpu = cpu
        self.expected = 1

    def read(self, *numbers: int, now: int = 0, skipped: int = 0) -> None:
        """What `Ring.drain` reports for records of these numbers."""
        for seq in numbers:
            if seq > self.expected:
                self.tracker.feed([("missing", self.cpu, self.expected, seq - 1)], now)
            if seq < self.expected:
                self.tracker.feed([("late", self.cpu, seq, seq)], now)
            else:
                self.expected = seq + 1
            if skipped:
                self.tracker.feed([("skipped", self.cpu, skipped, skipped)], now)

    def tail(self, taken: int, now: int = 0) -> None:
        """The ring is empty, and the kernel has given out numbers up to `taken`."""
        if self.expected <= taken:
            self.tracker.tail(self.cpu, self.expected, taken, now)

    def losses(self, now: int = LATER, *, produced: int = 0, consumed: int = 0) -> list[Loss]:
        found = self.tracker.expire(
            now, lambda cpu: self.expected, lambda cpu: produced, lambda cpu: consumed
        )
        return list(found)


def loss(first: int, last: int, count: int | None = None, cpu: int = CPU) -> Loss:
    return Loss(cpu, first, last, last - first + 1 if count is None else count)


def test_no_gap_no_loss() -> None:
    line = Line()
    line.read(1, 2, 3)
    assert line.losses() == []


def test_a_gap_is_a_loss_after_the_grace_and_only_once() -> None:
    line = Line()
    line.read(1, 5, now=10)
    assert line.losses(now=10 + GRACE - 1) == []
    assert line.losses(now=10 + GRACE) == [loss(2, 4)]
    assert line.losses() == []


def test_a_first_record_that_is_not_number_one() -> None:
    line = Line()
    line.read(4)
    assert line.losses() == [loss(1, 3)]


def test_a_record_that_is_late_is_no_loss() -> None:
    """A program was interrupted by another one after it had taken its number."""
    line = Line()
    line.read(1, 3, 2, 4)
    assert line.losses() == []


@pytest.mark.parametrize(
    ("late", "expected"),
    [
        ([2], [loss(3, 6)]),
        ([6], [loss(2, 5)]),
        ([4], [loss(2, 3), loss(5, 6)]),
        ([3, 5], [loss(2, 2), loss(4, 4), loss(6, 6)]),
        ([6, 2, 4, 3, 5], []),
    ],
)
def test_late_records_split_a_gap(late: list[int], expected: list[Loss]) -> None:
    line = Line()
    line.read(1, 7, *late)
    assert line.losses() == expected


def test_a_late_record_of_no_gap_changes_nothing() -> None:
    line = Line()
    line.read(1, 2, 2, 4)
    assert line.losses() == [loss(3, 3)]


def test_each_cpu_has_its_own_numbers() -> None:
    tracker = GapTracker(GRACE)
    tracker.feed([("missing", 0, 1, 2), ("missing", 1, 1, 4), ("late", 1, 2, 2)], 0)
    found = list(tracker.expire(LATER, lambda cpu: 9, lambda cpu: 0, lambda cpu: 0))
    assert found == [loss(1, 2, cpu=0), loss(1, 1, cpu=1), loss(3, 4, cpu=1)]


# ------------------------------------------------------------------ numbers given up


def test_numbers_given_up_are_no_losses() -> None:
    line = Line()
    line.read(1)
    line.read(4, skipped=2)
    assert line.losses() == []


def test_numbers_given_up_reduce_the_count_of_the_gap() -> None:
    line = Line()
    line.read(1)
    line.read(8, skipped=2)
    assert line.losses() == [loss(2, 7, count=4)]
    line.read(10)
    assert line.losses() == [loss(9, 9)]


# ------------------------------------------------------------------ tails


def test_numbers_taken_of_which_nothing_came_are_lost() -> None:
    line = Line()
    line.read(1, 2)
    line.tail(5)
    assert line.losses(now=GRACE - 1) == []
    assert line.losses() == [loss(3, 5)]


def test_a_tail_is_told_once_however_often_it_is_seen() -> None:
    line = Line()
    line.tail(3)
    line.tail(3)
    assert line.losses() == [loss(1, 3)]
    line.tail(3, now=LATER)
    assert line.losses(now=2 * LATER) == []


def test_a_tail_that_grows() -> None:
    line = Line()
    line.tail(3)
    line.tail(7, now=10)
    assert line.losses() == [loss(1, 3), loss(4, 7)]
    line.tail(7, now=LATER)
    assert line.losses(now=2 * LATER) == []


def test_a_tail_behind_one_that_still_waits() -> None:
    """At the end there is no other look: 5 to 9 are told with this one, or never."""
    line = Line()
    line.tail(3)
    line.read(4)
    line.tail(9)
    found = sorted(line.losses(), key=lambda one: one.first)
    assert found == [loss(1, 3), loss(5, 9)]


def test_a_tail_that_came_after_all() -> None:
    line = Line()
    line.tail(3)
    line.read(1, 2, 3, 4)
    assert line.losses() == []


def test_a_tail_of_which_some_came() -> None:
    """What the ring has passed is a gap of its own; what it has not is still missing."""
    line = Line()
    line.tail(9)
    line.read(3, 4)
    found = sorted(line.losses(), key=lambda one: one.first)
    assert found == [loss(1, 2), loss(5, 9)]


def test_records_after_a_tail_that_was_told() -> None:
    """The gap that they show is that tail: only what was taken since is new."""
    line = Line()
    line.tail(3)
    assert line.losses() == [loss(1, 3)]
    line.read(6)
    assert line.losses(now=2 * LATER) == [loss(4, 5)]
    line.tail(8, now=2 * LATER)
    line.read(9, now=2 * LATER)
    assert line.losses(now=3 * LATER) == [loss(7, 8)]


def test_what_comes_after_it_was_told_opens_no_gap() -> None:
    line = Line()
    line.tail(3)
    assert line.losses() == [loss(1, 3)]
    line.read(2, 3, 5)
    assert line.losses(now=2 * LATER) == [loss(4, 4)]


# ------------------------------------------------------------------ a reader that is behind


def test_a_gap_waits_until_what_was_in_the_ring_is_read() -> None:
    """A reader that pauses finds what is late much later; it is there all the same."""
    line = Line()
    line.read(1, 5)
    assert line.losses(produced=500, consumed=100) == []
    line.read(3)
    assert line.losses(2 * LATER, produced=900, consumed=499) == []
    line.read(4)
    assert line.losses(3 * LATER, produced=1300, consumed=500) == [loss(2, 2)]


def test_a_late_record_leaves_the_other_gaps() -> None:
    line = Line()
    line.read(1, 3, 5, 7, 2)
    assert line.losses() == [loss(4, 4), loss(6, 6)]


def test_a_gap_that_was_joined_waits_anew() -> None:
    line = Line(most=1)
    line.read(1, 3)
    line.read(5, now=GRACE - 1)
    assert line.losses(now=GRACE) == []
    line.read(4)
    assert line.losses(now=2 * GRACE) == [loss(2, 4, count=1)]


def test_a_gap_that_is_due_takes_no_other_with_it() -> None:
    line = Line(most=1)
    line.read(1, 3)
    assert line.losses(now=GRACE, produced=500, consumed=100) == []
    line.read(5, now=GRACE)
    assert line.losses(now=GRACE, produced=600, consumed=500) == [loss(2, 2)]
    line.read(4)
    assert line.losses(produced=700, consumed=700) == []


def test_a_tail_is_joined_with_no_gap() -> None:
    """It may come as a whole, and then in order."""
    line = Line(most=1)
    line.read(1, 3)
    line.tail(6)
    line.read(4, 5, 6)
    assert line.losses() == [loss(2, 2)]


# ------------------------------------------------------------------ whatever happens


class Simulation:
    """A kernel that gives out numbers, and a reader that gets some of them, some of them late."""

    def __init__(self, most: int = MOST_GAPS) -> None:
        self.line = Line(most=most)
        self.now = 0
        self.taken = 0
        self.read: list[int] = []
        self.delayed: list[int] = []
        self.losses: list[Loss] = []

    def step(self, what: str) -> None:
        self.now += 1
        getattr(self, what)()

    def keep(self) -> None:
        self.taken += 1
        self._arrive([self.taken])
        self.catch_up()

    def lose(self) -> None:
        self.taken += 1

    def delay(self) -> None:
        self.taken += 1
        self.delayed.append(self.taken)

    def catch_up(self) -> None:
        """What is late arrives, which it does within the grace."""
        late, self.delayed = self.delayed, []
        self._arrive(late)

    def look(self) -> None:
        self.line.tail(self.taken, self.now)

    def settle(self) -> None:
        self.catch_up()
        self.look()
        self.now += GRACE
        self.losses += self.line.losses(self.now)

    def _arrive(self, numbers: list[int]) -> None:
        self.line.read(*numbers, now=self.now)
        self.read += numbers


@given(st.lists(st.sampled_from(["keep", "lose", "delay", "look", "settle"]), max_size=60))
def test_read_and_lost_are_disjoint_and_all(steps: list[str]) -> None:
    """Numbers read and numbers lost are together exactly those that the kernel gave out."""
    made = Simulation()
    for step in steps:
        made.step(step)
    made.settle()
    lost = [seq for one in made.losses for seq in range(one.first, one.last + 1)]
    assert sorted(made.read + lost) == list(range(1, made.taken + 1))
    assert all(one.count == one.last - one.first + 1 for one in made.losses)


@given(st.lists(st.sampled_from(["keep", "lose", "delay", "look", "settle"]), max_size=80))
def test_gaps_that_were_joined_have_the_right_count(steps: list[str]) -> None:
    """Where only few may wait, ranges cover what came between; their counts are exact."""
    made = Simulation(most=2)
    for step in steps:
        made.step(step)
    made.settle()
    made.settle()
    assert sum(one.count for one in made.losses) + len(made.read) == made.taken
    covered = {seq for one in made.losses for seq in range(one.first, one.last + 1)}
    assert set(range(1, made.taken + 1)) - set(made.read) <= covered


def test_an_overload_takes_bounded_room() -> None:
    """Every other record lost: a few losses, and every number counted."""
    line = Line()
    line.read(*range(2, 200_001, 2))
    assert sum(map(len, line.tracker._gaps.values())) <= MOST_GAPS
    losses = line.losses()
    assert len(losses) <= MOST_GAPS
    assert sum(one.count for one in losses) == 100_000
    assert (losses[0].first, losses[-1].last) == (1, 199_999)
