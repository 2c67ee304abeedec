"""The configuration: read from TOML, overridden by the command line, checked strictly.

Every mistake is one line, `FILE: KEY: found VALUE, allowed: VALUES`, and ends with exit code 2.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from streamer.config.messages import mistakes
from streamer.config.rules import problems, unprintable
from streamer.config.settings import AnySink, Settings, StdoutSink
from streamer.config.sink_url import parse_sink
from streamer.errors import ConfigError


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


_AT = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says; None and empty where it says nothing.

    `settings` are keys of `Settings`, `kernel` and `filters` those of these sections. `sinks` are
    URLs, and replace the file's sinks. `encoding` is that of all sinks whose URL does not name
    one, and `color` that of standard output.
    """

    settings: Mapping[str, Any] = {}
    kernel: Mapping[str, Any] = {}
    filters: Mapping[str, tuple[int | str, ...]] = {}
    sinks: tuple[str, ...] = ()
    encoding: str | None = None
    color: str | None = None


NOTHING = Overrides()


def load(
    path: Path | None, overrides: Overrides = NOTHING, opened: Callable[[str], int] = _open
) -> Settings:
    """The settings of the TOML file at `path`, if any, and the command line, which wins.

    `opened` gives a descriptor to read a file.

    Raises:
        ConfigError: a file that cannot be read, is not TOML, or has a wrong setting; or an
            override that is wrong, or impossible together with the file.
    """
    data = {} if path is None else _parse(_read(path, opened), str(path))
    settings = _decode(data, str(path), ())
    if overrides == NOTHING:
        return settings
    sections = {
        name: {**data.get(name, {}), **given}
        for name, given in (("kernel", overrides.kernel), ("filters", overrides.filters))
    }
    merged = {**data, **overrides.settings, **sections}
    return _decode(merged, "command line", _sinks(settings, overrides))


def _decode(data: Mapping[str, Any], source: str, sinks: tuple[AnySink, ...]) -> Settings:
    """Settings from plain data, and `sinks` in place of its own; `source` begins the messages."""
    try:
        settings = msgspec.convert(data, Settings)
    except msgspec.ValidationError:
        raise ConfigError(f"{source}: {next(mistakes(data, Settings))}") from None
    sinks = sinks or settings.sinks or Settings().sinks
    settings = msgspec.structs.replace(settings, sinks=sinks)
    for problem in chain(unprintable(data), problems(settings)):
        raise ConfigError(f"{source}: {problem}")
    return settings


def _sinks(settings: Settings, overrides: Overrides) -> tuple[AnySink, ...]:
    """Those of the command line; without one, the others as it would have them."""
    given = {"encoding": overrides.encoding} if overrides.encoding else {}
    color = {"color": overrides.color} if overrides.color else {}
    if overrides.sinks:
        schemes = (url.partition(":")[0] for url in overrides.sinks)
        defaults = (given | color if scheme == "stdout" else given for scheme in schemes)
        return tuple(map(parse_sink, overrides.sinks, defaults))
    return tuple(
        msgspec.structs.replace(sink, **given, **(color if isinstance(sink, StdoutSink) else {}))
        for sink in settings.sinks
    )


def _read(path: Path, opened: Callable[[str], int]) -> str:
    try:
        with open(opened(str(path)), encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start + 1}: not UTF-8") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        # Line ends as TOML counts them: reading has already made them all "\n".
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: {_syntax(str(error), text)}") from None
    except ValueError:  # the only other one: Python refuses integers of over 4300 digits
        raise ConfigError(f"{source}: an integer of too many digits") from None


def _syntax(message: str, text: str) -> str:
    """`line 3, column 7: …` from tomllib's message, which ends with the place."""
    match = _AT.search(message)
    if match is None:
        return message
    end = len(text) - (text.rfind("\n") + 1) + 1
    line, column = (match[1], match[2]) if match[1] else (text.count("\n") + 1, end)
    reason = message[: match.start()]
    return f"line {line}, column {column}: {reason[:1].lower()}{reason[1:]}"
