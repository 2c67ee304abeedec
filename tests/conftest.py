"""What all tests share: uvloop, what a marker requires, and that no test is skipped silently.

A test marked `kernel`, `kafka` or `mqtt` is not run where what it needs is missing; any test can
say more with the fixture `require`. What was not run is listed with its reason at the end. With
`CI=true` it is a failure, unless the reason is the kernel that runs (`require_kernel`): such a test
has to pass on another kernel, which `tests/vm/suite.py` sees to.

With `STREAMER_TEST_RESULTS=FILE` the result of each test is written there, one JSON per line.

`make test` runs two processes (`-n 2`): most tests that trace the kernel keep to one of them, one
after the other, and of the others each file to one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from tests.brokers import kafka_class_path

ROOT = Path(__file__).resolve().parent.parent
CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 21, 38, 39
SET_UP = "run `make test`, or tools/setup.sh test"

BY_KERNEL = ("not run because of", "kernel")

Require = Callable[[object, str], None]


def pytest_configure() -> None:
    """In the background of a script SIGINT and SIGQUIT are ignored, and SIGHUP under nohup, and a
    test's programs would inherit that: some tests wait for them to end by these.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], Any]]:
    """Asynchronous tests run on the loop that streamer runs on."""
    return {"uvloop": uvloop.new_event_loop}


WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
"""Which of several processes this is, such as `gw0`; empty in the only one, and in their head."""


_ASIDE = frozenset(
    f"tests/kernel/test_{name}.py"
    for name in (
        *("blocked", "end_to_end", "lifecycle", "loss", "metrics_values", "privilege", "reload"),
        *("rotation", "secrets", "slow_broker", "spool", "spool_mqtt", "untold", "verify"),
        "watermarks",
    )
)
"""Those of the kernel's tests that neither attach to an interface that others have nor count what
others do; most of them wait, for brokers, files or processes."""


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Which tests keep to one process: others by their file, and the kernel's all to the same, as
    they share interfaces and CPUs; but those that can run beside them, so that both processes have
    about as much to do.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file.startswith("tests/kernel/") and file not in _ASIDE:
            return "tests/kernel"
        return file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture
def require() -> Require:
    """`require(condition, reason)`: the test is not run, for that reason, unless it holds."""
    return _require


def _require(condition: object, reason: str) -> None:
    if not condition:
        pytest.skip(reason)


@pytest.fixture
def require_kernel(request: pytest.FixtureRequest) -> Require:
    """`require_kernel(condition, reason)`: the same, where the reason is the running kernel."""

    def required(condition: object, reason: str) -> None:
        if not condition:
            request.node.user_properties.append(BY_KERNEL)
        _require(condition, reason)

    return required


# ---------------------------------------------------------------- what the markers require


def kernel_obstacle() -> str | None:
    """Why tests marked `kernel` cannot run; None when they can."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    may = {number for number in range(64) if effective >> number & 1}
    if CAP_SYS_ADMIN not in may and not {CAP_BPF, CAP_PERFMON} <= may:
        return "loading BPF programs needs root (CAP_BPF and CAP_PERFMON)"
    if not (ROOT / "streamer" / "bpf" / "core.bpf.o").exists():
        return f"the kernel programs are not compiled: {SET_UP}"
    return None


def kafka_obstacle() -> str | None:
    """Why tests marked `kafka` cannot run; None when they can."""
    try:
        kafka_class_path()
    except FileNotFoundError as error:
        return str(error)
    return _missing_tools("java", "kcat")


def mqtt_obstacle() -> str | None:
    """Why tests marked `mqtt` cannot run; None when they can."""
    return _missing_tools("mosquitto", "mosquitto_sub")


def _missing_tools(*names: str) -> str | None:
    missing = [name for name in names if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}: {SET_UP}" if missing else None


OBSTACLES = {"kernel": kernel_obstacle, "kafka": kafka_obstacle, "mqtt": mqtt_obstacle}


# First of all: before the fixtures, which start the brokers.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, obstacle in OBSTACLES.items():
        if item.get_closest_marker(marker) is not None:
            reason = obstacle()
            _require(reason is None, reason or "")


# ---------------------------------------------------------------- nothing is skipped silently

AnyReport = pytest.TestReport | pytest.CollectReport
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return _strict(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return _strict(report)


def _strict(report: Report) -> Report:
    allowed = hasattr(report, "wasxfail") or _by_kernel(report)
    if report.skipped and not allowed and os.environ.get("CI") == "true":
        report.longrepr = f"{report.nodeid}: in CI every test has to run: {_reason(report)}"
        report.outcome = "failed"
    return report


def _by_kernel(report: AnyReport) -> bool:
    return isinstance(report, pytest.TestReport) and BY_KERNEL in report.user_properties


def _reason(report: AnyReport) -> str:
    # pytest keeps (path, line, "Skipped: REASON") of a skip.
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def pytest_collection_finish(session: pytest.Session) -> None:
    if WORKER in ("", "gw0") and session.items:  # each of several collects all
        _write_result({"collected": len(session.items)})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if WORKER or (report.passed and report.when != "call"):  # a worker's head hears it as well
        return
    result = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 1),
        "by_kernel": _by_kernel(report),
        "reason": "" if report.passed else _reason(report),
    }
    _write_result(result)


def _write_result(result: dict[str, object]) -> None:
    """As soon as a test is over, since a kernel that hangs may take the rest along."""
    if file := os.environ.get("STREAMER_TEST_RESULTS"):
        with open(file, "a") as results:
            results.write(json.dumps(result) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tests = defaultdict[str, list[str]](list)
    for report in terminalreporter.stats.get("skipped", []):
        tests[_reason(report)].append(report.nodeid)
    if tests:
        terminalreporter.section("not run")
    for reason, names in tests.items():
        terminalreporter.line(f"{reason}:")
        for name in names:
            terminalreporter.line(f"    {name}")
