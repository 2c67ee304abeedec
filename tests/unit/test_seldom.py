"""What fails again and again is said once in a while, and hides nothing else."""

from __future__ import annotations

from streamer.spool.seldom import MOST, Seldom


def test_each_is_said_apart() -> None:
    said = Seldom(600)
    assert said.may("full", 0)
    assert not said.may("full", 599)
    assert said.may("broken", 599)
    assert said.may("full", 600)
    assert not said.may("full", 1199)
    assert not said.may("broken", 1198)
    assert said.may("broken", 1199)


def test_it_remembers_so_many() -> None:
    said = Seldom(600)
    assert all(said.may(number, 0) for number in range(MOST))
    assert not any(said.may(number, 1) for number in range(MOST))
    assert said.may("another", 1)  # in place of the one that was said first
    assert not any(said.may(number, 2) for number in range(1, MOST))
    assert said.may(0, 2)
    assert len(said._said) == MOST
