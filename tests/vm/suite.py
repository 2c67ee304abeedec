"""Runs the tests of the kernel on Debian's kernels in virtual machines, and says what came of it.

    python -m tests.vm.suite [--kernel SUITE[/VARIANT]]... [--minutes N] [--host RESULTS] [--write]
                             [-- ARGUMENT...]

The arguments are for pytest. A variant is a kernel that something is kept from: see VARIANTS. Each
guest says first what its kernel gives of each kind, which becomes a table at the end; `--write`
puts it into docs/kernels.md. As many guests as the machine has CPUs run at a time: see
tools/kernels.sh. Results appear as they come, then a table. Exit 0 if every test passed or was not
run because of the kernel, every guest came to its end, and on each kernel fentry, fexit, kprobe and
kretprobe programs really fired (FIRED), as far as it has them. Each of the tests that were not run
because of a kernel has to have passed on one at least: a guest's, or this machine's own, which is
asked last, unless it was before (`--host`: its results, written there with STREAMER_TEST_RESULTS).
Nobody is blamed for that where some of Debian's kernels were left out.

What a guest wrote remains in build/kernels/NAME: `output.txt`, `results.ndjson`, `check.json`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.vm import kinds

ROOT = Path(__file__).resolve().parent.parent.parent
RUNNER = str(ROOT / "tools" / "kernels.sh")
BUILT = ROOT / "build" / "kernels"
SLOWNESS = "10"
# Neither a cache nor hypothesis: no test in there has a use for them. Brokers are no kernel's.
PYTEST = (
    *("-m", "kernel and not kafka and not mqtt", "-q", "--tb=short"),
    *("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-o", "faulthandler_timeout=900"),
)
# As many descriptors as a service manager gives.
IN_GUEST = f"""
ulimit -Hn 524288
export CI=true STREAMER_TEST_SLOWNESS={SLOWNESS} STREAMER_TEST_RESULTS=$OUT/results.ndjson
"$0" -m tests.vm.kinds >$OUT/check.json
exec "$0" -m pytest "$@"
"""


FIRED = {
    "fentry and fexit": "functions",
    "kprobe and kretprobe": "probes",
}
"""Programs that have to have fired, and by which parameter the test goes that compares what they
counted with the calls that it made: programs that load and attach may be run by nothing, still.
"""
FIRING = "tests/kernel/test_syscalls.py::test_counts_and_durations[{}]"


class Variant(msgspec.Struct, frozen=True):
    """A kernel that something is kept from."""

    title: str
    """What its column in docs/kernels.md is called, after the kernel's version."""
    prefix: tuple[str, ...] = ()
    """What to put before a command that is to do without."""
    pytest: tuple[str, ...] = ()
    """Which tests are run there, as arguments of pytest."""
    fires: tuple[str, ...] = ()
    """Which of FIRED have to there."""


# With the headers of that kernel where they use to be, and its BTF where only the tests look.
_HEADERS = """
. /.out/.guest/settings
cp /sys/kernel/btf/vmlinux /run/btf
mount -t tmpfs none /sys/kernel/btf
mount --bind "$MODULES/usr/src" /usr/src
export STREAMER_TEST_BTF=/run/btf
exec "$@"
"""
# There is no way back from it, so no other test can run there afterwards.
LOCK_DOWN = """
mountpoint -q /sys/kernel/security || mount -t securityfs none /sys/kernel/security
echo confidentiality >/sys/kernel/security/lockdown
exec "$@"
"""
VARIANTS: dict[str, Variant] = {
    "": Variant("", fires=tuple(FIRED)),
    "headers": Variant(
        "without BTF, with headers",
        ("sh", "-ec", _HEADERS, "sh"),
        (
            *("tests/kernel/test_headers.py", "tests/kernel/test_process.py"),
            *("tests/kernel/test_file.py", "tests/kernel/test_net.py"),
            "tests/kernel/test_syscalls.py",
        ),
        ("kprobe and kretprobe",),  # what is at functions takes the kernel's own BTF
    ),
    "norings": Variant(
        "without ring buffers",
        (sys.executable, "-m", "tests.kernel.without_rings"),
        (
            *("tests/kernel/test_process.py", "tests/kernel/test_file.py"),
            *("tests/kernel/test_net.py", "tests/kernel/test_loss.py"),
            "tests/kernel/test_transport.py",
        ),
    ),
    "lockdown": Variant(
        "locked down",
        ("sh", "-ec", LOCK_DOWN, "sh"),
        ("tests/kernel/test_check.py::test_in_lockdown",),
    ),
}
# What `tools/arm64.sh` made is run there. A machine of that kind has no compiler, and an emulated
# one is slower by another factor of four: not all of the tests. Nor has it modules of the network.
_NOT_ARM64 = ("sensors", "headers", "check", "capabilities", "transport", "service", "modules")
ARM64 = (
    *("-m", "(every_kernel or every_machine) and not kafka and not mqtt"),
    *(f"--ignore=tests/kernel/test_{name}.py" for name in _NOT_ARM64),
)
ARM64_PYTHON = ("env", "PYTHONPATH=.:site")


