"""Events as lines for people: aligned columns on a terminal, and a status line below them.

Much of an event was chosen by whoever is being watched: arguments, paths, names. So every text
goes through `printable` on its way out, in one place, and nothing that a terminal would obey
(ESC, line ends, C1, bidirectional overrides) reaches it.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from streamer.events.batch import Batch, Event, kind_of
from streamer.events.kinds import TaskEvent
from streamer.events.stream import (
    StreamHeartbeat,
    StreamLoss,
    StreamManifest,
    StreamRecord,
    StreamShed,
)
from streamer.events.summaries import ProfileSample, SyscallLatency, XdpCounters
from streamer.terminal.console import CLEAR_LINE, Console

ENVELOPE = frozenset(TaskEvent.__struct_fields__ + StreamRecord.__struct_fields__)
"""Fields that every event has: not part of what a kind says of its own."""

_RESET = "\x1b[0m"
_COLORS = {
    "": "",
    "dim": "\x1b[2m",
    "bold": "\x1b[1m",
    "red": "\x1b[31m",
    "green": "\x1b[32m",
    "yellow": "\x1b[33m",
    "blue": "\x1b[34m",
    "magenta": "\x1b[35m",
    "cyan": "\x1b[36m",
}
_KIND_STYLES = {
    "process": "green",
    "file": "blue",
    "net": "cyan",
    "xdp": "cyan",
    "syscall": "yellow",
    "profile": "yellow",
    "stream": "magenta",
}
_ARROWS = {"outbound": "->", "inbound": "<-"}
_PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
_UNUSUAL_ENDS = ("evicted", "gone")
_MAX_VALUE = 80
MOST_SAID = 2000
"""Most characters of a message: paths, keys and reasons of peers have any length."""

# Those that hold the bits of another one come first.
_OPEN_FLAGS = (
    ("O_TMPFILE", os.O_TMPFILE),
    ("O_SYNC", os.O_SYNC),
    ("O_CREAT", os.O_CREAT),
    ("O_EXCL", os.O_EXCL),
    ("O_TRUNC", os.O_TRUNC),
    ("O_APPEND", os.O_APPEND),
    ("O_NONBLOCK", os.O_NONBLOCK),
    ("O_DSYNC", os.O_DSYNC),
    ("O_DIRECTORY", os.O_DIRECTORY),
    ("O_NOFOLLOW", os.O_NOFOLLOW),
    ("O_PATH", os.O_PATH),
    ("O_CLOEXEC", os.O_CLOEXEC),
    ("O_NOCTTY", os.O_NOCTTY),
    ("O_NOATIME", os.O_NOATIME),
    ("O_DIRECT", os.O_DIRECT),
    ("O_ASYNC", os.O_ASYNC),
)
_ACCESS_MODES = {os.O_RDONLY: "O_RDONLY", os.O_WRONLY: "O_WRONLY", os.O_RDWR: "O_RDWR"}


class Segment(NamedTuple):
    """A piece of a line: its text, not escaped yet, and its style."""

    text: str
    style: str = ""


class Rates(NamedTuple):
    """What the status line shows. `queue` is the share of the byte budget in use, 0 to 1."""

    events_per_second: float
    delivered: int
    queue: float
    lost: int
    note: str = ""


class Renderer:
    """Makes lines of batches. `width` in columns cuts longer lines; 0 never cuts.

    Where `status` is drawn on the same terminal, the lines take its place and it follows them.
    """

    def __init__(self, color: bool, width: int, status: StatusLine | None = None) -> None:
        """`width` may be changed later, when the terminal's size does."""
        self.width = width
        self._color = color
        self._status = status
        self._second = -1
        self._clock = ""

    def __call__(self, batch: Batch) -> bytes:
        """The batch as UTF-8, a line for each event."""
        text = "".join(self._line(event) for event in batch.events)
        lines = text.encode("utf-8", "backslashreplace")
        return lines if self._status is None else self._status.around(lines)

    def _line(self, event: Event) -> str:
        segments = [Segment(self._time(getattr(event, "time_ns", 0)), "dim"), *columns(event)]
        cut = _cut(((printable(text), style) for text, style in segments), self.width)
        return "".join(self._paint(text, style) for text, style in cut).rstrip(" ") + "\n"

    def _time(self, time_ns: int) -> str:
        second, rest = divmod(time_ns, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._clock = time.strftime("%H:%M:%S", time.localtime(second))
        return f"{self._clock}.{rest // 1_000_000:03} "

    def _paint(self, text: str, style: str) -> str:
        code = _COLORS[style] if self._color else ""
        return f"{code}{text}{_RESET}" if code else text


def printable(text: str) -> str:
    r"""`text` with everything a terminal might obey, or not show, as `\n`, `\x1b` or `\u202e`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def shortened(text: str, most: int = MOST_SAID) -> str:
    """`text`, or its beginning and its end: a message ends with its reason."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def columns(event: Event) -> Iterator[Segment]:
    """An event's line without its time."""
    kind = kind_of(event)
    yield Segment(f"{kind:<12} ", _KIND_STYLES.get(kind.partition(".")[0], ""))
    if hasattr(event, "pid"):
        yield Segment(f"{event.pid:>7} ")
        yield Segment(f"{getattr(event, 'uid', ''):>5} ", "dim")
        yield Segment(_padded(getattr(event, "comm", ""), 16), "bold")
    yield from _ESSENCES.get(kind, generic)(event)
    marks = ", ".join(_marks(event))
    if marks:
        yield Segment(f" [{marks}]", "yellow")


def _marks(event: Event) -> Iterator[str]:
    """What there is to know about the event as a whole before it is believed."""
    cut: tuple[str, ...] = getattr(event, "truncated", ())
    if cut:
        yield f"{' and '.join(cut)} truncated"
    if getattr(event, "incomplete", False):
        yield "incomplete"
    if getattr(event, "invalid_utf8", False):
        yield "invalid UTF-8"
    if not getattr(event, "owner_known", True):
        yield "owner unknown"


def generic(event: Event) -> Iterator[Segment]:
    """The fields of the kind's own, as `key=value`: for every kind without a form of its own."""
    own = (name for name in event.__struct_fields__ if name not in ENVELOPE)
    text = " ".join(f"{name}={_value(getattr(event, name))}" for name in own)
    yield Segment(text)


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        inner = ",".join(f"{name}:{_value(part)}" for name, part in value.items())
        return _short(f"{{{inner}}}")
    if isinstance(value, list | tuple):
        return _short("[" + ",".join(map(_value, value)) + "]")
    if isinstance(value, bool):
        return str(value).lower()
    return _short(str(value))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"


def _exec(event: Any) -> Iterator[Segment]:
    yield Segment(event.cmdline or event.exe)
    # The command line of a script is that of its interpreter.
    script = f"script {event.filename}, " if event.interp else ""
    yield Segment(f"  ({script}in {event.cwd})", "dim")
    if event.exe_memfd:
        yield Segment(" from memory", "red")
    elif event.exe_deleted:
        yield Segment(" deleted", "red")


def _fork(event: Any) -> Iterator[Segment]:
    yield Segment(f"child {event.child_pid}")


def _exit(event: Any) -> Iterator[Segment]:
    if event.signal:
        core = ", core dumped" if event.core_dumped else ""
        yield Segment(f"{signal_name(event.signal)}{core}", "red")
    else:
        yield Segment(f"exit {event.exit_code}", "yellow" if event.exit_code else "")
    yield Segment(f" after {duration(event.duration_ns)}", "dim")


def _open(event: Any) -> Iterator[Segment]:
    yield Segment(event.path)
    mode = f" {stat.S_IMODE(event.mode):04o}" if event.mode else ""
    yield Segment(f"  {open_flags(event.flags)}{mode}", "dim")
    yield from _outcome(event.errno, f" = {event.fd}")
    yield from _latency(event.latency_ns)


def _connect(event: Any) -> Iterator[Segment]:
    yield from _endpoints(event)
    yield from _outcome(event.errno, "")
    yield from _latency(event.latency_ns)


def _accept(event: Any) -> Iterator[Segment]:
    yield from _endpoints(event)
    yield Segment(f" = {event.fd}", "dim")


def _close(event: Any) -> Iterator[Segment]:
    yield from _endpoints(event)
    yield from _outcome(event.errno, "")
    yield Segment(f" sent {size(event.bytes_sent)}, received {size(event.bytes_received)}")
    if event.duration_ns:
        yield Segment(f" after {duration(event.duration_ns)}", "dim")


def _flow(event: Any) -> Iterator[Segment]:
    client = endpoint(event.client_addr, event.client_port)
    server = endpoint(event.server_addr, event.server_port)
    yield Segment(f"{client} -> {server} {_PROTOCOLS.get(event.protocol, event.protocol)}")
    yield Segment(f" {event.interface}", "dim")
    yield Segment(
        f" sent {size(event.client_bytes)} in {event.client_packets}"
        f", received {size(event.server_bytes)} in {event.server_packets}"
    )
    yield Segment(f" {event.reason}", "yellow" if event.reason in _UNUSUAL_ENDS else "dim")
    if event.handshake_ns:
        yield Segment(f" handshake {duration(event.handshake_ns)}", "dim")


def _endpoints(event: Any) -> Iterator[Segment]:
    local = endpoint(event.local_addr, event.local_port)
    remote = endpoint(event.remote_addr, event.remote_port)
    yield Segment(f"{local} {_ARROWS.get(event.direction, '--')} {remote}")


def _outcome(number: int, success: str) -> Iterator[Segment]:
    yield Segment(f" {errno_name(number)}", "red") if number else Segment(success, "dim")


def _latency(nanoseconds: int) -> Iterator[Segment]:
    """Nothing where it was not measured."""
    if nanoseconds:
        yield Segment(f" {duration(nanoseconds)}", "dim")


def _xdp(event: XdpCounters) -> Iterator[Segment]:
    yield Segment(_padded(event.interface, 16), "bold")
    tags = "" if event.vlan == "none" else f"{event.vlan} VLAN, "
    ports = "" if event.ports == "none" else f", {event.ports} port"
    protocol = event.network if event.transport == "none" else f"{event.network} {event.transport}"
    yield Segment(f"{tags}{protocol}{ports}")
    if event.verdict != "whole":
        odd = event.verdict in ("truncated", "malformed", "extensions")
        yield Segment(f", {event.verdict.replace('_', ' ')}", "yellow" if odd else "")
    yield Segment(f": {event.packets:,} packets, {size(event.bytes)}")
    seconds = event.period_ns / 1e9
    yield Segment(f" in {duration(event.period_ns)}", "dim")
    yield Segment(f", {rate(event.packets / seconds)}/s" if seconds else "", "dim")


def _slow(event: Any) -> Iterator[Segment]:
    yield Segment(event.syscall)
    yield from _outcome(event.errno, f" = {event.ret}")
    yield Segment(f" after {duration(event.duration_ns)}", "yellow")


def _syscall(event: SyscallLatency) -> Iterator[Segment]:
    yield Segment(_padded(event.syscall, 16), "bold")
    if event.cgroup_id:
        yield Segment(f"cgroup {event.cgroup_id}: ", "dim")
    yield Segment(f"{event.count:,} calls")
    if event.errors:
        yield Segment(f", {event.errors:,} failed", "red")
    if event.count:
        shares = (("p50", event.p50_ns), ("p90", event.p90_ns), ("p99", event.p99_ns))
        yield Segment("".join(f", {name} {duration(ns)}" for name, ns in shares))
        yield Segment(f", max {duration(event.max_ns)}")
    if event.unreturned:
        yield Segment(f", {event.unreturned:,} returns missed", "yellow")
    yield Segment(f" in {duration(event.period_ns)}", "dim")


def _profile(event: ProfileSample) -> Iterator[Segment]:
    """The innermost function first, because a terminal cuts the end."""
    yield Segment(f"{event.count:>5} of {event.taken:,} ", "")
    first, *callers = reversed(event.frames)
    yield Segment(first, "bold")
    yield Segment("".join(f" < {frame}" for frame in callers), "dim")
    if event.lost:
        yield Segment(f"; {event.lost:,} lost", "red")


def _manifest(event: StreamManifest) -> Iterator[Segment]:
    full = [kind for kind, report in event.coverage.items() if report.status == "full"]
    yield Segment(f"observing {len(full)} of {len(event.coverage)} kinds fully")
    yield Segment(f" on {event.kernel} {event.machine}, {event.cpu_count} CPUs", "dim")
    for kind, report in event.coverage.items():
        if report.status != "full":
            yield Segment(f"; {kind} {report.status}: {report.reason}", "yellow")


def _heartbeat(event: StreamHeartbeat) -> Iterator[Segment]:
    produced, filtered, lost = (
        sum(getattr(counts, name) for counts in event.counts.values())
        for name in ("produced", "filtered", "lost")
    )
    yield Segment(f"up {duration(int(event.uptime_seconds * 1e9))}, {produced:,} events")
    yield Segment(f", {filtered:,} filtered", "dim")
    yield Segment(f", {lost:,} lost", "red" if lost else "dim")
    for name, sink in event.sink_counts.items():
        yield Segment(f"; {name} {sink.delivered:,} delivered", "dim")
        if sink.dropped:
            yield Segment(f", {sink.dropped:,} dropped", "red")


def _loss(event: StreamLoss) -> Iterator[Segment]:
    yield Segment(f"lost {event.count:,} events", "red")
    yield Segment(f" ({', '.join(_loss_details(event))})", "red")


def _shed(event: StreamShed) -> Iterator[Segment]:
    style = "yellow" if event.level else "green"
    yield Segment(f"pressure {event.before} -> {event.level}", style)
    yield Segment(f": {event.reason}", style)
    for kind, one_in in sorted(event.rates.items()):
        left_out = event.kinds.get(kind, 0)
        if one_in > 1 or left_out:
            yield Segment(f"; {kind} {f'1 in {one_in:,}' if one_in > 1 else 'all'}", "dim")
            yield Segment(f", {left_out:,} left out" if left_out else "", "dim")


def _loss_details(event: StreamLoss) -> Iterator[str]:
    yield event.stage
    if event.cpu is not None:
        yield f"{event.ring} ring of cpu {event.cpu}, seq {event.seq_from} to {event.seq_to}"
    if event.sink is not None:
        yield event.sink
    if event.reason:
        yield event.reason
    for kind, count in sorted(event.kinds.items()):
        yield f"{count:,} {kind}"


def _listen(event: Any) -> Iterator[Segment]:
    yield Segment(f"on {endpoint(event.local_addr, event.local_port)}")
    yield from _outcome(event.errno, f" backlog {event.backlog}")


def _bind(event: Any) -> Iterator[Segment]:
    yield Segment(f"{event.transport} ")
    yield Segment(endpoint(event.local_addr, event.local_port or event.asked_port))
    yield from _outcome(event.errno, "" if event.asked_port else " chosen by the kernel")


def _retransmit(event: Any) -> Iterator[Segment]:
    yield from _endpoints(event)
    what = event.content if event.content != "data" else size(event.bytes)
    yield Segment(f" {what}", "yellow")
    if event.segments > 1:
        yield Segment(f" in {event.segments} segments", "yellow")
    yield Segment(f" {event.state}, {event.congestion}", "dim")


def _drop(event: Any) -> Iterator[Segment]:
    yield Segment(f"{event.reason or 'without a reason'} ", "red")
    source, destination = (
        endpoint(event.source_addr, event.source_port),
        endpoint(event.destination_addr, event.destination_port),
    )
    yield Segment(f"{event.transport} {source} -> {destination}")
    where = f" at {event.interface}" if event.interface else ""
    yield Segment(f" {size(event.length)}{where}", "dim")
    if event.weight > 1:
        yield Segment(f" and {event.weight - 1:,} more", "yellow")


def _udp(event: Any) -> Iterator[Segment]:
    yield from _endpoints(event)
    yield Segment(f" sent {event.datagrams_sent:,} ({size(event.bytes_sent)})")
    yield Segment(f" received {event.datagrams_received:,} ({size(event.bytes_received)})")
    if event.send_errors:
        yield Segment(f" {event.send_errors:,} failed", "red")
    if event.drops:
        yield Segment(f" {event.drops:,} dropped", "red")
    state = "closed after" if event.closed else "in use for"
    yield Segment(f" {state} {duration(event.duration_ns)}", "dim")


_FEW_ANSWERS = 4


def _dns(event: Any) -> Iterator[Segment]:
    yield Segment(f"{event.query} {event.query_type}")
    if event.state != "answered":
        yield Segment(f" {event.state}", "red" if event.state == "unanswered" else "yellow")
    if event.response_code:
        style = "" if event.response_code == "NOERROR" else "red"
        yield Segment(f" {event.response_code}", style)
    shown = [f"{answer.type} {answer.data}" for answer in event.answers[:_FEW_ANSWERS]]
    more = len(event.answers) - len(shown) + event.answers_left_out
    if shown:
        yield Segment(f" {', '.join(shown)}")
    if more:
        yield Segment(f" and {more:,} more", "dim")
    if event.malformed:
        yield Segment(f" malformed: {event.malformed}", "yellow")
    if event.response_truncated:
        yield Segment(" truncated", "yellow")
    what = f" {event.transport} {endpoint(event.remote_addr, event.remote_port)}"
    waited = f" {duration(event.latency_ns)}" if event.latency_ns else ""
    yield Segment(f"{what}{waited}", "dim")


_ESSENCES: Mapping[str, Callable[[Any], Iterator[Segment]]] = {
    "process.exec": _exec,
    "process.fork": _fork,
    "process.exit": _exit,
    "file.open": _open,
    "net.connect": _connect,
    "net.accept": _accept,
    "net.close": _close,
    "xdp.counters": _xdp,
    "net.listen": _listen,
    "net.bind": _bind,
    "net.retransmit": _retransmit,
    "net.drop": _drop,
    "net.udp": _udp,
    "net.dns": _dns,
    "syscall.slow": _slow,
    "syscall.latency": _syscall,
    "profile.sample": _profile,
    "net.flow": _flow,
    "stream.manifest": _manifest,
    "stream.heartbeat": _heartbeat,
    "stream.loss": _loss,
    "stream.shed": _shed,
}


def endpoint(address: str, port: int) -> str:
    """`10.0.0.1:443`, `[::1]:443`; `*` for what is not known."""
    host = f"[{address}]" if ":" in address else address or "*"
    return f"{host}:{port or '*'}"


def open_flags(flags: int) -> str:
    """Flags of open(2) by name, such as `O_WRONLY|O_CREAT`; unknown bits in hexadecimal."""
    access = flags & os.O_ACCMODE
    names = [_ACCESS_MODES.get(access, "O_ACCMODE")]
    rest = flags & ~os.O_ACCMODE
    for name, bits in _OPEN_FLAGS:
        if rest & bits == bits:
            names.append(name)
            rest &= ~bits
    return "|".join([*names, hex(rest)] if rest else names)


def errno_name(number: int) -> str:
    """`ECONNREFUSED` for 111; `errno 4095` for a number without a name."""
    return errno.errorcode.get(number, f"errno {number}")


def signal_name(number: int) -> str:
    """`SIGKILL` for 9, `SIGRTMIN+3` for a real-time signal, else `signal 99`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        realtime = signal.SIGRTMIN < number < signal.SIGRTMAX
        return f"SIGRTMIN+{number - signal.SIGRTMIN}" if realtime else f"signal {number}"


def duration(nanoseconds: int) -> str:
    """A duration in three digits: `850ns`, `12.3µs`, `4.56ms`, `1.23s`; then `2m05s`, `3h07m`."""
    if nanoseconds < 1000:
        return f"{nanoseconds}ns"
    for unit, factor, limit in (("µs", 1e3, 999.5), ("ms", 1e6, 999.5), ("s", 1e9, 59.95)):
        if nanoseconds / factor < limit:
            return f"{_three_digits(nanoseconds / factor)}{unit}"
    return _long_duration(round(nanoseconds / 1e9))


def _long_duration(seconds: int) -> str:
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if not hours:
        return f"{minutes}m{seconds % 60:02}s"
    return f"{days}d{hours % 24:02}h" if days else f"{hours}h{minutes % 60:02}m"


def size(count: int) -> str:
    """Bytes in three digits and binary units: `999B`, `1.50KiB`, `12.3MiB`."""
    return f"{count}B" if count < 1000 else _scaled(count, 1024, ("KiB", "MiB", "GiB", "TiB"))


def rate(per_second: float) -> str:
    """Events per second in three digits: `0`, `950`, `12.3k`, `1.25M`."""
    return f"{per_second:.0f}" if per_second < 999.5 else _scaled(per_second, 1000, ("k", "M"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    """`value` in the first unit that takes three digits to say it, or else in the last."""
    for unit in units[:-1]:
        value /= base
        if value < 999.5:
            return f"{_three_digits(value)}{unit}"
    return f"{_three_digits(value / base)}{units[-1]}"


def _three_digits(value: float) -> str:
    for digits, limit in ((2, 9.995), (1, 99.95)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def _width(text: str) -> int:
    """Columns that printable text takes."""
    return len(text) if text.isascii() else sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _padded(text: str, width: int) -> str:
    safe = printable(text)
    return safe + " " * max(1, width - _width(safe))


def _cut(segments: Iterable[tuple[str, str]], width: int) -> Iterator[tuple[str, str]]:
    """The segments of a line as far as `width` columns go; the last column is `…` if they end."""
    room = width
    held: list[tuple[str, str]] = []
    for text, style in segments:
        held.append((text, style))
        room -= _width(text)
    if width == 0 or room >= 0:
        return iter(held)
    return _shortened(held, width - 1)


def _shortened(segments: list[tuple[str, str]], room: int) -> Iterator[tuple[str, str]]:
    for text, style in segments:
        kept = _fitting(text, room)
        room -= _width(kept)
        if kept != text:
            yield kept + "…", style
            return
        yield text, style


def _fitting(text: str, room: int) -> str:
    if text.isascii():
        return text[:room]
    for end, char in enumerate(text):
        room -= _char_width(char)
        if room < 0:
            return text[:end]
    return text


def status_text(rates: Rates) -> str:
    """The status line, such as `1.2k events/s  delivered 34,567  queue 12%  lost 0`."""
    parts = [
        f"{rate(rates.events_per_second)} events/s",
        f"delivered {rates.delivered:,}",
        f"queue {rates.queue:.0%}",
        f"lost {rates.lost:,}",
    ]
    return printable("  ".join([*parts, rates.note] if rates.note else parts))


def wants_color(choice: str, terminal: bool, environment: Mapping[str, str]) -> bool:
    """Whether to colour: `always`, `never`, or `auto`, which asks the terminal and `NO_COLOR`."""
    if choice != "auto":
        return choice == "always"
    return terminal and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def same_terminal(first: int, second: int) -> bool:
    """Whether two descriptors are one terminal."""
    both = os.isatty(first) and os.isatty(second)
    return both and os.fstat(first).st_rdev == os.fstat(second).st_rdev


class StatusLine:
    """A line that rewrites itself on a terminal, at most every `interval` seconds.

    Draws nothing on a descriptor that is no terminal. Waiting for one that takes no output
    (Ctrl-S) is left to the console.
    """

    def __init__(
        self,
        console: Console,
        fd: int = 2,
        interval: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`console` writes to `fd`; `clock` gives seconds."""
        self._console = console
        self._fd = fd
        self._interval = interval
        self._clock = clock
        self._drawn_at = float("-inf")
        self._shown = b""
        self.enabled = os.isatty(fd)

    @property
    def shown(self) -> bool:
        """Whether the line is on the terminal now, or will be when it takes output again."""
        return bool(self._shown)

    def draw(self, text: str) -> bool:
        """Show `text`, cut to the terminal's width, unless it is too early. True when drawn."""
        now = self._clock()
        if not self.enabled or now - self._drawn_at < self._interval:
            return False
        self._drawn_at = now
        try:
            self._shown = self._fitted(text)
        except OSError:  # the terminal is gone, and with it whoever would read the line
            self.enabled = False
            return False
        self._console.draw(self._shown)
        return True

    def close(self) -> None:
        """Take the line away for good."""
        self._shown = b""
        self._console.draw(b"")
        self.enabled = False

    def around(self, lines: bytes) -> bytes:
        """`lines` for the same terminal: the status line gives way to them and follows them."""
        return CLEAR_LINE + lines + self._shown if self._shown and lines else lines

    def _fitted(self, text: str) -> bytes:
        width = os.get_terminal_size(self._fd).columns
        # One column stays free: a cursor beyond the last one would wrap. A terminal that does
        # not know its width says 0.
        cut = _cut([(printable(text), "")], max(width - 1, 0))
        return "".join(part for part, _ in cut).encode("utf-8", "backslashreplace")
