"""Settings that change while programs are attached: from then on, and exactly."""

from __future__ import annotations

import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from streamer.config.settings import Filters, Kernel, Settings
from streamer.errors import ConfigError, KernelError
from tests.brokers import free_port
from tests.kernel.agent import kind_of
from tests.kernel.live import Live
from tests.kernel.roles import Role, in_own_network
from tests.kernel.scope import Actor, Scope, checkpoint
from tests.kernel.system import open_missing

pytestmark = pytest.mark.kernel

EACH = 20


# ---------------------------------------------------------------- what is done, again and again


def in_turns(turns: int, action: Callable[..., Any], *arguments: Any) -> None:
    for _ in range(turns):
        checkpoint()
        action(*arguments)


def open_as_user(prefix: str, uid: int) -> None:
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    open_missing(prefix, EACH)


def open_as_another(prefix: str, uid: int) -> None:
    Role("another", open_as_user, prefix, uid).result()


def open_by_name(prefix: str, comm: str) -> None:
    Role(comm, open_missing, prefix, EACH).result()


def open_plainly(prefix: str) -> None:
    open_missing(prefix, EACH)


def execute(program: str) -> None:
    for _ in range(EACH):
        os.waitpid(os.posix_spawn(program, [program], {}), 0)


def connect(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as listener:
        for _ in range(EACH):
            with socket.create_connection(("127.0.0.1", port)):
                listener.accept()[0].close()


class Case(NamedTuple):
    """What is done each time, the filters that leave it out, and its events otherwise."""

    filters: Filters
    action: Callable[..., Any]
    arguments: tuple[Any, ...]
    events: dict[str, int]
    is_one: Callable[[Any], bool]


def of_opens(filters: Filters, action: Callable[..., None], prefix: str, *more: Any) -> Case:
    return Case(
        filters,
        action,
        (prefix, *more),
        {"file.open": EACH},
        lambda event: str(getattr(event, "path", "")).startswith(prefix),
    )


def of_execs(program: str) -> Case:
    return Case(
        Filters(exclude_exes=(program,)),
        execute,
        (program,),
        {"process.exec": EACH},
        lambda event: getattr(event, "exe", "") == program,
    )


def of_connections(port: int) -> Case:
    return Case(
        Filters(exclude_ports=(port,)),
        in_own_network,
        (connect, port),
        {"net.connect": EACH, "net.accept": EACH, "net.close": 2 * EACH},
        lambda event: port in (getattr(event, "local_port", 0), getattr(event, "remote_port", 0)),
    )


@pytest.fixture
def program(open_directory: Path) -> Iterator[str]:
    """A program that nobody else executes."""
    copy = open_directory / "another-true"
    shutil.copy("/bin/true", copy)
    yield str(copy)
    copy.unlink()


def started(scope: Scope, case: Case, turns: int) -> Actor:
    actor = scope.start(in_turns, turns, case.action, *case.arguments)
    actor.reached()
    return actor


def next_turn(actor: Actor, *, last: bool = False) -> None:
    actor.proceed()
    if last:
        actor.result()
    else:
        actor.reached()


def check_case(scope: Scope, case: Case) -> None:
    """It is observed, then kept back and counted, then observed again."""
    # Without a filter for the scope: nobody else's events are kept back then, so that the counts
    # of what is are exact.
    with Live(None, set(case.events)) as live, started(scope, case, 3) as actor:

        def seen() -> Counter[str]:
            return Counter(kind_of(event) for event in live.read() if case.is_one(event))

        def filtered() -> dict[str, int]:
            return {kind: live.counts(kind).filtered for kind in case.events}

        nothing = dict.fromkeys(case.events, 0)
        filters = case.filters
        if filters.exclude_pids:
            filters = Filters(exclude_pids=(actor.pid,))
        next_turn(actor)
        assert (seen(), filtered()) == (case.events, nothing)
        live.state.set_filters(filters)
        next_turn(actor)
        assert (seen(), filtered()) == ({}, case.events)
        live.state.set_filters(Filters())
        next_turn(actor, last=True)
        assert (seen(), filtered()) == (case.events, case.events)
        live.check()


def test_processes_left_out(scope: Scope) -> None:
    check_case(scope, of_opens(Filters(exclude_pids=(1,)), open_plainly, "/set/pid/"))


def test_users_left_out(scope: Scope) -> None:
    uid = 1_100_000 + os.getpid()  # of this run alone
    check_case(scope, of_opens(Filters(exclude_uids=(uid,)), open_as_another, "/set/uid/", uid))


def test_names_left_out(scope: Scope) -> None:
    comm = f"set-{os.getpid()}"
    check_case(scope, of_opens(Filters(exclude_comms=(comm,)), open_by_name, "/set/comm/", comm))


def test_cgroups_left_out(scope: Scope) -> None:
    check_case(scope, of_opens(Filters(exclude_cgroups=(scope.id,)), open_plainly, "/set/cgroup/"))


def test_paths_left_out(scope: Scope) -> None:
    prefix = f"/set/path-{os.getpid()}/"
    check_case(scope, of_opens(Filters(exclude_path_prefixes=(prefix,)), open_plainly, prefix))


def test_executables_left_out(scope: Scope, program: str) -> None:
    check_case(scope, of_execs(program))


def test_ports_left_out(scope: Scope) -> None:
    check_case(scope, of_connections(free_port()))


def test_what_is_kept_changes(scope: Scope) -> None:
    """From one path to another, and both lists at once; nothing of before is in force."""
    with Live(scope, {"file.open"}) as live:

        def seen(filters: Filters) -> list[str]:
            live.state.set_filters(live.within(filters))
            scope.act(open_two)
            return [event.path for event in live.read()]

        assert seen(Filters(path_prefixes=("/set/a",))) == ["/set/a/0", "/set/ab/0"]
        assert seen(Filters(path_prefixes=("/set/b",))) == ["/set/b/0"]
        both = Filters(path_prefixes=("/set/",), exclude_path_prefixes=("/set/a/",))
        assert seen(both) == ["/set/ab/0", "/set/b/0"]
        assert seen(Filters()) == ["/set/a/0", "/set/ab/0", "/set/b/0"]
        assert seen(Filters()) == ["/set/a/0", "/set/ab/0", "/set/b/0"]
        assert live.state.read("filter_paths") == []
        live.check()


def open_two() -> None:
    for place in ("a", "ab", "b"):
        open_missing(f"/set/{place}/", 1)


def test_filters_that_name_what_is_not_there(scope: Scope) -> None:
    """They are refused, and those before go on."""
    with Live(scope, {"file.open"}) as live:
        live.state.set_filters(live.within(Filters(path_prefixes=("/set/a/",))))
        with pytest.raises(ConfigError, match="/no/such/program"):
            live.state.set_filters(live.within(Filters(exes=("/no/such/program",))))
        scope.act(open_two)
        assert [event.path for event in live.read()] == ["/set/a/0"]


def test_filters_that_the_kernel_refuses(scope: Scope) -> None:
    """Those before go on, and the next ones take hold."""
    with Live(scope, {"file.open"}) as live:
        live.state.set_filters(live.within(Filters(path_prefixes=("/set/a",))))
        too_many = live.within(Filters(exclude_pids=tuple(range(1, 4000))))
        with pytest.raises(KernelError, match="cannot set the filters: Argument list too long"):
            live.state.set_filters(too_many)
        scope.act(open_two)
        assert [event.path for event in live.read()] == ["/set/a/0", "/set/ab/0"]
        live.state.set_filters(live.within(Filters(path_prefixes=("/set/b",))))
        scope.act(open_two)
        assert [event.path for event in live.read()] == ["/set/b/0"]


# ---------------------------------------------------------------- kinds and rates


def run_and_open() -> None:
    execute("/bin/true")
    open_missing("/set/", EACH)


def test_kinds_that_are_reported(scope: Scope) -> None:
    """What is not asked for is neither reported nor counted."""
    kinds = {"process.exec", "file.open"}
    with Live(scope, kinds) as live:
        for wanted in (kinds, {"file.open"}, {"process.exec"}, kinds):
            live.state.enable(wanted)
            before = {kind: live.counts(kind).produced for kind in kinds - wanted}
            scope.act(run_and_open)
            events = [e for e in live.read() if getattr(e, "path", "/set/").startswith("/set/")]
            assert Counter(kind_of(event) for event in events) == dict.fromkeys(wanted, EACH)
            assert {kind: live.counts(kind).produced for kind in before} == before
        live.check()


def open_many() -> None:
    open_missing("/set/", 1000)


def test_rates(scope: Scope) -> None:
    """One in so many is reported, with its weight, and the rest is counted as shed."""
    with Live(scope, {"file.open"}, Settings(kernel=Kernel(sample={"file.open": 4}))) as live:
        shed = 0
        for rate in (4, 1, 50, 1 << 20, 0):
            live.state.set_sample({"file.open": rate})
            scope.act(open_many)
            events = live.read()
            counts = live.counts("file.open")
            assert {event.weight for event in events} <= {max(rate, 1)}
            assert len(events) + counts.shed - shed == 1000
            expected = 1000 / max(rate, 1)
            assert abs(len(events) - expected) <= 5 * expected**0.5 + 1  # of a million
            shed = counts.shed
        live.state.set_sample({})
        scope.act(open_many)
        assert len(live.read()) == 1000
        live.check()
