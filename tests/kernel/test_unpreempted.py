"""Programs at perf events of tracepoints, which kernels from 7.0 on have instead of raw ones."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamer.config.settings import Settings
from streamer.kernel import loader
from streamer.kernel.loader import OBJECTS, preempts_tracepoints
from tests.bpf_variant import Variant
from tests.kernel.live import Live
from tests.kernel.scope import Scope

pytestmark = [pytest.mark.kernel, pytest.mark.every_kernel]

KINDS = {"process.exec", "process.fork", "process.exit"}
TIMES = 20


def run_each(script: str) -> list[tuple[int, int]]:
    """A program and a script, each so often. Their pids."""
    return [(run(["/bin/true", "a", ""]), run([script, "given"])) for _ in range(TIMES)]


def run(argv: list[str]) -> int:
    pid = os.posix_spawn(argv[0], argv, {})
    os.waitpid(pid, 0)
    return pid


def observed(scope: Scope, directory: Path, objects: str) -> tuple[list[Any], list[Any]]:
    """The execs of the program, and those of the script; one of each kind for each process."""
    script = directory / "script"
    script.write_text("#!/bin/sh -e\nexit 3\n")
    script.chmod(0o755)
    with Live(scope, KINDS, directory=objects) as live:
        ways = {one.name: one.way for one in live.state.statuses if one.status == "attached"}
        for hook in ("exec", "fork", "exit"):
            way = f"tracepoint/sched/sched_process_{hook}"
            assert ways[f"on_{hook}_unpreempted"] == way
            assert f"on_{hook}" not in ways
        pids = scope.act(run_each, str(script))
        live.check()
    events = live.events
    execs = {one.pid: one for one in events if type(one).__name__ == "ProcessExec"}
    forks = Counter(one.child_pid for one in events if type(one).__name__ == "ProcessFork")
    exits = {one.pid: one for one in events if type(one).__name__ == "ProcessExit"}
    all_pids = {pid for pair in pids for pid in pair}
    assert len(execs) == len([one for one in events if type(one).__name__ == "ProcessExec"])
    assert execs.keys() == all_pids
    assert {pid: forks[pid] for pid in all_pids} == dict.fromkeys(all_pids, 1)
    assert {exits[script_pid].exit_code for _, script_pid in pids} == {3}
    return [execs[plain] for plain, _ in pids], [execs[other] for _, other in pids]


@pytest.mark.usefixtures("as_if_preempted")
def test_what_is_told_is_the_same(scope: Scope, tmp_path: Path) -> None:
    """As by the raw ones: one of each, with the interpreter of a script."""
    plain, scripts = observed(scope, tmp_path, OBJECTS)
    for event in plain:
        assert (event.filename, event.interp, event.argc) == ("/bin/true", "", 3)
    for event in scripts:
        assert (event.filename, event.interp) == (str(tmp_path / "script"), "/bin/sh")
        assert event.argv == ["/bin/sh", "-e", str(tmp_path / "script"), "given"]
        assert event.argc == 4
    assert not any(event.incomplete or event.truncated for event in plain + scripts)


@pytest.mark.usefixtures("as_if_preempted")
def test_an_interpreter_that_is_not_known_is_said_to_be(
    scope: Scope, tmp_path: Path, variant: Callable[..., Variant]
) -> None:
    """Where what is executed was not kept before: all else is there."""
    made = variant({"process.bpf.c": ("kept->bprm = bprm;", "kept->bprm = NULL;")})
    plain, scripts = observed(scope, tmp_path, str(made.objects))
    for event in plain:
        assert (event.filename, event.argc) == ("/bin/true", 3)
    for event in scripts:
        assert (event.filename, event.argc) == (str(tmp_path / "script"), 4)
    for event in plain + scripts:
        assert (event.interp, event.truncated, event.incomplete) == ("", ("interp",), True)


@pytest.mark.usefixtures("as_if_preempted")
def test_where_they_cannot_be_had_it_is_said(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is observed by the raw ones then, unless a task is preempted in one of them."""
    monkeypatch.setattr(loader, "ensure_tracefs", lambda: "there is no tracefs")
    with Live(scope, KINDS) as live:
        attached = {one.name for one in live.state.statuses if one.status == "attached"}
        assert attached >= {f"on_{hook}_preemptible" for hook in ("exec", "fork", "exit")}
        for kind, status in live.state.coverage(KINDS).items():
            assert status.status == "partial"
            place = f"raw_tp/sched_{kind.replace('.', '_')}"
            assert status.reason == (
                f"{place}: those that happen on a CPU where a task is preempted in the program "
                "are not observed"
            )
        pid = scope.act(run, ["/bin/true"])
        live.check()
    told = {type(one).__name__: one for one in live.events}
    assert told["ProcessExec"].pid == told["ProcessExit"].pid == pid
    assert "ProcessFork" in told


@pytest.mark.usefixtures("as_if_preempted")
def test_without_btf_the_release_tells(
    scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a file in the place of the kernel's BTF, which has no variables.

    A fork's child is found, and what is executed is kept with the task, by what takes the kernel's
    own. Nothing is said to be missing that is there by another way.
    """
    shutil.copyfile("/sys/kernel/btf/vmlinux", tmp_path / "vmlinux")
    monkeypatch.setattr(loader, "preempts_tracepoints", lambda release: bool(release))
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    with Live(scope, KINDS, Settings(btf=str(tmp_path / "vmlinux"))) as live:
        attached = {one.name for one in live.state.statuses if one.status == "attached"}
        scope.act(run, [str(script)])
        live.check()
    assert attached == {"on_exec_preemptible", "on_fork_preemptible", "on_exit_unpreempted"}
    found = live.state.coverage(KINDS)
    assert {kind: one.status for kind, one in found.items()} == {
        "process.exec": "partial",
        "process.exit": "full",
        "process.fork": "partial",
    }
    for kind in ("exec", "fork"):
        assert found[f"process.{kind}"].reason == (
            f"raw_tp/sched_process_{kind}: those that happen on a CPU where a task is preempted in "
            "the program are not observed"
        )
    told = {type(one).__name__: one for one in live.events}
    assert told.keys() == {"ProcessExec", "ProcessFork", "ProcessExit"}
    assert (told["ProcessExec"].interp, told["ProcessExec"].incomplete) == ("/bin/sh", False)


def test_from_which_release_on() -> None:
    releases = ("5.10.0-32-amd64", "6.19.3", "7.0-rc1", "10.2")
    assert [preempts_tracepoints(one) for one in releases] == [False, False, True, True]
