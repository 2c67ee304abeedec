"""System calls by name and number, and the records of how long they took."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from streamer.config.settings import Kernel
from streamer.events.calls import ALL, NEVER_RETURN, NUMBERS
from streamer.kernel.objects import CONTRACT
from streamer.kernel.system_calls import (
    SYSCALL_NUMBERS,
    WAITING,
    functions_of_calls,
    numbers_of,
    places_of,
)
from streamer.kernel.targets import NO_SYSCALL, targets_of, without_target
from streamer.summaries.syscalls import Counted, Total, between, percentile
from tests.conftest import Require
from tools.calls import module, numbers_in

MACHINES = ("x86_64", "aarch64")
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
FLAGS = {name: number for name, number, _ in CONTRACT["enum syscall_flags"]}
TOLD = FLAGS["SYSCALL_SLOW_TOLD"]
WORDS = {name: offset // 8 for name, offset, _ in CONTRACT["syscall_counts"]}
SIZE = max(offset + size for _, offset, size in CONTRACT["syscall_counts"]) // 8


# ---------------------------------------------------------------- names and numbers


def test_the_numbers_are_those_of_the_headers(require: Require) -> None:
    require(HEADER.exists(), "the kernel's headers are not installed")
    found = numbers_in(HEADER.read_text())
    assert len(found) > 300
    assert found.items() <= numbers_of("x86_64").items()


def test_numbers_of_both_machines() -> None:
    assert NUMBERS["read"] == (0, 63)
    assert NUMBERS["open"] == (2, None)
    assert NUMBERS["openat2"] == (437, 437)
    for machine in MACHINES:
        numbers = numbers_of(machine).values()
        assert len(set(numbers)) == len(numbers)
        assert max(numbers) < SYSCALL_NUMBERS - 1
    assert NUMBERS.keys() >= WAITING | NEVER_RETURN


def test_names_fit_where_they_are_kept() -> None:
    sizes = {name: size for name, _, size in CONTRACT["syscall_place"]}
    assert max(len(name) for name in NUMBERS) < sizes["name"]
    assert all(re.fullmatch("[a-z_][a-z0-9_]*", name) for name in NUMBERS)


def test_the_module_is_made_of_headers() -> None:
    text = module({"x86_64": {"read": 0, "open": 2}, "aarch64": {"read": 63}})
    assert '    "open": (2, None),\n    "read": (0, 63),\n}\n' in text


# ---------------------------------------------------------------- what is observed


def test_functions_behind_calls() -> None:
    names = ("uname", "fsync", "open", "fsync")
    assert functions_of_calls(names, "x86_64") == (
        "__x64_sys_open|__do_sys_open",
        "__x64_sys_newuname|__do_sys_newuname",
        "__x64_sys_fsync|__do_sys_fsync",
    )
    assert functions_of_calls(names, "aarch64") == (
        "__arm64_sys_fsync|__do_sys_fsync",
        "__arm64_sys_newuname|__do_sys_newuname",
    )
    assert functions_of_calls((*names, ALL), "x86_64") == ()


def test_places_of_calls_that_are_named() -> None:
    """By number; slow ones are told, whatever they are."""
    places = places_of(("poll", "open", "fsync"), "x86_64")
    assert [(one.number, one.name, one.flags) for one in places] == [
        (2, "open", TOLD),
        (7, "poll", TOLD),
        (74, "fsync", TOLD),
    ]
    assert [one.name for one in places_of(("open", "fsync"), "aarch64")] == ["fsync"]


def test_places_of_all_calls() -> None:
    places = {one.name: one for one in places_of((ALL, "futex"), "x86_64")}
    assert NEVER_RETURN.isdisjoint(places)
    assert len(places) == SYSCALL_NUMBERS - len(NEVER_RETURN)
    assert (places["syscall_500"].number, places["syscall_other"].number) == (500, 511)
    told = {name for name, one in places.items() if one.flags & TOLD}
    assert places.keys() - told == WAITING - {"futex"}
    assert places["mmap"].flags & FLAGS["SYSCALL_GIVES_ADDRESS"]
    assert places["rt_sigreturn"].flags & FLAGS["SYSCALL_RESULT_UNKNOWN"]


def test_what_is_attached_to() -> None:
    targets = targets_of(Kernel(syscalls=("fsync",), interfaces=("lo",)))
    assert targets["xdp_counter"].interfaces == ("lo",)
    assert len(targets["kprobe_syscall_latency"].functions) == 1
    assert "kprobe_syscall_latency" not in targets_of(Kernel(syscalls=(ALL,)))
    assert without_target(Kernel())["syscall.slow"] == NO_SYSCALL
    assert "syscall.slow" not in without_target(Kernel(syscalls=(ALL,)))


# ---------------------------------------------------------------- what was counted


def words(
    count: int = 0, longest: tuple[int, int, int, int] = (0, 0, 0, 0), **buckets: int
) -> list[int]:
    """A `struct syscall_counts`; `b10` is how many are in the eleventh bucket."""
    made = [0] * SIZE
    made[WORDS["count"]] = count
    made[WORDS["errors"]], made[WORDS["total_ns"]] = count // 2, 1000 * count
    made[WORDS["longest"] : WORDS["longest"] + 4] = longest
    for name, number in buckets.items():
        made[WORDS["buckets"] + int(name[1:])] = number
    return made


def test_what_was_counted_between_two_looks() -> None:
    before, now = words(4, b10=4), words(10, (2, 1900, 1, 0), b10=5, b9=5)
    assert between(before, now, 2) == Counted(6, 3, 6000, 0, 1900, (0,) * 9 + (5, 1))
    late = words(10, (0, 0, 1, 0), b10=5, b9=5)  # of which the longest is not written yet
    assert between(before, late, 2).max_ns == 1024
    assert between(now, now, 3) == Counted()


@pytest.mark.parametrize(
    ("before", "now", "longest"),
    [
        ((0, 0, 1, 500), (0, 0, 1, 500), 0),  # of the period before, and told then
        ((0, 0, 1, 500), (0, 0, 1, 800), 800),  # written after that was read
        ((0, 0, 1, 500), (2, 600, 1, 800), 800),
        ((0, 0, 0, 0), (2, 600, 3, 900), 600),  # the next has begun
    ],
)
def test_the_longest_of_a_period(
    before: tuple[int, int, int, int], now: tuple[int, int, int, int], longest: int
) -> None:
    assert between(words(1, before), words(1, now), 2).max_ns == longest


def test_both_together() -> None:
    one, other = Counted(1, 0, 5, 0, 5, (0, 0, 1)), Counted(2, 1, 40, 3, 21, (1, 0, 0, 0, 1))
    assert one.and_also(other) == other.and_also(one) == Counted(3, 1, 45, 3, 21, (1, 0, 1, 0, 1))
    assert Total(1, 1, 1).plus(other) == Total(3, 2, 41)


def test_percentiles_are_ends_of_buckets() -> None:
    counted = Counted(100, 0, 0, 0, 70_000, (*(0,) * 7, 90, 0, 9, *(0,) * 6, 1))
    assert percentile(counted, 0.5) == percentile(counted, 0.9) == 255
    assert percentile(counted, 0.91) == percentile(counted, 0.99) == 1023
    assert percentile(counted, 1) == 70_000  # no more than the longest
    assert percentile(Counted(), 0.5) == 0
