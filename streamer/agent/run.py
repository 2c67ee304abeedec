"""The process around a service: event loop, signals, log, terminal, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import select
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypedDict

import msgspec

from streamer.agent import signals, worker
from streamer.agent.allocator import keep_freed_memory
from streamer.agent.announcing import announcing
from streamer.agent.answering import Listeners
from streamer.agent.crew import Crew
from streamer.agent.fanout import Policy, policy_of
from streamer.agent.loop import run_loop
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
    MqttSink,
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
from streamer.kernel import bulk_rings, capabilities, state
from streamer.kernel.loader import present_cpus
from streamer.kernel.targets import in_vain
from streamer.operation.notify import Notifier
from streamer.privilege.channel import Channel
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

NOTHING_BEFORE = Before()
NOBODY = Crew()

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
        further = _further_workers(settings, limits) if sink is None else 0
        split = Split(settings, kinds, reread.path if reread is not None else None, further)
        stack.callback(split.close)
        timing = timing_of(settings)
        # Before anything is loaded: programs have to know them, and not to observe them.
        crew = _start_crew(settings, split, timing)
        stack.callback(crew.close)
        kernel = state.load(settings, kinds, split.loader)
        stack.callback(kernel.close)
        if crew.members and kernel.transport.name == "perf":
            _log.warning("workers: perf buffers are read by one alone")
            crew.dismiss()
        notes = RunFile.open(settings.state_file) if settings.state_file else None
        if notes is not None:
            stack.callback(notes.close)
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
            crew=crew,
        )
        return run_loop(_run(settings, kinds, limits, given))


def _further_workers(settings: Settings, limits: Limits) -> int:
    """How many processes read beside this one.

    None where a run ends after so many events: one reader alone can count to that.
    """
    if settings.workers == 1 or settings.rings.transport == "perf" or limits.max_events is not None:
        return 0
    rings = state.ring_buffers(settings.rings, len(present_cpus()), settings.workers)
    bulk = sum(bulk_rings.ring_of(name) == bulk_rings.BULK for name in rings)
    return min(settings.workers, bulk) - 1


def _start_crew(settings: Settings, split: Split, timing: Timing | None) -> Crew:
    """Start further workers, one for each end that the helper has for one."""

    def serve(number: int, channel: Channel) -> int:
        worker.ignore_signals()
        opener = split.drop_further(split.ends[number - 1])
        host = host_name(settings.host)
        policies = [policy_of(one.on_full, len(settings.sinks)) for one in settings.sinks]

        def make_sinks() -> list[tuple[Sink, Policy]]:
            chosen = [one_of(one, len(split.ends) + 1, number) for one in _budgeted(settings)]
            sinks = [make_sink(one, host, None, opener) for one in chosen]
            return list(zip(sinks, policies, strict=True))

        return worker.serve(channel, settings, timing, make_sinks)

    crew = Crew.start(len(split.ends), serve)
    for end in split.ends:
        end.close()
    return crew


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
    crew: Crew = NOBODY
    """Further workers."""


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
    workers = len(given.crew.members) + 1
    return [_sink(one_of(one, workers), host, render, given) for one in _budgeted(settings)]


def _budgeted(settings: Settings) -> tuple[AnySink, ...]:
    return with_budgets(settings.sinks)


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
    return _with_share(chosen, SHARE)


def one_of(chosen: AnySink, workers: int, number: int = 0) -> AnySink:
    """The settings of a sink for one of so many workers: of each the same destination.

    The first has the number 0.
    """
    if workers == 1:
        return chosen
    one = _with_share(chosen, workers)
    if number and isinstance(one, MqttSink) and one.client_id is not None:
        return msgspec.structs.replace(one, client_id=f"{one.client_id}-{number}")
    return one


def _with_share(chosen: AnySink, share: int) -> AnySink:
    budget = chosen.budget // share
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
            crew=given.crew,
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