class Result(msgspec.Struct, frozen=True):
    """A line of the results: see tests/conftest.py."""

    test: str
    outcome: str
    seconds: float
    by_kernel: bool
    reason: str


class Collected(msgspec.Struct, frozen=True):
    """The first line: how many tests there are."""

    collected: int


def read(path: Path, offset: int = 0) -> tuple[list[Result], int, int]:
    """The results that begin at `offset`, how many tests there are if that is said there, and
    where the next ones will begin.
    """
    if not path.exists():
        return [], 0, offset
    with path.open("rb") as file:
        file.seek(offset)
        whole = file.read().rpartition(b"\n")[0]
    results, collected = [], 0
    for line in whole.splitlines():
        found = msgspec.json.decode(line)
        if "collected" in found:
            collected = msgspec.convert(found, Collected).collected
        else:
            results.append(msgspec.convert(found, Result))
    return results, collected, offset + (len(whole) + 1 if whole else 0)


ALL = ("tests/kernel", "tests/faults/guest")
"""Where tests are that need nothing but the kernel. What the second has of them sets the clock."""
STOCK = frozenset({"bullseye", "bookworm", "trixie", "sid"})
MOST_STARTS = 3
NOT_FINISHED = "did not finish; its console"
"""What `tools/kernels.sh` says of a guest that left no exit code."""


