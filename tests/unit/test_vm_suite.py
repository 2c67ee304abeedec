"""What tests/vm/suite.py makes of the results of its guests."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.vm import kinds
from tests.vm import suite as vm_suite
from tests.vm.kinds import Kind, Kinds
from tests.vm.suite import (
    ALL,
    FIRED,
    FIRING,
    MOST_STARTS,
    NOT_FINISHED,
    STOCK,
    VARIANTS,
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

FUNCTIONS, PROBES = (FIRING.format(one) for one in FIRED.values())
FIRING_TESTS = [Result(test, "passed", 1.0, False, "") for test in (FUNCTIONS, PROBES)]
PASSED = Result("test_a", "passed", 1.0, False, "")
FAILED = Result("test_b", "failed", 1.0, False, "assert 1 == 2")
LACKING = Result("test_c", "skipped", 0.0, True, "before 5.11 there is none")


def guest(
    release: str,
    results: Sequence[Result],
    status: int = 0,
    collected: int | None = None,
    *,
    suite: str = "sid",
    arguments: Sequence[str] = ("-k", "a or b or c"),
) -> Guest:
    made = Guest(suite, "", release, arguments, 1.0)
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
    run_nothing_here(monkeypatch)
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


def run_nothing_here(monkeypatch: pytest.MonkeyPatch, *found: Result) -> list[str]:
    """`found` is what comes of tests on this machine's kernel. Which are asked for."""
    asked: list[str] = []

    def run_here(tests: Sequence[str]) -> list[Result]:
        asked.extend(tests)
        return list(found)

    monkeypatch.setattr(vm_suite, "run_here", run_here)
    return asked


@pytest.mark.parametrize(
    ("kernels", "found", "code"),
    [
        (STOCK, LACKING, 1),
        (STOCK, Result("test_c", "failed", 1.0, False, ""), 1),
        (STOCK, Result("test_c", "passed", 1.0, False, ""), 0),
        (STOCK - {"trixie"}, LACKING, 0),  # there it may pass
    ],
)
def test_without_results_of_this_machine_it_is_asked(
    kernels: frozenset[str], found: Result, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For what passed on no kernel of Debian's, and for nothing else."""
    asked = run_nothing_here(monkeypatch, found)
    guests = [guest("1.0", [LACKING, PASSED], suite=one) for one in kernels]
    assert report(guests, None) == code
    assert asked == ["test_c"]


def test_what_passed_on_one_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = run_nothing_here(monkeypatch)
    elsewhere = Result("test_c", "passed", 1.0, False, "")
    assert report([guest("5.10", [LACKING]), guest("7.2", [elsewhere])], None) == 0
    assert asked == []


@pytest.mark.parametrize(
    ("arguments", "results", "missing"),
    [
        (("-m", "every_kernel"), FIRING_TESTS, []),
        (("-m", "every_kernel"), FIRING_TESTS[:1], ["kprobe and kretprobe"]),
        ((), [PASSED], list(FIRED)),
        (("-k", "flows"), [PASSED], []),
        (("tests/kernel/test_flows.py",), [PASSED], []),
        (("-k", "durations"), [Result(FUNCTIONS, "skipped", 0.0, True, "")], ["fentry and fexit"]),
    ],
)
def test_programs_have_to_fire(
    arguments: Sequence[str], results: list[Result], missing: list[str]
) -> None:
    """On each kernel: that a kernel has none of them is no reason there, as it is elsewhere."""
    made = guest("5.10", results, arguments=arguments)
    assert made.not_fired == missing
    assert made.failed == bool(missing)


def test_they_are_tests_of_every_kernel() -> None:
    """What has to have passed is there, and is among those that CI runs in guests."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q"]
    command += ["-m", "every_kernel", FUNCTIONS.partition("::")[0]]
    done = subprocess.run(command, cwd=vm_suite.ROOT, capture_output=True, text=True)
    assert {FUNCTIONS, PROBES} <= set(done.stdout.splitlines())


def test_what_has_to_fire_where_something_is_kept_back() -> None:
    """Programs at functions take BTF; nothing loads in lockdown."""
    fires = {name: one.fires for name, one in VARIANTS.items()}
    assert fires == {
        "": ("fentry and fexit", "kprobe and kretprobe"),
        "headers": ("kprobe and kretprobe",),
        "norings": (),
        "lockdown": (),
    }


VERSIONS = {"bullseye": "5.10", "bookworm": "6.1", "trixie": "6.12", "sid": "7."}


def test_the_page_has_what_the_target_runs() -> None:
    """A column for each kernel that `make test-kernels` boots, and one of another machine's."""
    made = (vm_suite.ROOT / "Makefile").read_text()
    (stock,) = re.findall(r"^KERNELS := (.*)$", made, re.MULTILINE)
    (more,) = re.findall(r"^test-kernels: KERNELS \+= (.*)$", made, re.MULTILINE)
    head = next(line for line in kinds.PAGE.read_text().splitlines() if line.startswith("| kind"))
    _, here, *columns = (cell.strip() for cell in head.strip("|").split("|"))
    assert here.endswith("(not Debian's)")
    assert len(columns) == len(f"{stock} {more}".split())
    for kernel in f"{stock} {more}".split():
        name, _, variant = kernel.partition("/")
        suite, _, machine = name.partition("-")
        title = " ".join(filter(None, (machine, VARIANTS[variant].title)))
        assert any(
            one.startswith(VERSIONS[suite]) and one.partition(" ")[2] == title for one in columns
        ), kernel


def test_files_that_are_named_are_run_alone() -> None:
    """Else those of the variant, or all."""
    assert which(ALL, ["-x"]) == ["tests/kernel", "tests/faults/guest", "-x"]
    assert which(("tests/kernel/test_a.py",), ["-x"]) == ["tests/kernel/test_a.py", "-x"]
    named = ["tests/kernel/test_b.py::test_c", "-x"]
    assert which(("tests/kernel/test_a.py",), named) == named
