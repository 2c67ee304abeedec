"""Reads the sources of `streamer verify` to their end, or for a time, and reports."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import uvloop

from streamer.config.settings import KafkaSink, MqttSink
from streamer.config.sink_url import parse_sink
from streamer.errors import SinkError
from streamer.terminal.console import say
from streamer.terminal.lines import printable
from streamer.verify.files import Opened, open_files, read_files
from streamer.verify.kafka import KafkaSource
from streamer.verify.ledger import Ledger
from streamer.verify.mqtt import MqttSource
from streamer.verify.records import Chunk
from streamer.verify.report import VerifyReport
from streamer.verify.start import BEGINNING, Start
from streamer.verify.text import progress_text

MQTT_SECONDS = 10.0
"""How long MQTT is listened to, unless it is said."""

LAST_SECONDS = 10.0
"""How long what is followed is read on when it is over, up to the end as it is then."""

PROGRESS_SECONDS = 0.5
_SCHEMES = ("kafka:", "kafkas:", "mqtt:", "mqtts:")


class Options(NamedTuple):
    """How `verify` reads. `seconds` None: to the end, or, where it follows, until a signal."""

    start: Start = BEGINNING
    follow: bool = False
    seconds: float | None = None
    ended: bool = False
    progress: bool = True


class Unreadable(SinkError):
    """A source that cannot be read."""

    exit_code = 2


def verify(sources: Sequence[str], options: Options) -> VerifyReport:
    """Read the sources, which are one stream, and report.

    Raises:
        ConfigError: a source that cannot be used.
        Unreadable: one that cannot be read.
    """
    return uvloop.run(_verify(sources, options))


class _Sources:
    """Files and brokers, opened or made, so that a mistake in one is found before any is read."""

    def __init__(self, sources: Sequence[str]) -> None:
        urls = [one for one in sources if one.startswith(_SCHEMES)]
        paths = [one.removeprefix("file:") for one in sources if one not in urls]
        self.brokers: list[KafkaSource | MqttSource] = []
        for url in urls:
            settings = parse_sink(url)
            if isinstance(settings, KafkaSink):
                self.brokers.append(KafkaSource(settings))
            elif isinstance(settings, MqttSink):
                self.brokers.append(MqttSource(settings))
        self.files: list[Opened] = open_files(paths)
        self.sinks = [f"/{one.settings.topic}" for one in self.brokers]
        self.sinks += [os.path.basename(path) for path in paths if path != "-"]

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.files] + [one.name for one in self.brokers]

    @property
    def trimmed(self) -> bool:
        return any(isinstance(one, KafkaSource) and one.trimmed for one in self.brokers)

    @property
    def complete(self) -> bool:
        return all(one.complete for one in self.brokers if isinstance(one, KafkaSource))

    @property
    def remarks(self) -> Iterator[str]:
        for one in self.brokers:
            if isinstance(one, KafkaSource):
                yield from one.remarks

    @property
    def only_live(self) -> bool:
        return any(isinstance(one, MqttSource) for one in self.brokers)


async def _verify(names: Sequence[str], options: Options) -> VerifyReport:
    sources = _Sources(names)
    seconds = options.seconds
    if seconds is None and sources.only_live and not options.follow:
        seconds = MQTT_SECONDS
    ledger = Ledger(sources.sinks)
    readers = {
        asyncio.create_task(_feed(ledger, chunks)): source
        for chunks, source in _readers(sources, options)
    }
    progress = asyncio.create_task(_progress(ledger, show=options.progress))
    try:
        await _until(readers, seconds)
    finally:
        progress.cancel()
        await asyncio.gather(progress, return_exceptions=True)
    for text in sources.remarks:
        say(f"streamer: {printable(text)}")
    whole = options.start.whole and not sources.trimmed and not sources.only_live
    return ledger.reported(
        sources.names, whole=whole, complete=sources.complete, ended=options.ended
    )


def _readers(
    sources: _Sources, options: Options
) -> Iterable[tuple[AsyncIterator[Chunk], KafkaSource | None]]:
    """What reads the files, and each broker; with the topics of Kafka what they are."""
    if sources.files:
        yield read_files(sources.files, options.start, follow=options.follow), None
    for one in sources.brokers:
        if isinstance(one, KafkaSource):
            follow = options.follow or options.seconds is not None
            yield one.read(options.start, follow=follow), one
        else:
            yield one.read(), None


async def _feed(ledger: Ledger, chunks: AsyncIterator[Chunk]) -> None:
    async with aclosing(chunks) as reading:  # type: ignore[type-var]
        async for chunk in reading:
            ledger.feed(chunk)


Readers = Mapping["asyncio.Task[None]", KafkaSource | None]


async def _until(readers: Readers, seconds: float | None) -> None:
    """Until all are read, the time is over, or a signal comes; then they are ended.

    What is followed of Kafka has by then more than was read of it, if anything goes on there: it is
    read to its end first.

    Raises:
        ConfigError: a file cannot be read.
        Unreadable: a broker cannot be read.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    stopped = asyncio.create_task(stop.wait())
    reading = asyncio.gather(*readers)
    try:
        both: set[asyncio.Future[Any]] = {reading, stopped}
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            await _read_on([task for task, one in readers.items() if one and one.stop()], stop)
        if reading.done():
            reading.result()
    except SinkError as error:
        raise Unreadable(str(error)) from None
    finally:
        stopped.cancel()
        reading.cancel()
        await asyncio.gather(reading, stopped, return_exceptions=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _read_on(last: Sequence[asyncio.Task[None]], stop: asyncio.Event) -> None:
    """Until these end by themselves, for a while, or until another signal."""
    if not last:
        return
    stop.clear()
    stopped = asyncio.create_task(stop.wait())
    reading = asyncio.gather(*last, return_exceptions=True)
    both: set[asyncio.Future[Any]] = {reading, stopped}
    await asyncio.wait(both, timeout=LAST_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()


async def _progress(ledger: Ledger, *, show: bool) -> None:
    """A line on standard error, if it is a terminal, drawn anew."""
    if not (show and sys.stderr.isatty()):
        return
    begun = time.monotonic()
    try:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            text = progress_text(ledger.records, ledger.bytes, time.monotonic() - begun)
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