class Guest:
    """The tests on one kernel."""

    def __init__(
        self, suite: str, variant: str, release: str, arguments: Sequence[str], minutes: float
    ) -> None:
        """`suite` is Debian's, `variant` a key of VARIANTS, `release` the kernel's."""
        self.suite = suite
        self.variant = VARIANTS[variant]
        self.release = f"{release} {self.variant.title}".strip()
        self.results: list[Result] = []
        self.collected = 0
        self.kinds: kinds.Kinds | None = None
        """What its kernel gives of each kind, once it has ended and had come to say so."""
        self.minutes = 0.0
        self.starts = 0
        self.status: int | None = None
        self._place = BUILT / "-".join(filter(None, (suite, variant)))
        self._arguments = arguments
        self._limit = minutes
        self._offset = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def start(self) -> None:
        """Boot it. `poll` says when it has ended."""
        self.starts += 1
        self.status = None
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir(parents=True)
        prefix, python = self.variant.prefix, sys.executable
        pytest = which(self.variant.pytest or ALL, self._arguments)
        if self.suite.endswith("-arm64"):
            prefix, python = (*ARM64_PYTHON, *prefix), "python3"
            pytest = [*which(ALL[:1], self._arguments), *ARM64]
        inside = ["sh", "-c", IN_GUEST, python, *PYTEST, *pytest]
        command = [RUNNER, "run", self.suite, "--", *prefix, *inside]
        environ = {"KERNEL_OUT": str(self._place), "KERNEL_SECONDS": str(round(self._limit * 60))}
        with (self._place / "output.txt").open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._started = time.monotonic()

    def poll(self) -> Iterator[Result]:
        """The results since the last time; `status` is set when there will be none any more."""
        assert self._process is not None
        self.status = self._process.poll()
        self.minutes = (time.monotonic() - self._started) / 60
        new, collected, self._offset = read(self._place / "results.ndjson", self._offset)
        self.collected += collected
        for result in new:
            self.results.append(result)
            yield result
        said = self._place / "check.json"
        if self.status is not None and said.exists() and said.stat().st_size:
            self.kinds = kinds.read(said.read_bytes())

    def stop(self) -> None:
        """End it; harmless when it has ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    @property
    def died_at_boot(self) -> bool:
        """Whether its kernel ended before a test was looked for, let alone begun: an emulated one
        panics now and then while it changes its own code.
        """
        return self.status not in (None, 0) and not self.collected and NOT_FINISHED in self.output

    @property
    def output(self) -> str:
        """What the guest wrote."""
        return (self._place / "output.txt").read_text(errors="replace")

    @property
    def column(self) -> str:
        """What its column is called: the version and the variant."""
        machine = "arm64" if self.suite.endswith("-arm64") else ""
        version = ".".join(self.release.split(".")[:2])
        return " ".join(filter(None, (version, machine, self.variant.title)))

    def outcomes(self) -> dict[str, Result]:
        """The result of each test: of several the worst, such as that of its teardown."""
        found: dict[str, Result] = {}
        for result in self.results:
            if result.test not in found or result.outcome == "failed":
                found[result.test] = result
        return found

    def tests(self, outcome: str) -> list[Result]:
        """Those that ended so."""
        return [result for result in self.outcomes().values() if result.outcome == outcome]

    @property
    def without_result(self) -> int:
        """How many tests it did not come to."""
        return self.collected - len(self.outcomes())

    @property
    def not_fired(self) -> list[str]:
        """Which of FIRED had to, and were not seen to; of tests that were chosen, if it is one."""
        passed = {result.test for result in self.tests("passed")}
        there = self.outcomes()
        tests = {words: FIRING.format(FIRED[words]) for words in self.variant.fires}
        asked = (words for words, test in tests.items() if test in there or not self._chosen)
        return [words for words in asked if tests[words] not in passed]

    @property
    def _chosen(self) -> bool:
        return any(one.startswith(("tests/", "-k")) for one in self._arguments)

    @property
    def failed(self) -> bool:
        """Whether anything is wrong with it."""
        incomplete = self.without_result != 0 or not self.collected or self.kinds is None
        return self.status != 0 or incomplete or bool(self.not_fired)


def which(of_variant: Sequence[str], given: Sequence[str]) -> list[str]:
    """The arguments of pytest: files that are given stand for those of the variant."""
    names_files = any(one.startswith("tests/") for one in given)
    return [*([] if names_files else of_variant), *given]


def releases() -> dict[str, str]:
    """The kernel of each suite that is there."""
    command = [RUNNER, "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = (line.split(maxsplit=1) for line in lines)
    return {suite: release for suite, release in pairs if release != "not fetched"}


def run_all(guests: Sequence[Guest], at_once: int) -> None:
    """Run them all, and tell results as they come."""
    waiting, running = list(guests), list[Guest]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
                running[-1].start()
                say(running[-1], "starting")
            time.sleep(1)
            for guest in running:
                for result in guest.poll():
                    tell(guest, result)
                if guest.died_at_boot and guest.starts < MOST_STARTS:
                    say(guest, f"died at boot, starting again\n{guest.output[-1000:]}")
                    guest.start()
            running = [guest for guest in running if guest.status is None]
    finally:
        for guest in running:
            guest.stop()


def say(guest: Guest, text: str) -> None:
    print(f"{guest.release:20} {text}", flush=True)


def tell(guest: Guest, result: Result) -> None:
    done = len(guest.outcomes())
    say(guest, f"{done}/{guest.collected} {result.outcome} {result.seconds:.0f} s {result.test}")
    if result.outcome == "failed":
        print(result.reason, flush=True)


# ---------------------------------------------------------------- what came of it


def table(guests: Iterable[Guest]) -> list[str]:
    """A line per kernel."""
    head = ("kernel", "passed", "failed", "not run", "no result", "minutes", "")
    rows: list[tuple[Any, ...]] = [head]
    for guest in guests:
        counts = (len(guest.tests(outcome)) for outcome in ("passed", "failed", "skipped"))
        ended = "" if guest.status in (0, 1) else f"ended with {guest.status}"
        rows.append((guest.release, *counts, guest.without_result, f"{guest.minutes:.1f}", ended))
    form = "{:<22}{:>8}{:>8}{:>9}{:>11}{:>9}  {}"
    return [form.format(*row).rstrip() for row in rows]


def by_reason(guests: Iterable[Guest]) -> list[str]:
    """What was not run, why, and where."""
    places: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for guest in guests:
        for result in guest.tests("skipped"):
            places[result.reason][result.test].append(guest.release)
    lines = []
    for reason, tests in places.items():
        lines.append(f"not run: {reason}")
        lines += [f"    {test}: {', '.join(kernels)}" for test, kernels in tests.items()]
    return lines


def run_nowhere(results: Iterable[Result]) -> list[str]:
    """Tests that were not run because of a kernel, and passed on none."""
    passed, skipped = set[str](), dict[str, None]()
    for result in results:
        if result.outcome == "passed":
            passed.add(result.test)
        elif result.by_kernel:
            skipped[result.test] = None
    return [test for test in skipped if test not in passed]


def run_here(tests: Sequence[str]) -> list[Result]:
    """Their results on this machine's own kernel."""
    BUILT.mkdir(parents=True, exist_ok=True)
    results = BUILT / "here.ndjson"
    results.unlink(missing_ok=True)
    environ = os.environ | {"CI": "true", "STREAMER_TEST_RESULTS": str(results)}
    command = [sys.executable, "-m", "pytest", *PYTEST, *tests]
    subprocess.run(command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, check=False)
    return read(results)[0]


