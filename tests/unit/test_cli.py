"""The command line: what it comes to, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from streamer import __version__, cli
from streamer.cli import Plan, main, plan
from streamer.config.settings import FileSink, Filters, KafkaSink, Limits, Settings, StdoutSink
from streamer.errors import ConfigError
from streamer.events.catalogue import PUBLISHED, SELECTABLE
from streamer.events.kinds import KINDS
from streamer.events.stream import STREAM_KINDS
from streamer.events.summaries import SUMMARIES
from streamer.terminal import tables

COMMANDS = ("run", "check", "events", "schema", "verify")
SYSCALLS = frozenset({"syscall.latency", "syscall.slow"})
PROFILE = frozenset({"profile.sample"})
AT_INTERFACES = frozenset({"net.flow", "xdp.counters"})
UNTARGETED = frozenset(KINDS) - SYSCALLS - AT_INTERFACES
"""What can be observed without anything named that it is to be observed at."""
OFF = frozenset({"file.open", "net.drop", "net.dns"})
DEFAULT = UNTARGETED - OFF


def planned(*arguments: str) -> Plan:
    return plan(cli.parser().parse_args(arguments))


# ------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_an_example(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    text = capfd.readouterr().out
    assert caught.value.code == 0
    assert f"usage: streamer {command}" in text
    assert f"streamer {command} " in text.partition("\nexample:\n")[2]


def test_the_help_lists_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capfd.readouterr().out
    assert caught.value.code == 0
    assert all(f"\n    {command} " in text for command in COMMANDS)


def test_the_version(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capfd.readouterr().out == f"streamer {__version__}\n"


def test_help_loads_nothing_but_argparse() -> None:
    program = (
        "import sys\nfrom streamer.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded = set(done.stderr.split())
    assert "streamer.cli" in loaded
    assert not loaded & {"msgspec", "asyncio", "uvloop", "aiokafka", "streamer.config.settings"}


# ----------------------------------------------------------------------- what `run` comes to


def test_run_without_arguments_streams_the_default_to_standard_output() -> None:
    assert planned("run") == Plan(Settings(sinks=(StdoutSink(),)), DEFAULT, Limits())


def test_every_option_of_run(tmp_path: Path) -> None:
    file = tmp_path / "streamer.toml"
    file.write_text('log_level = "debug"\n[filters]\npids = [9]\nuids = [7]\n')
    got = planned(
        *("run", "-c", str(file), "--events", "default,file.*", "--events", "!process.fork"),
        *("--sink", "file:x", "--sink", "kafka://h/t?encoding=json"),
        *("--encoding", "msgpack", "--duration", "5m", "--max-events", "10", "--no-status"),
        *("--host", "web-1", "--color", "never"),
        *("--pid", "1", "--pid", "2", "--exclude-pid", "3", "--comm", "sshd"),
        *("--exclude-comm", "cron", "--path", "/etc", "--exclude-path", "/etc/ssl"),
        *("--port", "443", "--exclude-port", "80", "--cgroup", "5", "--exclude-cgroup", "6"),
        *("--exclude-uid", "0"),
    )
    assert got.settings == Settings(
        events=("default,file.*", "!process.fork"),
        host="web-1",
        log_level="debug",
        filters=Filters(
            pids=(1, 2),
            exclude_pids=(3,),
            uids=(7,),
            exclude_uids=(0,),
            comms=("sshd",),
            exclude_comms=("cron",),
            path_prefixes=("/etc",),
            exclude_path_prefixes=("/etc/ssl",),
            ports=(443,),
            exclude_ports=(80,),
            cgroups=(5,),
            exclude_cgroups=(6,),
        ),
        sinks=(
            FileSink(path="x", encoding="msgpack"),
            KafkaSink(bootstrap=("h:9092",), topic="t", encoding="json"),
        ),
    )
    assert got.kinds == DEFAULT - {"process.fork"} | {"file.open"}
    assert got.limits == Limits(duration_seconds=300.0, max_events=10, status=False)


def test_color_is_for_standard_output() -> None:
    assert planned("run", "--color", "always").settings.sinks == (StdoutSink(color="always"),)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("10", 10.0), ("10s", 10.0), ("1.5s", 1.5), ("5m", 300.0), ("2h", 7200.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert planned("run", "--duration", text).limits.duration_seconds == seconds


def test_a_user_by_name() -> None:
    own = pwd.getpwuid(os.getuid())
    assert planned("run", "--uid", own.pw_name).settings.filters.uids == (own.pw_uid,)


def test_a_cgroup_by_path_is_its_inode_number(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").touch()
    got = planned("run", "--cgroup", str(tmp_path)).settings.filters.cgroups
    assert got == (tmp_path.stat().st_ino,)


def test_events_that_begin_with_a_minus() -> None:
    assert planned("run", "--events=-net.*").kinds == {k for k in DEFAULT if k[:3] != "net"}


def test_check_takes_the_same_events_and_file(tmp_path: Path) -> None:
    file = tmp_path / "streamer.toml"
    file.write_text('events = ["file.open"]')
    assert planned("check", "-c", str(file)).kinds == {"file.open"}
    assert planned("check", "-c", str(file), "--events", "*").kinds == UNTARGETED


# ------------------------------------------------------------------------------ bad input

RUN_ERRORS = [
    (["--pid", "x"], "argument --pid: found 'x', allowed: an integer (see streamer run --help)"),
    (["--pid", "-1"], "argument --pid: found '-1', allowed: an integer (see streamer run --help)"),
    (
        ["--pid", "0"],
        "command line: filters.pids[0]: found 0 (integer), allowed: an integer from 1 to 4194304",
    ),
    (
        ["--uid", "no-such-user"],
        "argument --uid: found 'no-such-user', allowed: a user id or the name of a user "
        "(see streamer run --help)",
    ),
    (
        ["--cgroup", "/dev/null"],
        "argument --cgroup: found '/dev/null', allowed: an id or the directory of a cgroup (v2) "
        "(see streamer run --help)",
    ),
    (
        ["--cgroup", "no-such-cgroup"],
        "argument --cgroup: found 'no-such-cgroup', which is not there, allowed: an id or the "
        "directory of a cgroup (v2) (see streamer run --help)",
    ),
    *(
        (
            ["--duration", text],
            f"argument --duration: found '{text}', allowed: a time above 0 such as 500ms, 10s, "
            "5m, 1h or 1d (see streamer run --help)",
        )
        for text in ("", "0s", "s", "5x", "1.2.3s", "10 s", "9" * 12)
    ),
    (
        ["--max-events", "0"],
        "argument --max-events: found '0', allowed: an integer from 1 (see streamer run --help)",
    ),
    (["--sink", "mqtt://u:pw@h/t"], "--sink mqtt://…: a password does not belong into a URL, use "
     "password_env or password_file"),
    (["mqtt://u:hunter2@h/t"], "unrecognized arguments: mqtt://…@h/t (see streamer --help)"),
    (["--even", "x"], "unrecognized arguments: --even x (see streamer --help)"),
    (["a\nb\x1b[2J"], r"unrecognized arguments: a\nb\x1b[2J (see streamer --help)"),
    (["-c", "/no/such/file"], "/no/such/file: cannot be read: No such file or directory"),
    (
        ["--comm", "\udcff"],
        'command line: filters.comms[0]: found "\\udcff" (string), '
        "allowed: UTF-8 without control characters",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), RUN_ERRORS)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.err == f"streamer: {message}\n"
    assert captured.out == ""


def test_no_message_is_longer_than_what_somebody_reads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its beginning says where, its end says why, whatever is between."""
    long = "k" * 1_000_000
    file = tmp_path / "streamer.toml"
    for text in (f"{long} = 1", f"[{long}]\n[{long}]", f"[kernel.sample]\n{long} = 1"):
        file.write_text(text)
        assert main(["run", "-c", str(file)]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"streamer: {file}: ")
        assert len(line) < 2100
    assert main(["run", "-c", "/" + "n/" * 4000]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("/n: cannot be read: File name too long")
    assert len(line) < 2100
    assert main(["run", "--events", long]) == 2
    assert len(capfd.readouterr().err) < 2100


def test_no_command_is_bad_input(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    expected = "the following arguments are required: COMMAND (see streamer --help)"
    assert capfd.readouterr().err == f"streamer: {expected}\n"


def test_a_glob_names_where_it_is_from(tmp_path: Path) -> None:
    file = tmp_path / "streamer.toml"
    file.write_text('events = ["disk.*"]')
    kinds = ", ".join(sorted(UNTARGETED))
    known = f"which matches no event, allowed: default, or globs of {kinds}"
    with pytest.raises(ConfigError) as caught:
        planned("run", "-c", str(file))
    assert str(caught.value) == f'{file}: events: found "disk.*", {known}'
    with pytest.raises(ConfigError) as caught:
        planned("run", "-c", str(file), "--events", "usb.*")
    assert str(caught.value) == f'--events: found "usb.*", {known}'


def test_what_is_observed_at_interfaces_needs_one(tmp_path: Path) -> None:
    assert planned("run", "--interface", "eth0").kinds == DEFAULT | AT_INTERFACES
    assert planned("run", "--events", "*").kinds == UNTARGETED
    everything = planned("run", "--events", "*", "--interface", "eth0", "--interface", "eth1")
    assert everything.kinds == SELECTABLE.keys() - SYSCALLS - PROFILE
    assert everything.settings.kernel.interfaces == ("eth0", "eth1")
    for wanted in ("xdp.counters", "xdp.*", "net.flow", "default,xdp.c*"):
        with pytest.raises(ConfigError, match="and no interface is named: --interface NAME"):
            planned("run", "--events", wanted)
    file = tmp_path / "streamer.toml"
    file.write_text("[kernel]\ninterfaces = ['br0']\nopen_latency = true\n")
    assert planned("run", "-c", str(file), "--events", "xdp.*").kinds == {"xdp.counters"}
    changed = planned("run", "-c", str(file), "--interface", "eth0").settings.kernel
    assert (changed.interfaces, changed.open_latency) == (("eth0",), True)


def test_system_calls_are_timed_that_are_named() -> None:
    assert planned("run", "--syscall", "fsync").kinds == DEFAULT | SYSCALLS
    both = planned("run", "--events", "syscall.*", "--syscall", "fsync", "--syscall", "*")
    assert (both.kinds, both.settings.kernel.syscalls) == (SYSCALLS, ("fsync", "*"))
    assert planned("run", "--events=-syscall.slow", "--syscall", "*").kinds == (
        DEFAULT | {"syscall.latency"}
    )
    with pytest.raises(ConfigError, match="and no system call is named: --syscall NAME"):
        planned("run", "--events", "syscall.slow")


# --------------------------------------------------------------------- `events`, `schema`


def test_events_lists_every_kind_with_its_default(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["events"]) == 0
    head, *rows = capfd.readouterr().out.splitlines()
    assert head.split() == ["kind", "ring", "default", "meaning"]
    listed = {row.split()[0]: tuple(row.split()[1:3]) for row in rows}
    assert listed == {
        **{k: (info.ring, "off" if k in OFF else "on") for k, info in KINDS.items()},
        **{kind: ("agent", "off" if kind in PROFILE else "on") for kind in SUMMARIES},
        **{kind: ("agent", "always") for kind in STREAM_KINDS},
    }
    column = head.index("meaning")
    assert rows[0][column:] == KINDS["process.exec"].doc
    assert all(row[column - 1] == " " != row[column] for row in rows)
    assert all(row.endswith(".") for row in rows)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_events_of_a_kind_shows_every_field(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["events", kind]) == 0
    head, *unseen, table = capfd.readouterr().out.split("\n\n")
    columns, *rows = table.splitlines()
    info = PUBLISHED[kind]
    assert head.startswith(f"{kind} ({info.ring}, ")
    assert unseen == ([f"Never observed: {'; '.join(info.unseen)}."] if info.unseen else [])
    assert columns.split() == ["field", "type", "meaning"]
    struct: Any = info.struct
    assert [row.split()[0] for row in rows] == list(struct.__struct_fields__)
    assert all(len(row.split()) > 2 for row in rows)


@pytest.mark.parametrize(
    ("kind", "when"),
    [
        ("net.close", "bulk, on by default"),
        ("file.open", "bulk, off by default"),
        ("stream.loss", "agent, always on"),
    ],
)
def test_events_of_a_kind_says_when_it_is_on(kind: str, when: str) -> None:
    info = PUBLISHED[kind]
    assert tables.kind_text(info).startswith(f"{kind} ({when}): {info.doc}\n\n")


def test_events_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["events", "--json", "process.exec", "file.open"]) == 0
    exec_, open_ = json.loads(capfd.readouterr().out)
    assert (exec_["kind"], exec_["ring"], exec_["default"]) == ("process.exec", "critical", True)
    assert (open_["kind"], open_["default"]) == ("file.open", False)
    assert "open_by_handle_at" in open_["unseen"]
    path = {"name": "path", "type": "string"}
    assert path.items() <= next(f for f in open_["fields"] if f["name"] == "path").items()


@pytest.mark.parametrize("command", ["events", "schema"])
def test_an_unknown_kind_lists_the_known_ones(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "disk.read"]) == 2
    allowed = ", ".join(PUBLISHED)
    expected = f"streamer: 'disk.read' is no kind of event, allowed: {allowed}\n"
    assert capfd.readouterr().err == expected


