"""Which files a configuration names: all that the helper will ever open for the worker."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress

import msgspec

from streamer.config.settings import (
    AnySink,
    FileSink,
    KafkaSink,
    MqttSink,
    Settings,
    StdoutSink,
    Tls,
)
from streamer.errors import ConfigError
from streamer.privilege.files import PACKED, UNFINISHED, NamedFile, identity, own_descriptor


def named_files(settings: Settings, config: str | None = None) -> tuple[NamedFile, ...]:
    """Every file that `settings` name, by absolute path; each once for each use.

    `config` is the file that they are from, if it is to be read again.

    Raises:
        ConfigError: two sinks would write to one file.
    """
    check_distinct(settings.sinks)
    files: dict[NamedFile, None] = {}
    if settings.btf is not None:
        files[_read(settings.btf)] = None
    for sink in settings.sinks:
        files |= dict.fromkeys(files_of_sink(sink))
    if config is not None:
        files[_read(config)] = None
    return tuple(file for file in files if own_descriptor(file.path) is None)


def files_of_sink(sink: AnySink, directory: str | None = None) -> Iterator[NamedFile]:
    """The files that a sink names, but for descriptors of this process.

    Relative paths are so to `directory`, or to where this process is.
    """
    for file in _of_sink(sink):
        if own_descriptor(file.path) is None:
            path = os.path.normpath(os.path.join(directory or os.getcwd(), file.path))
            yield file._replace(path=path)


def resolved(sink: AnySink, directory: str) -> AnySink:
    """A sink to a file with its path from the root."""
    if not isinstance(sink, FileSink):
        return sink
    return msgspec.structs.replace(sink, path=os.path.join(directory, sink.path))


def check_distinct(sinks: Sequence[AnySink]) -> None:
    """Refuse one file by two names: links lead to it, or rotation would."""
    seen: dict[object, int] = {}
    for index, sink in enumerate(sinks):
        for mark in _marks(sink):
            first = seen.setdefault(mark, index)
            if first != index:
                where = "standard output" if mark == _STDOUT else f"the file of sinks[{first}]"
                raise ConfigError(f"sinks[{index}]: found {where} by another name, allowed: once")


_STDOUT = 1


def _marks(sink: AnySink) -> Iterator[object]:
    """What no other sink may have: the descriptor; or path, identity and paths of siblings."""
    if isinstance(sink, StdoutSink):
        yield _STDOUT
        yield from _regular(_STDOUT)
    if not isinstance(sink, FileSink):
        return
    own = own_descriptor(sink.path)
    if own is not None:
        yield own
        yield from _regular(own)
        return
    path = os.path.realpath(sink.path)
    yield path
    with suppress(OSError):  # a file that is not there is no other one's
        yield identity(os.stat(path))
    if sink.rotates:
        yield f"{path}{UNFINISHED}"
        for number in range(1, sink.rotate_keep + 1):
            yield from (f"{path}.{number}", f"{path}.{number}{PACKED}")


def _regular(fd: int) -> Iterator[object]:
    """The file that a descriptor of this process was opened for, as a shell's `>` does it."""
    with suppress(OSError):
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            yield identity(status)


def _of_sink(sink: AnySink) -> Iterator[NamedFile]:
    match sink:
        case FileSink():
            yield NamedFile(sink.path, "append", int(sink.mode, 8))
        case KafkaSink():
            yield from _of_tls(sink.tls)
            if sink.sasl is not None and sink.sasl.password_file is not None:
                yield NamedFile(sink.sasl.password_file, "read")
        case MqttSink():
            yield from _of_tls(sink.tls)
            if sink.password_file is not None:
                yield NamedFile(sink.password_file, "read")


def exposed_secrets(settings: Settings) -> Iterator[str]:
    """Files of passwords and keys that every user of the host can read, each in a sentence."""
    secrets: dict[str, None] = {}
    for sink in settings.sinks:
        secrets |= dict.fromkeys(_secrets_of(sink))
    for path in secrets:
        with suppress(OSError):  # said when it is to be read
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IROTH:
                yield f"{path}: every user can read this secret"


def _secrets_of(sink: AnySink) -> Iterator[str]:
    named: list[str | None] = []
    if isinstance(sink, KafkaSink) and sink.sasl is not None:
        named.append(sink.sasl.password_file)
    if isinstance(sink, MqttSink):
        named.append(sink.password_file)
    if isinstance(sink, KafkaSink | MqttSink) and sink.tls is not None:
        named += [sink.tls.key_file, sink.tls.key_password_file]
    yield from filter(None, named)


def _of_tls(tls: Tls | None) -> Iterator[NamedFile]:
    if tls is not None:
        names = (tls.ca_file, tls.cert_file, tls.key_file, tls.key_password_file)
        yield from (NamedFile(name, "read") for name in names if name is not None)


def _read(path: str) -> NamedFile:
    return NamedFile(os.path.abspath(path), "read")
