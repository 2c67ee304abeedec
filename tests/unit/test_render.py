"""Lines for people: what each kind says, and that no event can take over the terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest

from streamer.events import kinds as events
from streamer.events.batch import Batch
from streamer.events.dns import DnsAnswer
from streamer.events.stream import (
    KindCounts,
    KindReport,
    SinkCounts,
    StreamHeartbeat,
    StreamLoss,
    StreamManifest,
    StreamShed,
)
from streamer.events.summaries import ProfileSample, SyscallLatency, XdpCounters
from streamer.terminal import lines as render
from streamer.terminal.console import Console
from streamer.terminal.lines import Rates, Renderer, StatusLine, printable, status_text

COMMON = {"time_ns": 1_800_000_000_123_456_789, "pid": 42, "uid": 1000, "comm": "bash"}


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def make(kind: str, **values: Any) -> Any:
    """An event of that kind, of `values` and otherwise zeros and empty strings."""
    struct_type: Any = events.KINDS[kind].struct
    usual = {"owner_known": True} if "owner_known" in struct_type.__struct_fields__ else {}
    return filled(struct_type, **(usual | values))


def filled(cls: type[Any], **values: Any) -> Any:
    hints = get_type_hints(cls)
    needed = [field.name for field in msgspec.structs.fields(cls) if field.required]
    common = {name: value for name, value in COMMON.items() if name in needed}
    zeros = {name: _zero(hints[name]) for name in needed if name not in values | common}
    return cls(**(zeros | common | values))


def _zero(hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return get_args(hint)[0]
    return filled(hint) if hasattr(hint, "__struct_fields__") else (get_origin(hint) or hint)()


def lines(*made: Any, color: bool = False, width: int = 0) -> str:
    return Renderer(color, width)(Batch(list(made))).decode()


def essence(event: Any) -> str:
    """The line of an event without the columns that all kinds share."""
    line = lines(event)
    shared = re.match(r"^\d\d:\d\d:\d\d\.123 \S+ +42  1000 bash            ", line)
    assert shared is not None
    return line.rstrip("\n")[shared.end() :]


CONNECTION: dict[str, Any] = {
    "local_addr": "10.0.0.1",
    "local_port": 51000,
    "remote_addr": "93.184.216.34",
    "remote_port": 443,
}

DNS: dict[str, Any] = {
    "query": "a.test",
    "query_type": "A",
    "state": "answered",
    "response_code": "NOERROR",
    "transport": "udp",
    "remote_addr": "9.9.9.9",
    "remote_port": 53,
    "latency_ns": 2_500_000,
}

ESSENCES: list[tuple[str, dict[str, Any], str]] = [
    ("process.exec", {"cmdline": "ls -l /", "cwd": "/srv"}, "ls -l /  (in /srv)"),
    ("process.exec", {"exe": "/bin/x", "cwd": "/"}, "/bin/x  (in /)"),
    (
        "process.exec",
        {"cmdline": "ls", "cwd": "/", "exe": "/usr/bin/ls", "filename": "/bin/ls"},
        "ls  (in /)",
    ),
    (
        "process.exec",
        {"cmdline": "/bin/sh ./run", "cwd": "/", "filename": "./run", "interp": "/bin/sh"},
        "/bin/sh ./run  (script ./run, in /)",
    ),
    (
        "process.exec",
        {"cmdline": "x", "cwd": "/", "truncated": ("argv", "cwd"), "invalid_utf8": True},
        "x  (in /) [argv and cwd truncated, invalid UTF-8]",
    ),
    ("process.exec", {"cmdline": "x", "cwd": "/", "incomplete": True}, "x  (in /) [incomplete]"),
    ("process.exec", {"cmdline": "x", "cwd": "/", "exe_deleted": True}, "x  (in /) deleted"),
    (
        "process.exec",
        {"cmdline": "x", "cwd": "/", "exe_memfd": True, "exe_deleted": True},
        "x  (in /) from memory",
    ),
    ("process.fork", {"child_pid": 43}, "child 43"),
    ("process.exit", {"exit_code": 3, "duration_ns": 1_230_000_000}, "exit 3 after 1.23s"),
    ("process.exit", {"signal": 9, "duration_ns": 5000}, "SIGKILL after 5.00µs"),
    ("process.exit", {"signal": 11, "core_dumped": True}, "SIGSEGV, core dumped after 0ns"),
    (
        "file.open",
        {"path": "/etc/passwd", "fd": 3, "flags": os.O_CLOEXEC, "latency_ns": 12_300},
        "/etc/passwd  O_RDONLY|O_CLOEXEC = 3 12.3µs",
    ),
    (
        "file.open",
        {"path": "/new", "fd": 4, "flags": os.O_WRONLY | os.O_CREAT, "mode": 0o640},
        "/new  O_WRONLY|O_CREAT 0640 = 4",
    ),
    (
        "file.open",
        {"path": "/no", "fd": -1, "errno": 2, "latency_ns": 800},
        "/no  O_RDONLY ENOENT 800ns",
    ),
    (
        "net.connect",
        CONNECTION | {"direction": "outbound", "latency_ns": 20_000_000},
        "10.0.0.1:51000 -> 93.184.216.34:443 20.0ms",
    ),
    (
        "net.connect",
        CONNECTION | {"direction": "outbound", "errno": 101, "owner_known": False},
        "10.0.0.1:51000 -> 93.184.216.34:443 ENETUNREACH [owner unknown]",
    ),
    (
        "net.connect",
        {
            "direction": "outbound",
            "remote_addr": "::1",
            "remote_port": 1,
            "errno": 111,
            "latency_ns": 999,
        },
        "*:* -> [::1]:1 ECONNREFUSED 999ns",
    ),
    (
        "net.accept",
        CONNECTION | {"direction": "inbound", "fd": 7},
        "10.0.0.1:51000 <- 93.184.216.34:443 = 7",
    ),
    (
        "net.close",
        CONNECTION
        | {
            "direction": "unknown",
            "bytes_sent": 999,
            "bytes_received": 1536,
            "duration_ns": 125 * 10**9,
            "errno": 104,
        },
        "10.0.0.1:51000 -- 93.184.216.34:443 ECONNRESET sent 999B, received 1.50KiB after 2m05s",
    ),
    (
        "net.close",
        CONNECTION | {"direction": "inbound"},
        "10.0.0.1:51000 <- 93.184.216.34:443 sent 0B, received 0B",
    ),
    (
        "net.listen",
        {"local_addr": "::", "local_port": 443, "backlog_asked": 99999, "backlog": 4096},
        "on [::]:443 backlog 4096",
    ),
    (
        "net.listen",
        {"local_addr": "127.0.0.1", "local_port": 80, "backlog_asked": 1, "errno": 98},
        "on 127.0.0.1:80 EADDRINUSE",
    ),
    (
        "net.bind",
        {"local_addr": "0.0.0.0", "local_port": 53, "asked_port": 53, "transport": "udp"},
        "udp 0.0.0.0:53",
    ),
    (
        "net.bind",
        {"local_addr": "::1", "local_port": 40123, "transport": "tcp"},
        "tcp [::1]:40123 chosen by the kernel",
    ),
    (
        "net.bind",
        {"local_addr": "127.0.0.1", "asked_port": 80, "transport": "tcp", "errno": 13},
        "tcp 127.0.0.1:80 EACCES",
    ),
    (
        "net.retransmit",
        CONNECTION
        | {
            "direction": "outbound",
            "content": "data",
            "bytes": 2896,
            "segments": 2,
            "state": "established",
            "congestion": "recovery",
        },
        "10.0.0.1:51000 -> 93.184.216.34:443 2.83KiB in 2 segments established, recovery",
    ),
    (
        "net.retransmit",
        CONNECTION
        | {
            "direction": "inbound",
            "content": "syn_ack",
            "segments": 1,
            "state": "new_syn_recv",
            "congestion": "open",
            "owner_known": False,
        },
        "10.0.0.1:51000 <- 93.184.216.34:443 syn_ack new_syn_recv, open [owner unknown]",
    ),
    (
        "net.udp",
        CONNECTION
        | {
            "direction": "outbound",
            "datagrams_sent": 12,
            "bytes_sent": 1536,
            "datagrams_received": 1200,
            "bytes_received": 3 << 20,
            "send_errors": 2,
            "drops": 7,
            "closed": True,
            "duration_ns": 1_230_000_000,
        },
        "10.0.0.1:51000 -> 93.184.216.34:443 sent 12 (1.50KiB) received 1,200 (3.00MiB) "
        "2 failed 7 dropped closed after 1.23s",
    ),
    (
        "net.udp",
        {"local_addr": "0.0.0.0", "local_port": 53, "direction": "inbound", "duration_ns": 5000},
        "0.0.0.0:53 <- *:* sent 0 (0B) received 0 (0B) in use for 5.00µs",
    ),
    (
        "net.dns",
        DNS
        | {
            "answers": [DnsAnswer("a.test", "CNAME", 1, "b.test")]
            + [DnsAnswer("b.test", "A", 1, f"192.0.2.{i}") for i in range(5)],
            "answers_left_out": 2,
            "response_truncated": True,
        },
        "a.test A NOERROR CNAME b.test, A 192.0.2.0, A 192.0.2.1, A 192.0.2.2 and 4 more truncated "
        "udp 9.9.9.9:53 2.50ms",
    ),
    (
        "net.dns",
        DNS | {"state": "unanswered", "response_code": "", "latency_ns": 10 * 10**9},
        "a.test A unanswered udp 9.9.9.9:53 10.0s",
    ),
    (
        "net.dns",
        DNS
        | {
            "state": "unsolicited",
            "response_code": "NXDOMAIN",
            "malformed": "it ends too early",
            "latency_ns": 0,
            "owner_known": False,
        },
        "a.test A unsolicited NXDOMAIN malformed: it ends too early udp 9.9.9.9:53 [owner unknown]",
    ),
    (
        "syscall.slow",
        {"syscall": "read", "ret": 4, "duration_ns": 1_500_000_000, "arg0": 3},
        "read = 4 after 1.50s",
    ),
    (
        "syscall.slow",
        {"syscall": "fsync", "errno": 5, "ret": -1, "duration_ns": 2_000_000_000},
        "fsync EIO after 2.00s",
    ),
    (
        "net.flow",
        {
            "client_addr": "10.0.0.1",
            "client_port": 51000,
            "server_addr": "93.184.216.34",
            "server_port": 443,
            "protocol": 6,
            "interface": "eth0",
            "client_bytes": 1536,
            "client_packets": 7,
            "server_bytes": 999,
            "server_packets": 5,
            "reason": "end",
            "handshake_ns": 1_200_000,
        },
        "10.0.0.1:51000 -> 93.184.216.34:443 TCP eth0 sent 1.50KiB in 7, received 999B in 5 end"
        " handshake 1.20ms",
    ),
]

DROP: dict[str, Any] = {
    "source_addr": "192.0.2.1",
    "source_port": 1234,
    "destination_addr": "192.0.2.2",
    "destination_port": 80,
    "transport": "tcp",
    "length": 40,
}


COUNTED: dict[str, Any] = {
    "interface": "eth0",
    "network": "ipv4",
    "transport": "udp",
    "ports": "user",
}
COUNTED |= {"vlan": "none", "verdict": "whole", "period_ns": 2 * 10**9}
SUMMARIES = [
    (
        COUNTED | {"packets": 3000, "bytes": 1536},
        "eth0            ipv4 udp, user port: 3,000 packets, 1.50KiB in 2.00s, 1.50k/s\n",
    ),
    (
        COUNTED | {"transport": "none", "ports": "none", "vlan": "double", "verdict": "malformed"},
        "eth0            double VLAN, ipv4, malformed: 0 packets, 0B in 2.00s, 0/s\n",
    ),
    (
        COUNTED | {"verdict": "later_fragment", "packets": 1, "period_ns": 0},
        "eth0            ipv4 udp, user port, later fragment: 1 packets, 0B in 0ns\n",
    ),
]


@pytest.mark.parametrize(("values", "expected"), SUMMARIES)
def test_packets_by_class(values: dict[str, Any], expected: str) -> None:
    assert lines(filled(XdpCounters, **values)).endswith(f"xdp.counters {expected}")


CALLS = [
    (
        {"count": 1200, "errors": 3, "p50_ns": 255, "p90_ns": 511, "p99_ns": 2047, "max_ns": 1663},
        "1,200 calls, 3 failed, p50 255ns, p90 511ns, p99 2.05µs, max 1.66µs in 2.00s\n",
    ),
    (
        {"cgroup_id": 77, "count": 1, "max_ns": 5, "p50_ns": 5, "p90_ns": 5, "p99_ns": 5},
        "cgroup 77: 1 calls, p50 5ns, p90 5ns, p99 5ns, max 5ns in 2.00s\n",
    ),
    ({"unreturned": 4}, "0 calls, 4 returns missed in 2.00s\n"),
]


@pytest.mark.parametrize(("values", "expected"), CALLS)
def test_calls_of_a_period(values: dict[str, Any], expected: str) -> None:
    event = filled(SyscallLatency, syscall="fsync", period_ns=2 * 10**9, **values)
    assert lines(event).endswith(f"syscall.latency fsync           {expected}")


def test_samples_of_a_profile() -> None:
    values: dict[str, Any] = {
        "count": 12,
        "taken": 1980,
        "frames": ("libc.so.6`read", "[kernel]`f"),
    }
    made = filled(ProfileSample, rate_hz=99, **values)
    assert lines(made).endswith("   12 of 1,980 [kernel]`f < libc.so.6`read\n")
    values |= {"lost": 3, "incomplete": True, "truncated": ("frames",)}
    marked = lines(filled(ProfileSample, rate_hz=99, **values))
    assert marked.endswith("libc.so.6`read; 3 lost [frames truncated, incomplete]\n")


@pytest.mark.parametrize(("kind", "values", "expected"), ESSENCES)
def test_a_kind_says_what_matters(kind: str, values: dict[str, Any], expected: str) -> None:
    assert essence(make(kind, **values)) == expected


def test_a_drop_has_no_task() -> None:
    """Its line begins with why."""
    one = make("net.drop", reason="NO_SOCKET", interface="eth0", weight=1, **DROP)
    assert lines(one).rstrip("\n")[13:] == (
        "net.drop     NO_SOCKET tcp 192.0.2.1:1234 -> 192.0.2.2:80 40B at eth0"
    )
    many = make("net.drop", weight=5001, **DROP)
    assert lines(many).rstrip("\n")[13:] == (
        "net.drop     without a reason tcp 192.0.2.1:1234 -> 192.0.2.2:80 40B and 5,000 more"
    )


def test_every_kind_has_been_given_a_line() -> None:
    assert {kind for kind, _, _ in ESSENCES} | {"net.drop"} == events.KINDS.keys()


def test_columns_are_aligned_and_the_time_is_local() -> None:
    text = lines(
        make("process.fork", child_pid=1),
        make("net.accept", pid=4194304, uid=0, comm="x" * 15, time_ns=1_800_000_001_123_000_000),
    )
    assert text == (
        "08:00:00.123 process.fork      42  1000 bash            child 1\n"
        "08:00:01.123 net.accept   4194304     0 xxxxxxxxxxxxxxx *:* -- *:* = 0\n"
    )


# ------------------------------------------------------------------- hostile content

HOSTILE = [
    ("\x1b[2J\x1b[H", r"\x1b[2J\x1b[H"),
    ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    ("a\nb\r\tc", r"a\nb\r\tc"),
    ("\x9b31m", r"\x9b31m"),
    ("\x7f\x00\x08", r"\x7f\x00\x08"),
    ("\u202egpj.exe", r"\u202egpj.exe"),
    ("\u2028\u200b\ufeff", r"\u2028\u200b\ufeff"),
    ("\ud800", r"\ud800"),
    ("\U000e0041", r"\U000e0041"),
    ("größe 日本 ✓", "größe 日本 ✓"),
]


@pytest.mark.parametrize(("hostile", "escaped"), HOSTILE)
def test_what_a_terminal_would_obey_is_escaped(hostile: str, escaped: str) -> None:
    assert printable(hostile) == escaped


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("kind", sorted(events.KINDS))
@pytest.mark.parametrize("hostile", [hostile for hostile, _ in HOSTILE])
def test_no_text_of_any_event_reaches_the_terminal_unescaped(
    kind: str, hostile: str, color: bool
) -> None:
    struct_type: Any = events.KINDS[kind].struct
    texts = {
        name: hostile
        for name, hint in get_type_hints(struct_type).items()
        if hint is str and name in struct_type.__struct_fields__
    }
    line = lines(make(kind, **texts), color=color)
    assert line.endswith("\n")
    own = re.sub(r"\x1b\[\d\d?m", "", line[:-1])
    assert own.isprintable()


class Future(events.TaskEvent, tag="kernel.module"):
    """A kind that this version has no form for."""

    name: str
    signed: bool
    flags: list[int]
    more: dict[str, int]


def test_a_kind_without_a_form_of_its_own_shows_its_fields() -> None:
    own = {"name": "evil\x1b[2J", "signed": True, "flags": [1, 2], "more": {"a": 1, "b\n": 2}}
    assert lines(filled(Future, **own)) == (
        "08:00:00.123 kernel.module      42  1000 bash            "
        r"name=evil\x1b[2J signed=true flags=[1,2] more={a:1,b\n:2}" + "\n"
    )


class Packet(events.Event, tag="xdp.drop"):
    """A kind without a task."""

    interface: str


def test_an_event_without_a_task_has_no_columns_for_one() -> None:
    made = filled(Packet, interface="eth0", time_ns=COMMON["time_ns"])
    assert lines(made) == "08:00:00.123 xdp.drop     interface=eth0\n"


def test_a_long_value_of_an_unknown_kind_is_cut() -> None:
    assert f"name={'n' * 79}… signed=false" in lines(filled(Future, name="n" * 500))


# ------------------------------------------------------------ records of the stream itself


def test_a_loss_is_red_and_says_where() -> None:
    kinds = {"process.exec": 2, "file.open": 3000}
    place = {"ring": "bulk", "cpu": 1, "seq_from": 5, "seq_to": 9}
    loss = filled(
        StreamLoss, stage="kernel", count=3002, kinds=kinds, reason="no room in the ring", **place
    )
    assert lines(loss) == (
        "08:00:00.123 stream.loss  lost 3,002 events (kernel, bulk ring of cpu 1, seq 5 to 9, "
        "no room in the ring, 3,000 file.open, 2 process.exec)\n"
    )
    assert "\x1b[31mlost 3,002 events\x1b[0m" in lines(loss, color=True)


def test_a_loss_at_a_sink_names_the_sink() -> None:
    loss = filled(
        StreamLoss, stage="sink", count=1, kinds={}, cpu=None, sink="kafka://h/t", reason="full"
    )
    assert lines(loss).endswith("lost 1 events (sink, kafka://h/t, full)\n")


def test_what_is_shed_is_yellow_and_says_why() -> None:
    shed = filled(
        StreamShed,
        level=2,
        before=1,
        reason="kafka://h/t holds 71% of its budget",
        rates={"net.bind": 1, "file.open": 16},
        kinds={"file.open": 12345},
    )
    assert lines(shed) == (
        "08:00:00.123 stream.shed  pressure 1 -> 2: kafka://h/t holds 71% of its budget; "
        "file.open 1 in 16, 12,345 left out\n"
    )
    assert "\x1b[33mpressure 1 -> 2\x1b[0m" in lines(shed, color=True)


def test_when_nothing_is_shed_any_more() -> None:
    over = filled(
        StreamShed, level=0, before=1, reason="it is over", rates={"file.open": 1}, kinds={}
    )
    over.kinds["file.open"] = 7
    assert lines(over).endswith("pressure 1 -> 0: it is over; file.open all, 7 left out\n")


def test_a_manifest_says_what_is_not_observed() -> None:
    kinds = {
        "process.exec": KindReport("full", "", ()),
        "net.close": KindReport("partial", "no bytes", ("odd ones",)),
        "file.open": KindReport("missing", "no tracepoint", ()),
    }
    manifest = filled(StreamManifest, coverage=kinds, kernel="6.1.0", machine="x86_64", cpu_count=2)
    assert lines(manifest) == (
        "08:00:00.123 stream.manifest observing 1 of 3 kinds fully on 6.1.0 x86_64, 2 CPUs; "
        "net.close partial: no bytes; file.open missing: no tracepoint\n"
    )


def test_a_heartbeat_is_the_account_in_short() -> None:
    heartbeat = filled(
        StreamHeartbeat,
        uptime_seconds=20.0,
        counts={"a": KindCounts(10_000, 1, 0, 0, 2), "b": KindCounts(5, 1, 0, 3, 0)},
        sink_counts={
            "stdout:": SinkCounts(9, 8, 7, 0, 0, "up"),
            "file:x": SinkCounts(9, 9, 0, 0, 0, "up"),
        },
    )
    assert lines(heartbeat) == (
        "08:00:00.123 stream.heartbeat up 20.0s, 10,005 events, 2 filtered, 3 lost; "
        "stdout: 8 delivered, 7 dropped; file:x 9 delivered\n"
    )
    assert "\x1b[31m, 3 lost\x1b[0m" in lines(heartbeat, color=True)


# ------------------------------------------------------------------- colour and width


def test_colour_only_when_asked() -> None:
    event = make("process.exec", cmdline="ls", cwd="/")
    plain, colored = lines(event), lines(event, color=True)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[\d\d?m", "", colored) == plain
    assert colored.count("\x1b[0m") * 2 == colored.count("\x1b[")


@pytest.mark.parametrize(
    ("cmdline", "width", "end"),
    [
        ("abcdef", 62, "abcdef"),
        ("abcdefg", 62, "abcde…"),
        ("日本語", 62, "日本語"),
        ("日本語x", 62, "日本…"),
        ("日本語x", 61, "日本…"),
        ("e\u0301" * 6, 62, "e\u0301" * 6),
        ("abcdefg", 0, "abcdefg  (in /)"),
    ],
)
def test_a_line_is_cut_at_the_width_of_the_terminal(cmdline: str, width: int, end: str) -> None:
    event = make("process.exec", cmdline=cmdline, cwd="/")
    head = "08:00:00.123 process.exec      42  1000 bash            "
    # The working directory follows; where the width is just that of the arguments, it is cut.
    line = lines(event, width=width).rstrip("\n")
    if width and not end.endswith("…"):
        line = lines(make("process.exec", cmdline=cmdline, cwd="/"), width=width + 9).rstrip("\n")
        end += "  (in /)"
    assert line == head + end


@pytest.mark.parametrize(
    ("choice", "terminal", "environment", "expected"),
    [
        ("auto", True, {}, True),
        ("auto", False, {}, False),
        ("auto", True, {"NO_COLOR": "1"}, False),
        ("auto", True, {"NO_COLOR": ""}, True),
        ("auto", True, {"TERM": "dumb"}, False),
        ("always", False, {"NO_COLOR": "1"}, True),
        ("never", True, {}, False),
    ],
)
def test_who_wants_colour(
    choice: str, terminal: bool, environment: dict[str, str], expected: bool
) -> None:
    assert render.wants_color(choice, terminal, environment) is expected


# -------------------------------------------------------------------- numbers in words


@pytest.mark.parametrize(
    ("nanoseconds", "expected"),
    [
        (0, "0ns"),
        (999, "999ns"),
        (1_000, "1.00µs"),
        (12_345, "12.3µs"),
        (123_456, "123µs"),
        (999_499, "999µs"),
        (999_500, "1.00ms"),
        (9_994_999, "9.99ms"),
        (9_995_001, "10.0ms"),
        (1_230_000_000, "1.23s"),
        (59_949_000_000, "59.9s"),
        (59_950_000_000, "1m00s"),
        (125_000_000_000, "2m05s"),
        (3599 * 10**9, "59m59s"),
        (3600 * 10**9, "1h00m"),
        (11_279 * 10**9, "3h07m"),
        (86_400 * 10**9, "1d00h"),
        (400 * 86_400 * 10**9, "400d00h"),
    ],
)
def test_durations(nanoseconds: int, expected: str) -> None:
    assert render.duration(nanoseconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "0.98KiB"),
        (1536, "1.50KiB"),
        (1 << 20, "1.00MiB"),
        (1023 << 10, "1.00MiB"),
        (12 << 20, "12.0MiB"),
        (5 << 30, "5.00GiB"),
        (3 << 40, "3.00TiB"),
        (5000 << 40, "5000TiB"),
    ],
)
def test_sizes(count: int, expected: str) -> None:
    assert render.size(count) == expected


@pytest.mark.parametrize(
    ("per_second", "expected"),
    [
        (0.0, "0"),
        (949.6, "950"),
        (999.5, "1.00k"),
        (12_345.0, "12.3k"),
        (999_600.0, "1.00M"),
        (1_250_000.0, "1.25M"),
    ],
)
def test_rates(per_second: float, expected: str) -> None:
    assert render.rate(per_second) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (os.O_RDONLY, "O_RDONLY"),
        (os.O_RDWR | os.O_CREAT | os.O_TRUNC, "O_RDWR|O_CREAT|O_TRUNC"),
        (os.O_WRONLY | os.O_APPEND | os.O_SYNC, "O_WRONLY|O_SYNC|O_APPEND"),
        (os.O_DSYNC, "O_RDONLY|O_DSYNC"),
        (os.O_TMPFILE | os.O_RDWR, "O_RDWR|O_TMPFILE"),
        (os.O_DIRECTORY | os.O_NOFOLLOW, "O_RDONLY|O_DIRECTORY|O_NOFOLLOW"),
        (os.O_ACCMODE, "O_ACCMODE"),
        (1 << 30, "O_RDONLY|0x40000000"),
    ],
)
def test_open_flags(flags: int, expected: str) -> None:
    assert render.open_flags(flags) == expected


def test_names_of_errors_and_signals() -> None:
    assert [render.errno_name(n) for n in (111, 4095)] == ["ECONNREFUSED", "errno 4095"]
    signals = {9: "SIGKILL", int(signal.SIGRTMIN) + 3: "SIGRTMIN+3", 99: "signal 99"}
    assert {number: render.signal_name(number) for number in signals} == signals


# ------------------------------------------------------------------------- status line


def test_the_status_text() -> None:
    rates = Rates(events_per_second=12_345, delivered=34_567, queue=0.124, lost=0)
    assert status_text(rates) == "12.3k events/s  delivered 34,567  queue 12%  lost 0"
    down = rates._replace(lost=1_000, note="kafka down\x1b[2J")
    assert status_text(down).endswith(r"lost 1,000  kafka down\x1b[2J")


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """A real pseudo-terminal of 20 columns, and what was written to it."""

    def __init__(self) -> None:
        self.master, self.fd = pty.openpty()
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 5, 20, 0, 0))
        attributes = termios.tcgetattr(self.fd)
        attributes[1] &= ~termios.OPOST
        termios.tcsetattr(self.fd, termios.TCSANOW, attributes)

    def read(self, expected: bytes) -> bytes:
        """As much as `expected` has, and what came with it; the kernel passes it on in pieces."""
        data = b""
        while len(data) < len(expected):
            ready, _, _ = select.select([self.master], [], [], 10)
            if not ready:
                break
            data += os.read(self.master, 4096)
        return data


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    os.close(made.fd)
    os.close(made.master)


def status_line(terminal: Terminal, **options: Any) -> StatusLine:
    return StatusLine(Console(terminal.fd), terminal.fd, **options)


def test_the_status_line_is_drawn_at_most_four_times_a_second(terminal: Terminal) -> None:
    clock = Clock()
    status = status_line(terminal, clock=clock)
    drawn = []
    for number in range(9):
        drawn.append(status.draw(str(number)))
        clock.now += 0.125
    assert drawn == [True, False] * 4 + [True]
    expected = b"".join(b"\r\x1b[K%d" % number for number in (0, 2, 4, 6, 8))
    assert terminal.read(expected) == expected


def test_the_status_line_never_wraps(terminal: Terminal) -> None:
    status_line(terminal).draw("0123456789" * 5)
    expected = "\r\x1b[K012345678901234567…".encode()
    assert terminal.read(expected) == expected


def test_event_lines_take_the_place_of_the_status_line(terminal: Terminal) -> None:
    status = status_line(terminal)
    renderer = Renderer(color=False, width=0, status=status)
    batch = Batch([make("process.fork", child_pid=1)])
    line = Renderer(color=False, width=0)(batch)
    assert renderer(batch) == line
    status.draw("busy")
    shown = [status.shown]
    assert renderer(batch) == b"\r\x1b[K" + line + b"busy"
    assert renderer(Batch([])) == b""
    status.close()
    shown.append(status.shown)
    assert shown == [True, False]
    assert renderer(batch) == line
    expected = b"\r\x1b[Kbusy\r\x1b[K"
    assert terminal.read(expected) == expected


def test_a_closed_status_line_stays_away(terminal: Terminal) -> None:
    clock = Clock()
    status = status_line(terminal, clock=clock)
    status.draw("busy")
    status.close()
    clock.now += 1
    assert not status.draw("again")
    expected = b"\r\x1b[Kbusy\r\x1b[K"
    assert terminal.read(expected) == expected


def test_no_status_line_where_there_is_no_terminal() -> None:
    reader, writer = os.pipe()
    status = StatusLine(Console(writer), writer)
    assert not status.draw("s")
    status.close()
    os.close(writer)
    assert os.read(reader, 10) == b""
    os.close(reader)


def test_a_terminal_that_has_gone_ends_the_status_line() -> None:
    terminal = Terminal()
    status = status_line(terminal)
    os.close(terminal.master)
    assert not status.draw("s")
    assert not status.shown
    os.close(terminal.fd)


def test_the_same_terminal_is_recognised(terminal: Terminal) -> None:
    other = Terminal()
    twin = os.dup(terminal.fd)
    reader, writer = os.pipe()
    assert render.same_terminal(terminal.fd, twin)
    assert not render.same_terminal(terminal.fd, other.fd)
    assert not render.same_terminal(terminal.fd, writer)
    for fd in (other.master, other.fd, twin, reader, writer):
        os.close(fd)
