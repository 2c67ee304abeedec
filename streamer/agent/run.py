"""The process around a service: event loop, signals, log, terminal, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import select
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple, TypedDict, TypeVar

import msgspec
import uvloop

from streamer.agent import signals
from streamer.agent.allocator import keep_freed_memory
from streamer.agent.announcing import announcing
from streamer.agent.answering import Listeners
from streamer.agent.reloading import Reloader, Reread
from streamer.agent.run_file import RunFile, bounded
from streamer.agent.service import Outcome, Service
from streamer.agent.timing_key import timing_of
from streamer.config.cleartext import cleartext_passwords
from streamer.config.rules import host_problems
from streamer.config.settings import (
    AnySink,
    KafkaSink,
    Limits,
    Settings,
    StdoutSink,
    spool_mode,
    with_budgets,
)
from streamer.errors import ConfigError, HelperGone, KernelError
from streamer.events.batch import Batch
from streamer.events.envelope import host_name
from streamer.events.stream import PreviousRun
from streamer.events.timing import Timing
from streamer.kernel import capabilities, state
from streamer.kernel.targets import in_vain
from streamer.operation.notify import Notifier
from streamer.privilege.named import exposed_secrets
from streamer.privilege.split import Split
from streamer.sinks.base import Sink
from streamer.sinks.factory import Render, make_sink
from streamer.spool.spool import SHARE, Before, Spool
from streamer.terminal.console import Console
from streamer.terminal.lines import Renderer, StatusLine, printable, same_terminal, wants_color
from streamer.terminal.log import logging_to

INTERRUPTED = 130
UNDELIVERED = 5
CLOSE_SECONDS = 1.0
"""How long the last lines wait for somebody to read them."""

KAFKA_SHARES = 8
"""As `sinks/kafka` has it, which is imported only where it is used."""

T = TypeVar("T")

NOTHING_BEFORE = Before()

_log = logging.getLogger("streamer")


def run_service(
    settings: Settings,
    kinds: frozenset[str],
    limits: Limits,
    sink: Sink | None = None,
    reread: Reread | None = None,
) -> int:
    """Stream `kinds` as `settings` say until a signal, a limit or a closed pipe. The exit code.

    Into `sink` alone, if there is one, whose owner then says what came of it. `reread` is where
    the settings are from, and are read from again on SIGHUP.

    Raises:
        StreamerError: what kept it from starting, or ended it.
    """
    keep_freed_memory()
    console = Console()
    line = StatusLine(console) if limits.status and os.isatty(2) else None
    try:
        with logging_to(console, settings.log_level):
            outcome = _split_and_run(settings, kinds, limits, console, line, sink, reread)
        undelivered = f"not delivered: {outcome.undelivered}" if outcome.undelivered else ""
        account = outcome.account if sink is None else ""
        for said in filter(None, (undelivered, account)):
            console.write(f"streamer: {printable(said)}\n".encode("utf-8", "backslashreplace"))
    finally:
        console.close(CLOSE_SECONDS)
    return UNDELIVERED if undelivered else 0


def _split_and_run(
    settings: Settings,
    kinds: frozenset[str],
    limits: Limits,
    console: Console,
    line: StatusLine | None,
    sink: Sink | None,
    reread: Reread | None,
) -> Outcome:
    capabilities.require()
    vain = in_vain(settings.kernel, kinds)
    for said in (*vain, *exposed_secrets(settings), *cleartext_passwords(settings)):
        _log.warning("%s", said)
    with contextlib.ExitStack() as stack:
        terminal = stack.enter_context(_controlling_terminal())  # while there is one
        split = Split(settings, kinds, reread.path if reread is not None else None)
        stack.callback(split.close)
        kernel = state.load(settings, kinds, split.loader)
        stack.callback(kernel.close)
        notes = RunFile.open(settings.state_file) if settings.state_file else None
        if notes is not None:
            stack.callback(notes.close)
        timing = timing_of(settings)
        # Who looks at the host for a moment, as `profile` does, is not asked.
        listeners = Listeners.open(settings) if sink is None else Listeners()
        stack.callback(listeners.close)
        notifier = Notifier.of(os.environ) if sink is None else None
        if notifier is not None:
            stack.callback(notifier.close)
        spool = _open_spool(settings, split) if sink is None else None
        split.drop(answers=any(listeners))
        before = spool.before if spool is not None else NOTHING_BEFORE
        if spool is not None and not spool.use():
            spool = None
        console.start()
        given = Surroundings(
            *(line, split, kernel, terminal, notes, timing),
            *(sink, listeners, notifier, spool, before, reread),
        )
        return run_loop(_run(settings, kinds, limits, given))


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a loop of its own, which is not closed: the process ends after it.

    A name that is being looked up can take a minute. `asyncio.run`, and the loop's own `close`,
    would wait for it after everything is delivered and said.
    """
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())


