"""Which files a configuration names: all that the helper will ever open for the worker."""

from __future__ import annotations

import os
from collections.abc import Iterator

from streamer.config.settings import AnySink, FileSink, KafkaSink, MqttSink, Settings, Tls
from streamer.privilege.files import NamedFile, own_descriptor


def named_files(settings: Settings) -> tuple[NamedFile, ...]:
    """Every file that `settings` name, by absolute path; each once for each use."""
    files: dict[NamedFile, None] = {}
    if settings.btf is not None:
        files[_read(settings.btf)] = None
    for sink in settings.sinks:
        files |= dict.fromkeys(_of_sink(sink))
    return tuple(file for file in files if own_descriptor(file.path) is None)


def _of_sink(sink: AnySink) -> Iterator[NamedFile]:
    match sink:
        case FileSink():
            yield NamedFile(os.path.abspath(sink.path), "append", int(sink.mode, 8))
        case KafkaSink():
            yield from _of_tls(sink.tls)
            if sink.sasl is not None and sink.sasl.password_file is not None:
                yield _read(sink.sasl.password_file)
        case MqttSink():
            yield from _of_tls(sink.tls)
            if sink.password_file is not None:
                yield _read(sink.password_file)


def _of_tls(tls: Tls | None) -> Iterator[NamedFile]:
    if tls is not None:
        names = (tls.ca_file, tls.cert_file, tls.key_file, tls.key_password_file)
        yield from (_read(name) for name in names if name is not None)


def _read(path: str) -> NamedFile:
    return NamedFile(os.path.abspath(path), "read")
