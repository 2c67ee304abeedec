"""A broker that acknowledges nothing, one that is merely slow, and the difference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.sinks.silence import CALM_SECONDS, SILENT_SECONDS, SLOW_MOST, Silence


def requests(silence: Silence, seconds: float, count: int, now: float = 0.0) -> Iterator[float]:
    """One after the other, each answered after so long; when it was silent for the first time."""
    for _ in range(count):
        silence.sent(now)
        looks = (now + tenth / 10 for tenth in range(int(seconds * 10)))
        yield from (at for at in looks if silence.lasts(at) and not silence.lasts(at - 0.1))
        now += seconds
        silence.answered(now, None)


def test_it_is_silent_until_something_is_acknowledged() -> None:
    silence = Silence()
    assert not silence.lasts(1e9)  # nothing was sent
    silence.sent(10)
    silence.sent(14)
    assert not silence.lasts(10 + SILENT_SECONDS - 0.1)
    assert silence.lasts(10 + SILENT_SECONDS)
    assert silence.reason(18) == "the broker has acknowledged nothing for 8 s"
    silence.answered(20, since=20)  # and that of 14 still waits
    assert not silence.lasts(20)
    assert silence.lasts(20 + 2 * SILENT_SECONDS)
    silence.forget()
    assert not silence.lasts(1e9)


@given(st.lists(st.floats(min_value=0, max_value=5), min_size=1))
def test_a_broker_that_answers_within_five_seconds_is_never_silent(answers: list[float]) -> None:
    silence, now = Silence(), 0.0
    for seconds in answers:
        silence.sent(now)
        now += seconds
        assert not silence.lasts(now)
        silence.answered(now, since=now)


@pytest.mark.parametrize(("seconds", "told"), [(5.9, 0), (7, 1), (11, 1), (13, 2), (29, 3)])
def test_a_slow_broker_is_not_told_with_each_answer(seconds: float, told: int) -> None:
    assert len(list(requests(Silence(), seconds, 100))) == told


def test_after_a_calm_time_it_is_told_as_soon_as_at_first() -> None:
    silence = Silence()
    assert list(requests(silence, 7, 2)) == [SILENT_SECONDS]
    assert list(requests(silence, 1, int(CALM_SECONDS), 100)) == []
    assert list(requests(silence, 7, 1, 1000)) == [1000 + SILENT_SECONDS]


def test_an_outage_does_not_make_the_next_one_be_told_later() -> None:
    silence = Silence()
    assert list(requests(silence, SLOW_MOST, 2)) == [SILENT_SECONDS, SLOW_MOST + SILENT_SECONDS]
