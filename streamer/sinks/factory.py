"""Makes sinks from their settings."""

from __future__ import annotations

from collections.abc import Callable

from streamer.config import settings
from streamer.events.batch import Batch
from streamer.privilege.files import DIRECT, Opener
from streamer.sinks.base import Sink

Render = Callable[[Batch], bytes]


def make_sink(
    chosen: settings.AnySink, host: str, render: Render | None, opener: Opener = DIRECT
) -> Sink:
    """The sink for `chosen`. `render` makes readable lines where stdout is a terminal.

    Files that the settings name are opened by `opener`.

    The libraries of a sink are imported only when it is used.

    Raises:
        ConfigError: a secret or certificate that cannot be read.
    """
    match chosen:
        case settings.StdoutSink():
            from streamer.sinks.stdout import StdoutSink

            return StdoutSink(chosen, render=render)
        case settings.FileSink():
            from streamer.sinks.file import FileSink

            return FileSink(chosen, opener)
        case settings.KafkaSink():
            from streamer.sinks.kafka import KafkaSink

            return KafkaSink(chosen, host=host, opener=opener)
        case settings.MqttSink():
            from streamer.sinks.mqtt import MqttSink

            return MqttSink(chosen, host=host, opener=opener)
