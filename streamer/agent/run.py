"""The process around a service: event loop, signals, log, terminal, exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
from contextlib import suppress

import msgspec
import uvloop

from streamer.agent.allocator import keep_freed_memory
from streamer.agent.service import Service
from streamer.config.settings import Limits, Settings, StdoutSink
from streamer.errors import ConfigError, HelperGone, KernelError
from streamer.events.batch import Batch
from streamer.kernel import capabilities, state
from streamer.privilege.split import Split
from streamer.sinks.base import Sink
from streamer.sinks.factory import Render, make_sink
from streamer.terminal.lines import Renderer, StatusLine, printable, same_terminal, wants_color

INTERRUPTED = 130
_log = logging.getLogger("streamer")


def run_service(settings: Settings, kinds: frozenset[str], limits: Limits) -> int:
    """Stream `kinds` as `settings` say until a signal, a limit or a closed pipe. The exit code.

    Raises:
        StreamerError: what kept it from starting, or ended it.
    """
    if not settings.sinks:
        settings = msgspec.structs.replace(settings, sinks=(StdoutSink(),))
    keep_freed_memory()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to open anew
    line = StatusLine() if limits.status and os.isatty(2) else None
    _log.setLevel(settings.log_level.upper())
    _log.addHandler(handler := _LogHandler(line))
    try:
        account = _split_and_run(settings, kinds, limits, line)
    finally:
        _log.removeHandler(handler)
    if account:
        # A reader that closed the pipe may have closed stderr with it.
        with suppress(OSError):
            print(f"streamer: {account}", file=sys.stderr, flush=True)
    return 0


def _split_and_run(
    settings: Settings, kinds: frozenset[str], limits: Limits, line: StatusLine | None
) -> str:
    capabilities.require()
    split = Split(settings)
    try:
        kernel = state.load(settings, kinds, split.loader)
        try:
            split.drop()
            return uvloop.run(_run(settings, kinds, limits, line, split, kernel))
        finally:
            kernel.close()
    finally:
        split.close()


async def _run(
    settings: Settings,
    kinds: frozenset[str],
    limits: Limits,
    line: StatusLine | None,
    split: Split,
    kernel: state.KernelState,
) -> str:
    host = settings.host or os.uname().nodename
    render = _render(settings, line)
    sinks = [make_sink(one, host, render, split.opener) for one in settings.sinks]
    names = [sink.name for sink in sinks]
    if len(set(names)) < len(names):
        raise ConfigError(f"sinks: found the same one twice among {', '.join(names)}")
    try:
        service = _service(settings, kinds, limits, sinks, kernel, line, split)
        _handle_signals(service, split)
        _watch_helper(service, split)
        return await service.run()
    finally:
        split.client.unwatch(asyncio.get_running_loop())


def _service(
    settings: Settings,
    kinds: frozenset[str],
    limits: Limits,
    sinks: list[Sink],
    kernel: state.KernelState,
    line: StatusLine | None,
    split: Split,
) -> Service:
    try:
        return Service(settings, kinds, limits, sinks, kernel, status_line=line)
    except OSError as error:
        raise KernelError(f"the rings cannot be mapped: {error.strerror}") from error


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


def _handle_signals(service: Service, split: Split) -> None:
    loop = asyncio.get_running_loop()
    asked = False

    def on_signal() -> None:
        nonlocal asked
        if asked:  # twice: at once, without draining
            split.client.farewell()
            os._exit(INTERRUPTED)
        asked = True
        service.stop()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGUSR1, service.reopen)
