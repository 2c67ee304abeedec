"""The process around a service: event loop, signals, log, terminal, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple, TypedDict

import uvloop

from streamer.agent.allocator import keep_freed_memory
from streamer.agent.run_file import RunFile
from streamer.agent.service import Outcome, Service
from streamer.config.settings import Limits, Settings, StdoutSink
from streamer.errors import ConfigError, HelperGone, KernelError
from streamer.events.batch import Batch
from streamer.events.envelope import host_name
from streamer.events.stream import PreviousRun
from streamer.kernel import capabilities, state
from streamer.privilege.split import Split
from streamer.sinks.base import Sink
from streamer.sinks.factory import Render, make_sink
from streamer.terminal.lines import Renderer, StatusLine, printable, same_terminal, wants_color

INTERRUPTED = 130
UNDELIVERED = 5
_log = logging.getLogger("streamer")


def run_service(settings: Settings, kinds: frozenset[str], limits: Limits) -> int:
    """Stream `kinds` as `settings` say until a signal, a limit or a closed pipe. The exit code.

    Raises:
        StreamerError: what kept it from starting, or ended it.
    """
    keep_freed_memory()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to open anew
    line = StatusLine() if limits.status and os.isatty(2) else None
    _log.setLevel(settings.log_level.upper())
    _log.addHandler(handler := _LogHandler(line))
    try:
        outcome = _split_and_run(settings, kinds, limits, line)
    finally:
        _log.removeHandler(handler)
    undelivered = f"not delivered: {outcome.undelivered}" if outcome.undelivered else ""
    for said in filter(None, (undelivered, outcome.account)):
        # A reader that closed the pipe may have closed stderr with it.
        with suppress(OSError):
            print(f"streamer: {printable(said)}", file=sys.stderr, flush=True)
    return UNDELIVERED if undelivered else 0


def _split_and_run(
    settings: Settings, kinds: frozenset[str], limits: Limits, line: StatusLine | None
) -> Outcome:
    capabilities.require()
    with contextlib.ExitStack() as stack:
        split = Split(settings)
        stack.callback(split.close)
        kernel = state.load(settings, kinds, split.loader)
        stack.callback(kernel.close)
        terminal = stack.enter_context(_controlling_terminal())
        notes = RunFile.open(settings.state_file) if settings.state_file else None
        if notes is not None:
            stack.callback(notes.close)
        split.drop()
        given = Surroundings(line, split, kernel, terminal, notes)
        return uvloop.run(_run(settings, kinds, limits, given))


class _Noted(TypedDict, total=False):
    previous: PreviousRun | None
    leave_note: Callable[[PreviousRun], None]


class Surroundings(NamedTuple):
    """What a run has from before its privileges were given up.

    `terminal` is the controlling terminal, if there is one, and `notes` where the runs on this
    host leave a note for the next one.
    """

    line: StatusLine | None
    split: Split
    kernel: state.KernelState
    terminal: int | None
    notes: RunFile | None


async def _run(
    settings: Settings, kinds: frozenset[str], limits: Limits, given: Surroundings
) -> Outcome:
    host = host_name(settings.host)
    render = _render(settings, given.line)
    sinks = [make_sink(one, host, render, given.split.opener) for one in settings.sinks]
    names = [sink.name for sink in sinks]
    if len(set(names)) < len(names):
        raise ConfigError(f"sinks: found the same one twice among {', '.join(names)}")
    try:
        service = _service(settings, kinds, limits, sinks, given)
        _handle_signals(service, given)
        _watch_helper(service, given.split)
        return await service.run()
    finally:
        given.split.client.unwatch(asyncio.get_running_loop())


def _service(
    settings: Settings,
    kinds: frozenset[str],
    limits: Limits,
    sinks: list[Sink],
    given: Surroundings,
) -> Service:
    noted: _Noted = {}
    if given.notes is not None:
        noted = {"previous": given.notes.read(), "leave_note": given.notes.write}
    try:
        return Service(
            settings,
            kinds,
            limits,
            sinks,
            given.kernel,
            status_line=given.line,
            **noted,
        )
    except OSError as error:
        raise KernelError(f"the rings cannot be mapped: {error.strerror}") from error


@contextlib.contextmanager
def _controlling_terminal() -> Iterator[int | None]:
    """The terminal that a SIGHUP can come from. Opened by name, which the worker cannot do."""
    try:
        fd = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # there is none
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


class _LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr, taking the status line away first."""

    def __init__(self, line: StatusLine | None) -> None:
        super().__init__(sys.stderr)
        self._line = line
        self.setFormatter(_LogFormatter("streamer: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if self._line is not None:
            self._line.clear()
        super().emit(record)


class _LogFormatter(logging.Formatter):
    """Escapes what a terminal would act upon: reasons can quote a peer."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _render(settings: Settings, line: StatusLine | None) -> Render | None:
    """What a terminal on stdout gets; None where stdout is none, or not used."""
    chosen = next((one for one in settings.sinks if isinstance(one, StdoutSink)), None)
    if chosen is None or not os.isatty(1):
        return None
    if chosen.encoding == "msgpack":
        raise ConfigError("stdout is a terminal, and MessagePack is not for people to read")
    if chosen.encoding == "json":
        return ascii_lines
    color = wants_color(chosen.color, True, os.environ)
    renderer = Renderer(color, _columns(), line if same_terminal(1, 2) else None)

    def resize() -> None:
        renderer.width = _columns()

    asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, resize)
    return renderer


def ascii_lines(batch: Batch) -> bytes:
    r"""NDJSON with everything beyond printable ASCII as `\uXXXX`: a terminal acts upon some."""
    text = batch.lines("json").decode()
    return re.sub(r"[^\n -~]", _escape, text).encode()


def _escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _columns() -> int:
    return os.get_terminal_size(1).columns


def _watch_helper(service: Service, split: Split) -> None:
    """Without the helper everything is detached: deliver what there is, and say so."""

    def gone() -> None:
        service.fail(HelperGone(f"{split.client.obituary()}: nothing is observed any more"))

    split.client.watch(asyncio.get_running_loop(), gone)


def _handle_signals(service: Service, given: Surroundings) -> None:
    loop = asyncio.get_running_loop()
    asked = False

    def stop() -> None:
        nonlocal asked
        if asked:  # twice: at once, without draining
            given.split.client.farewell()
            os._exit(INTERRUPTED)
        asked = True
        service.stop()

    def hang_up() -> None:
        # A terminal that is closed sends two, and means what one says.
        if given.terminal is not None and _hung_up(given.terminal):
            service.stop()
        else:
            service.reopen()

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell's background sets it
            loop.add_signal_handler(number, stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        loop.add_signal_handler(signal.SIGHUP, hang_up)
    loop.add_signal_handler(signal.SIGUSR1, service.reopen)


def _hung_up(terminal: int) -> bool:
    poll = select.poll()
    poll.register(terminal, 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))