class _Noted(TypedDict, total=False):
    previous: PreviousRun | None
    leave_note: Callable[[PreviousRun], None]


class Surroundings(NamedTuple):
    """What a run has from before its privileges were given up.

    `terminal` is the controlling terminal, if there is one, and `notes` where the runs on this
    host leave a note for the next one. `timing` is how coarse times are, None: as they are.
    """

    line: StatusLine | None
    split: Split
    kernel: state.KernelState
    terminal: int | None
    notes: RunFile | None
    timing: Timing | None
    sink: Sink | None = None
    """In place of those of the settings."""
    listeners: Listeners = Listeners()
    """Where it is asked about itself."""
    notifier: Notifier | None = None
    """Where a service manager is told."""
    spool: Spool | None = None
    before: Before = NOTHING_BEFORE
    """What the spool knows of the runs before."""
    reread: Reread | None = None
    """Where the configuration is from."""


async def _run(
    settings: Settings, kinds: frozenset[str], limits: Limits, given: Surroundings
) -> Outcome:
    sinks = _sinks(settings, given)
    names = [sink.name for sink in sinks]
    if len(set(names)) < len(names):
        raise ConfigError(f"sinks: found the same one twice among {', '.join(names)}")
    try:
        service = _service(settings, kinds, limits, sinks, given)
        _handle_signals(service, given, _reloader(service, given))
        _watch_helper(service, given.split)
        async with announcing(service, given.notifier):
            with given.listeners.answering(service):
                return await service.run()
    finally:
        given.split.client.unwatch(asyncio.get_running_loop())
        if given.spool is not None:
            await given.spool.close()


def _sinks(settings: Settings, given: Surroundings) -> list[Sink]:
    if given.sink is not None:
        return [given.sink]
    host = host_name(settings.host)
    for problem in host_problems(settings, host):
        raise ConfigError(problem)
    render = _render(settings, given.line)
    chosen = with_budgets(settings.sinks)
    return [_sink(one, host, render, given) for one in chosen]


def _reloader(service: Service, given: Surroundings) -> Reloader | None:
    """What reads the configuration anew, if it is from a file."""
    if given.reread is None:
        return None

    def make(chosen: AnySink, settings: Settings) -> Sink:
        host = host_name(settings.host)
        for problem in host_problems(settings, host):
            raise ConfigError(problem)
        render = _render(settings, given.line) if isinstance(chosen, StdoutSink) else None
        return make_sink(chosen, host, render, given.split.opener)

    return Reloader(service, given.split, given.reread, make, given.notifier)


def _sink(chosen: AnySink, host: str, render: Render | None, given: Surroundings) -> Sink:
    mode = spool_mode(chosen)
    if given.spool is None or mode == "off":
        return make_sink(chosen, host, render, given.split.opener)
    behind = behind_spool(chosen)
    sink = make_sink(behind, host, render, given.split.opener)
    return given.spool.in_front_of(sink, mode, chosen.budget)


def behind_spool(chosen: AnySink) -> AnySink:
    """The settings of a sink that has a spool: with its share of the budget."""
    budget = chosen.budget // SHARE
    behind = msgspec.structs.replace(chosen, budget_bytes=budget)
    if isinstance(behind, KafkaSink):  # which sends no more at once than a share of that again
        most = max(1024, min(behind.batch_bytes, budget // KAFKA_SHARES))
        return msgspec.structs.replace(behind, batch_bytes=most)
    return behind


def _open_spool(settings: Settings, split: Split) -> Spool | None:
    """The spool, if a sink has one."""
    if all(spool_mode(one) == "off" for one in settings.sinks):
        return None
    return Spool.open(settings.spool, split.drop)


def _service(
    settings: Settings,
    kinds: frozenset[str],
    limits: Limits,
    sinks: list[Sink],
    given: Surroundings,
) -> Service:
    noted: _Noted = {}
    if given.notes is not None:
        noted = {"leave_note": given.notes.write}
    note = given.notes.read() if given.notes is not None else None
    previous = given.before.told_by(note)
    if previous is not None:  # what made way before a kill can be a great many batches
        previous = msgspec.structs.replace(previous, untold=bounded(previous.untold))
    noted["previous"] = previous
    try:
        return Service(
            settings,
            kinds,
            limits,
            sinks,
            given.kernel,
            status_line=given.line,
            timing=given.timing,
            spool=given.spool,
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


def _handle_signals(service: Service, given: Surroundings, reloader: Reloader | None) -> None:
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
            return
        service.reopen()
        if reloader is not None:
            reloader.ask()

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell's background sets it
            loop.add_signal_handler(number, stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        loop.add_signal_handler(signal.SIGHUP, hang_up)
    loop.add_signal_handler(signal.SIGUSR1, service.reopen)
    signals.release()


def _hung_up(terminal: int) -> bool:
    poll = select.poll()
    poll.register(terminal, 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))
