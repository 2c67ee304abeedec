"""What tests/vm/suite.py makes of the results of its guests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.vm import kinds
from tests.vm.kinds import Kind, Kinds
from tests.vm.suite import (
    ALL,
    MOST_STARTS,
    NOT_FINISHED,
    Guest,
    Result,
    by_reason,
    read,
    report,
    run_all,
    run_nowhere,
    table,
    which,
)

PASSED = Result("test_a", "passed", 1.0, False, "")
FAILED = Result("test_b", "failed", 1.0, False, "assert 1 == 2")
LACKING = Result("test_c", "skipped", 0.0, True, "before 5.11 there is none")


def guest(
    release: str, results: Sequence[Result], status: int = 0, collected: int | None = None
) -> Guest:
    made = Guest("sid", "", release, (), 1.0)
    made.kinds = Kinds(f"Linux {release}", {})
    made.results = list(results)
    made.collected = len(made.outcomes()) if collected is None else collected
    made.status = status
    return made


def test_results_are_read_as_they_are_written(tmp_path: Path) -> None:
    """A line that is not whole yet is left for the next time."""
    file = tmp_path / "results"
    assert read(file) == ([], 0, 0)
    line = b'{"test":"test_a","outcome":"passed","seconds":1.0,"by_kernel":false,"reason":""}\n'
    file.write_bytes(b'{"collected": 2}\n' + line + line[:20])
    found, collected, end = read(file)
    assert (found, collected) == ([PASSED], 2)
    assert read(file, end) == ([], 0, end)
    file.write_bytes(b'{"collected": 2}\n' + line + line)
    assert read(file, end) == ([PASSED], 0, file.stat().st_size)


def test_the_worst_result_of_a_test_counts() -> None:
    """Its teardown may fail after it has passed."""
    torn = Result("test_a", "failed", 0.1, False, "the cgroup is not empty")
    for results in ([PASSED, torn], [torn, PASSED]):
        assert guest("7.2", results).tests("failed") == [torn]


def test_a_table_of_kernels() -> None:
    guests = [guest("5.10", [PASSED, FAILED, LACKING], 1), guest("7.2", [PASSED], 124, 3)]
    head, first, second = table(guests)
    assert head.split() == ["kernel", "passed", "failed", "not", "run", "no", "result", "minutes"]
    assert first.split() == ["5.10", "1", "1", "1", "0", "0.0"]
    assert second.split() == ["7.2", "1", "0", "0", "2", "0.0", "ended", "with", "124"]


def test_reasons_name_tests_and_kernels() -> None:
    guests = [guest("5.10", [LACKING]), guest("6.1", [LACKING]), guest("7.2", [PASSED])]
    assert by_reason(guests) == [f"not run: {LACKING.reason}", "    test_c: 5.10, 6.1"]


@pytest.mark.parametrize(
    ("guests", "code"),
    [
        ([guest("7.2", [PASSED, LACKING])], 0),
        ([guest("7.2", [PASSED, FAILED], 1)], 1),
        ([guest("7.2", [PASSED], 0, 2)], 1),  # a test without a result
        ([guest("7.2", [PASSED], 124, 1)], 1),
        ([guest("5.10", [FAILED], 1), guest("7.2", [PASSED])], 1),
    ],
)
def test_exit_codes(guests: list[Guest], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guest, "output", "")
    assert report(guests, None) == code


def test_a_guest_that_does_not_say_what_it_gives_is_a_failure() -> None:
    made = guest("7.2", [PASSED])
    assert not made.failed
    made.kinds = None
    assert made.failed


def test_a_table_of_kinds() -> None:
    """Reasons stand below it, each once."""
    why = Kind("degraded", "no fexit"), Kind("unavailable", "no hook")
    by_kernel = {
        "5.10": Kinds("5.10", {"net.udp": why[1], "net.drop": why[0], "file.open": why[0]}),
        "7.2": Kinds("7.2", {"net.udp": Kind("full", ""), "net.drop": Kind("full", "")}),
    }
    assert kinds.table(by_kernel) == [
        "| kind | 5.10 | 7.2 |",
        "| --- | --- | --- |",
        "| `file.open` | degraded (1) | unknown |",
        "| `net.drop` | degraded (1) | full |",
        "| `net.udp` | unavailable (2) | full |",
        "",
        "1. no fexit",
        "2. no hook",
    ]


def test_no_test_at_all_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guest, "output", "")
    assert report([guest("7.2", [], 0)], None) == 1


@pytest.mark.parametrize(
    ("collected", "output", "starts"),
    [
        (0, f"kernels: 7.2 {NOT_FINISHED}: somewhere", MOST_STARTS),
        (1, f"kernels: 7.2 {NOT_FINISHED}: somewhere", 1),  # after a test may have begun
        (0, "ImportError", 1),
    ],
)
def test_a_guest_that_dies_at_boot_is_started_again(
    collected: int, output: str, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = guest("7.2", [], 1, collected)

    def start(self: Guest) -> None:
        self.starts += 1
        self.status = None

    def poll(self: Guest) -> Iterator[Result]:
        self.status = 1
        return iter(())

    monkeypatch.setattr(Guest, "start", start)
    monkeypatch.setattr(Guest, "poll", poll)
    monkeypatch.setattr(Guest, "output", output)
    run_all([made], 1)
    assert made.starts == starts
    assert made.failed


def test_what_a_kernel_lacks_has_to_pass_on_another(tmp_path: Path) -> None:
    """Of the guests' and of this machine's own."""
    elsewhere = Result("test_c", "passed", 1.0, False, "")
    assert run_nowhere([LACKING, PASSED]) == ["test_c"]
    assert run_nowhere([LACKING, elsewhere, PASSED]) == []
    host = tmp_path / "host"
    host.write_bytes(b'{"collected": 0}\n')
    assert report([guest("5.10", [LACKING])], host) == 1
    assert report([guest("5.10", [LACKING]), guest("7.2", [elsewhere])], host) == 0


def test_files_that_are_named_are_run_alone() -> None:
    """Else those of the variant, or all."""
    assert which(ALL, ["-x"]) == ["tests/kernel", "tests/faults/guest", "-x"]
    assert which(("tests/kernel/test_a.py",), ["-x"]) == ["tests/kernel/test_a.py", "-x"]
    named = ["tests/kernel/test_b.py::test_c", "-x"]
    assert which(("tests/kernel/test_a.py",), named) == named
