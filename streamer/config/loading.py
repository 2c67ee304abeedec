"""The configuration: read from TOML, overridden by the command line, checked strictly.

Every mistake is one line, `FILE: KEY: found VALUE, allowed: VALUES`, and ends with exit code 2.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from streamer.config.messages import explain
from streamer.config.reference import documentation, schema
from streamer.config.rules import problems
from streamer.config.settings import Settings
from streamer.config.sink_url import parse_sink
from streamer.errors import ConfigError

__all__ = ["Overrides", "decode", "documentation", "load", "merge", "parse_sink", "schema"]

_AT = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says; None and empty where it says nothing.

    `settings` are keys of `Settings`, and `filters` those of its filters. `sinks` are URLs, and
    replace the file's sinks. `encoding` is that of all sinks whose URL does not name one, and
    `color` that of standard output.
    """

    settings: Mapping[str, Any] = {}
    filters: Mapping[str, tuple[int | str, ...]] = {}
    sinks: tuple[str, ...] = ()
    encoding: str | None = None
    color: str | None = None


def load(path: Path | None) -> Settings:
    """The settings in the TOML file at `path`; the defaults where it is None.

    Raises:
        ConfigError: a file that cannot be read, is not TOML, or has a wrong setting.
    """
    return Settings() if path is None else decode(_parse(_read(path), str(path)), str(path))


def merge(settings: Settings, overrides: Overrides) -> Settings:
    """The settings with those of the command line in their place, and at least one sink.

    Raises:
        ConfigError: an override that is wrong, or impossible together with `settings`.
    """
    data: dict[str, Any] = msgspec.to_builtins(settings)
    data.update(overrides.settings)
    data["filters"] = data["filters"] | dict(overrides.filters)
    data["sinks"] = _sinks(data["sinks"], overrides)
    return decode(data, "command line")


def decode(data: Mapping[str, Any], source: str) -> Settings:
    """Settings from plain data; `source` begins the messages.

    Raises:
        ConfigError: the first mistake, as one line.
    """
    try:
        settings = msgspec.convert(data, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, data, Settings)}") from None
    for problem in problems(settings):
        raise ConfigError(f"{source}: {problem}")
    return settings


def _sinks(sinks: Sequence[dict[str, Any]], overrides: Overrides) -> list[dict[str, Any]]:
    if overrides.sinks:
        return [_from_url(url, overrides) for url in overrides.sinks]
    return [sink | _defaults(sink["type"], overrides) for sink in sinks or [{"type": "stdout"}]]


def _from_url(url: str, overrides: Overrides) -> dict[str, Any]:
    sink = parse_sink(url, _defaults(url.partition(":")[0], overrides))
    data: dict[str, Any] = msgspec.to_builtins(sink)
    return data


def _defaults(sink_type: str, overrides: Overrides) -> dict[str, str]:
    named = {"encoding": overrides.encoding}
    if sink_type == "stdout":
        named["color"] = overrides.color
    return {key: value for key, value in named.items() if value is not None}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start + 1}: not UTF-8") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        # Line ends as TOML counts them: read_text has already made them all "\n".
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