def had_all(guests: Iterable[Guest]) -> bool:
    """Whether each of Debian's kernels was there, with nothing kept from it."""
    return {guest.suite for guest in guests if guest.variant is VARIANTS[""]} >= STOCK


def by_kernel(guests: Iterable[Guest]) -> dict[str, kinds.Kinds]:
    """What this machine's kernel and each guest's gives of each kind."""
    release = ".".join(os.uname().release.split(".")[:2])
    found = {f"{release} (not Debian's)": kinds.read(kinds.here())}
    return found | {guest.column: guest.kinds for guest in guests if guest.kinds is not None}


def report(guests: Sequence[Guest], host: Path | None) -> int:
    """Print what there is to say of the tests; the exit code."""
    print()
    for guest in guests:
        if guest.status not in (0, 1) or not guest.collected:
            print(f"--- the end of what {guest.release} wrote\n{guest.output[-4000:]}")
    for line in by_reason(guests):
        print(line)
    for guest in guests:
        for result in guest.tests("failed"):
            print(f"failed: {guest.release}: {result.test}")
        for words in guest.not_fired:
            print(f"did not fire: {guest.release}: {words}")
    code = 1 if any(guest.failed for guest in guests) else 0
    results = [result for guest in guests for result in guest.results]
    if host is not None:
        results += read(host)[0]
    elif missing := run_nowhere(results):
        results += run_here(missing)
    for test in run_nowhere(results):
        print(f"passed on no kernel: {test}")
        code = 1 if host is not None or had_all(guests) else code
    print("\n".join(["", *table(guests)]))
    return code


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.suite")
    parser.add_argument("--kernel", action="append", help="one of Debian's suites; default: all")
    parser.add_argument("--write", action="store_true", help="rewrite docs/kernels.md")
    parser.add_argument("--minutes", type=float, default=180, help="a limit for each")
    parser.add_argument("--host", type=Path, help="the results of this machine's own kernel")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest")
    given = parser.parse_args(arguments)
    there = releases()
    wanted = [kernel.partition("/") for kernel in given.kernel or list(there)]
    if unknown := [suite for suite, _, _ in wanted if suite not in there]:
        parser.error(f"not there: {', '.join(unknown)}; tools/kernels.sh list shows what is")
    if unknown := [variant for _, _, variant in wanted if variant not in VARIANTS]:
        parser.error(f"no such variant: {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    guests = [
        Guest(suite, variant, there[suite], given.pytest, given.minutes)
        for suite, _, variant in wanted
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the guests
    run_all(guests, len(os.sched_getaffinity(0)))
    found = by_kernel(guests)
    print("\n".join(["", *kinds.table(found)]))
    if given.write:
        kinds.PAGE.write_text(kinds.page(found))
    return report(guests, given.host)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
