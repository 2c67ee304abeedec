"""The socket of a running agent: who may ask, what is answered; what `status` and `top` show."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from textual.widgets import Label, Sparkline, Static

from streamer import cli
from streamer.errors import NoAnswer
from streamer.events.batch import Batch
from streamer.events.schema import of_kind
from streamer.operation import activity, control
from streamer.operation.control import Listening, ask
from streamer.operation.look import Latency, Look, LossLook, RingLook, TopLook
from streamer.sinks.memory import MemorySink
from streamer.terminal.containers import Containers, name_of
from streamer.terminal.status import status_code, status_text, within
from streamer.terminal.top import _CURVES as CURVES
from streamer.terminal.top import HISTORY, Series, Top
from tests.conftest import Require
from tests.unit.test_service import Run, until

ROOT = Path(__file__).resolve().parents[2]


class Small(msgspec.Struct):
    number: int


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir(mode=0o755)
    return made


@pytest.fixture
async def path(directory: Path) -> AsyncIterator[str]:
    """A server that answers `status` with a number."""
    path = str(directory / "s")
    listening = Listening(path)
    server = listening.serve({"status": lambda: Small(7)})
    yield path
    server.close()
    listening.close()


async def answer(path: str, request: str) -> Any:
    return json.loads(await asyncio.to_thread(ask, path, request))


async def test_a_request_is_answered(path: str) -> None:
    assert await answer(path, "status") == {"number": 7}


async def test_what_is_not_known_is_said(path: str) -> None:
    assert await answer(path, "x" * 40) == {"error": f"{'x' * 32!r} is none of: status"}
    assert await answer(path, "x" * 100)  # too long


async def test_who_else_may_not_ask(path: str, require: Require) -> None:
    """By the mode, and by who connects: whoever is handed a way to the socket is not answered."""
    require(os.geteuid() == 0, "becoming another user takes root")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    os.chmod(path, 0o777)  # as if the mode did not hold
    program = "import os, sys; sys.path[:0] = [sys.argv[2]]\n"
    program += "from streamer.operation.control import ask\n"
    program += "os.setgid(65534); os.setuid(65534)\n"
    program += "print(ask('s', 'status'))"
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program, path, str(ROOT)],
        cwd=os.path.dirname(path),
        capture_output=True,
        text=True,
    )
    assert "does not answer who this is" in done.stderr
    assert not done.stdout


async def test_of_two_the_first_has_it(path: str) -> None:
    with pytest.raises(OSError, match="another agent has it"):
        Listening(path)
    assert await answer(path, "status") == {"number": 7}


async def test_what_a_run_has_left_is_taken_over(directory: Path) -> None:
    path = str(directory / "s")
    first = Listening(path)
    first.close()
    with pytest.raises(NoAnswer, match="no agent is running"):
        ask(path, "status")
    second = Listening(path)
    server = second.serve({"status": lambda: Small(8)})
    assert await answer(path, "status") == {"number": 8}
    server.close()
    second.close()


def test_what_others_can_write_is_not_used(directory: Path) -> None:
    directory.chmod(0o777)
    with pytest.raises(OSError, match="others may write to its directory"):
        Listening(str(directory / "s"))


def test_what_is_no_socket_stays(directory: Path) -> None:
    (directory / "s").write_text("mine")
    with pytest.raises(OSError, match="something else is there"):
        Listening(str(directory / "s"))
    assert (directory / "s").read_text() == "mine"


def test_an_agent_that_hangs_is_not_waited_for(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(directory / "s"))
        silent.listen()
        with pytest.raises(NoAnswer, match="does not answer within"):
            ask(str(directory / "s"), "status", seconds=0.2)


# ---------------------------------------------------------------- a service behind it


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    made = Run(MemorySink("memory:\x1b[31m"))
    await made.start()
    yield made
    if not made.ended:
        await made.stop()
    made.kernel.close()
    made.programs.release()


async def test_a_look_has_what_was_done_and_its_schema_takes_it(run: Run) -> None:
    run.programs.emit("process.exec", 5)
    await until(lambda: len(run.events()) == 5)
    data = json.loads(msgspec.json.encode(run.service.look()))
    assert data["counts"]["process.exec"]["read"] == 5
    assert data["sinks"]["memory:\x1b[31m"]["delivered"]["process.exec"] == 5
    schema = of_kind("status", Look)
    assert data.keys() == schema["properties"].keys()


async def test_what_status_prints_is_inert(run: Run) -> None:
    run.programs.emit("process.exec", 5)
    await until(lambda: len(run.events()) == 5)
    text = status_text(run.service.look())
    assert "\x1b" not in text
    assert "process.exec    " in text
    assert "memory:\\x1b[31m is up: 6 delivered" in text
    assert status_code(run.service.look()) == 0
    run.sinks[0]._set_status("down", "gone")
    assert "not ready: memory:\\x1b[31m is down: gone" in status_text(run.service.look())
    assert status_code(run.service.look()) == 1


async def test_events_are_counted_only_while_somebody_looks(run: Run) -> None:
    watch = run.service._watch
    run.programs.emit("process.exec", 5)
    await until(lambda: len(run.events()) == 5)
    assert not watch.watched
    assert not watch._kinds
    assert run.service.top().activity.number == 0
    run.programs.emit("process.exec", 7)
    await until(lambda: len(run.events()) == 12)
    watch.roll()
    found = run.service.top().activity
    assert (found.number, found.read, found.looked_at) == (1, 7, 7)
    assert found.kinds == {"process.exec": 7}
    assert sum(one.events for one in found.processes) == 7
    assert sum(found.cgroups.values()) == 7


def test_a_look_costs_a_bounded_part(run_events: list[Any]) -> None:
    now = [0.0]
    watch = activity.Watch(lambda: now[0])
    watch.look()
    for _ in range(30):
        watch.count(Batch(run_events * 1000))
    now[0] = 1.0
    watch.roll()
    found = watch.look()
    assert (found.read, found.looked_at) == (30_000, activity.MOST_EVENTS)
    assert found.seconds == 1.0
    now[0] = 1.0 + activity.WATCHED_SECONDS
    assert not watch.watched


@pytest.fixture
def run_events() -> list[Any]:
    from streamer.events.stream import StreamLoss

    return [msgspec.convert(_LOSS, StreamLoss)]


_LOSS = {
    "event": "stream.loss",
    "schema": 3,
    "id": "x-stream-1",
    "time_ns": 1,
    "boot_ns": 1,
    "host": "h",
    "boot_id": "b",
    "run_id": "x",
    "seq": 1,
    "stage": "kernel",
    "count": 1,
    "kinds": {},
}


async def test_top_shows_who_makes_events(run: Run, directory: Path) -> None:
    listening = Listening(str(directory / "s"))
    server = listening.serve({"status": run.service.look, "top": run.service.top})
    decoder = msgspec.json.Decoder(TopLook)
    app = Top(
        lambda: decoder.decode(ask(str(directory / "s"), "top")), Containers(""), every_seconds=0.05
    )
    async with app.run_test(size=(120, 50)) as pilot:
        async with asyncio.timeout(20):
            while app.looks < 2 or not app.query_one("#kinds").row_count:  # type: ignore[attr-defined]
                run.programs.emit("process.exec", 20)
                await pilot.pause(0.1)
        rows = {where: _rows(app, where) for where in ("kinds", "processes", "cgroups")}
        assert [row[0] for row in rows["kinds"]] == ["process.exec"]
        assert len(rows["processes"]) == 1
        assert rows["cgroups"][0][0].startswith("cgroup ")
        await pilot.press("p")
        shown = app.looks
        await pilot.pause(1.3)
        assert app.looks <= shown + 1
        await pilot.press("q")
    server.close()
    listening.close()


async def test_top_shows_losses_rings_and_sinks(run: Run) -> None:
    """As numbers, and as lines whose last value is the newest."""
    run.programs.emit("process.exec", 20)
    await until(lambda: run.service.top().look.counts["process.exec"].read == 20)
    base = run.service.top()
    (name, sink), look = next(iter(base.look.sinks.items())), base.look
    counts = look.counts["process.exec"]
    given = itertools.count(1)

    def answer() -> TopLook:
        number = min(next(given), 2)
        lost, lag = (5, 0.0) if number == 1 else (25, 1.5)
        changed = msgspec.structs.replace(
            look,
            counts={"process.exec": msgspec.structs.replace(counts, lost=lost)},
            losses=[LossLook("kernel", "", "process.exec", lost)],
            rings={"bulk": RingLook(1000, 750 if number == 2 else 10, 0)},
            sinks={name: msgspec.structs.replace(sink, lag_seconds=lag, spooled=1234)},
        )
        activity = msgspec.structs.replace(
            base.activity, number=number, seconds=2.0, read=40, kinds={"process.exec": 40}
        )
        return TopLook(changed, activity)

    app = Top(answer, Containers(""), every_seconds=0.05)
    async with app.run_test(size=(120, 50)) as pilot:
        async with asyncio.timeout(20):
            while app.looks < 2:
                await pilot.pause(0.05)
        labels = {one: str(app.query_one(f"#label-{one}", Label).render()) for one in CURVES}
        curves = {one: list(app.query_one(f"#curve-{one}", Sparkline).data or ()) for one in CURVES}
        table: Any = app.query_one("#kinds")
        ((kind, rate, line, lost),) = [table.get_row_at(row) for row in range(table.row_count)]
        sinks = str(app.query_one("#sinks", Static).render())
        before = app.return_code
        await pilot.press("ctrl+c")
        assert (before, app.return_code) == (None, 0)
    assert labels == {
        "read": "events a second: 20",
        "lost": "lost a second: 10, 25 in all",
        "ring": "fullest ring: 75%",
        "lag": "largest sink lag: 1.50s",
    }
    assert {one: data[-2:] for one, data in curves.items()} == {
        "read": [20.0, 20.0],
        "lost": [0.0, 10.0],
        "ring": [0.01, 0.75],
        "lag": [0.0, 1.5],
    }
    assert (str(kind), str(rate), str(lost)) == ("process.exec", "20", "25")
    assert line.data[-2:] == [20.0, 20.0]
    assert "1,234 on disk, lag 1.50s" in sinks


def _rows(app: Top, where: str) -> list[list[str]]:
    table: Any = app.query_one(f"#{where}")
    return [[str(cell) for cell in table.get_row_at(row)[:2]] for row in range(table.row_count)]


# ---------------------------------------------------------------- parts


def test_series() -> None:
    series = Series()
    series.add({"a": 1.0, "b": 2.0})
    series.add({"b": 3.0})
    assert series.of("a")[-2:] == [1.0, 0.0]
    assert series.of("b")[-2:] == [2.0, 3.0]
    for _ in range(HISTORY):
        series.add({"b": 1.0})
    assert series.of("a") == []
    assert len(series.of("b")) == HISTORY


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/", "/"),
        ("/system.slice/ssh.service", "ssh.service"),
        (f"/system.slice/docker-{'ab' * 32}.scope", "container abababababab"),
        (f"/kubepods.slice/x/cri-containerd-{'12' * 32}.scope", "container 121212121212"),
        (f"/docker/{'cd' * 32}/init", "container cdcdcdcdcdcd"),
        ("/user.slice/user-0.slice/session-1.scope", "session-1.scope"),
        ("/made/by/hand", "/made/by/hand"),
    ],
)
def test_names_of_cgroups(path: str, name: str) -> None:
    assert name_of(path) == name


def test_containers_are_looked_for_again_after_a_while(tmp_path: Path) -> None:
    now = [0.0]
    containers = Containers(str(tmp_path), lambda: now[0])
    assert containers.name(1) == "cgroup 1"
    made = tmp_path / "x.service"
    made.mkdir()
    inode = made.stat().st_ino
    assert containers.name(inode) == f"cgroup {inode}"
    now[0] = 5.0
    assert containers.name(inode) == "x.service"


def test_within() -> None:
    latency = Latency((0.001, 0.01), (5, 4, 1), 1.0)
    assert [within(latency, share) for share in (0.5, 0.9, 0.99)] == [
        "1.00ms",
        "10.0ms",
        "more than 10.0ms",
    ]


# ---------------------------------------------------------------- the commands


def test_status_without_an_agent(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--socket", str(directory / "s")]) == 3
    assert f"no agent is running that can be asked at {directory}/s" in capfd.readouterr().err


def test_top_needs_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top"]) == 2
    assert "streamer top needs a terminal" in capfd.readouterr().err


def test_the_socket_is_that_of_the_configuration(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also that of the default one."""
    config = directory / "streamer.toml"
    config.write_text('control.socket = "/nowhere/at/all"\n')
    assert cli.main(["status", "-c", str(config)]) == 3
    assert "/nowhere/at/all" in capfd.readouterr().err
    monkeypatch.setattr(cli, "DEFAULT_CONFIG", config)
    assert cli.main(["status"]) == 3
    assert "/nowhere/at/all" in capfd.readouterr().err
    config.write_text('control.socket = ""\n')
    assert cli.main(["status"]) == 2


def test_bounds() -> None:
    assert control.BOUNDS.connections * control.BOUNDS.request < 1024