def test_the_schema_of_a_kind(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "net.connect"]) == 0
    schema = json.loads(capfd.readouterr().out)
    (definition,) = schema["$defs"].values()
    assert schema["$ref"] == f"#/$defs/{definition['title']}"
    assert definition["properties"]["event"] == {"enum": ["net.connect"]}
    assert definition["properties"]["remote_port"]["type"] == "integer"


def test_the_schema_of_any_event(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capfd.readouterr().out)
    tags = [
        schema["$defs"][choice["$ref"].rpartition("/")[2]]["properties"]["event"]["enum"]
        for choice in schema["anyOf"]
    ]
    assert tags == [[kind] for kind in PUBLISHED]


def test_the_schema_of_check(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "check"]) == 0
    schema = json.loads(capfd.readouterr().out)
    assert schema["properties"]["kinds"]["additionalProperties"] == {"$ref": "#/$defs/Kind"}


def test_the_schema_of_the_configuration(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "config"]) == 0
    assert "MqttSink" in json.loads(capfd.readouterr().out)["$defs"]


# --------------------------------------------------------------------------- how it ends


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "streamer", *arguments], **options)


@pytest.mark.parametrize(("arguments", "code"), [(["schema"], 0), (["check", "--json"], 1)])
def test_a_closed_pipe_ends_it_quietly(arguments: list[str], code: int) -> None:
    """With 0 only where that is no judgement of what nobody has read."""
    reader, writer = os.pipe()
    os.close(reader)
    with start(*arguments, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        _, error = process.communicate()
    assert (process.returncode, error) == (code, b"")


def test_closed_standard_output_is_no_defect() -> None:
    done = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m streamer events >&-"], stderr=subprocess.PIPE
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_interrupt_ends_with_130(tmp_path: Path) -> None:
    fifo = tmp_path / "streamer.toml"
    os.mkfifo(fifo)
    with start("check", "-c", str(fifo), stdout=-1, stderr=-1) as process:
        writer = opened_by_reader(fifo, process)
        process.send_signal(signal.SIGINT)
        output, error = process.communicate()
        os.close(writer)
    assert (process.returncode, output, error) == (130, b"", b"")


def opened_by_reader(fifo: Path, process: subprocess.Popen[bytes]) -> int:
    """The FIFO's other end, once the process waits for what it reads there."""
    while process.poll() is None:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # ENXIO: nobody reads yet
            time.sleep(0.01)
    raise AssertionError(process.communicate())
