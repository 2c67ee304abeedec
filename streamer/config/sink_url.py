"""Sinks as URLs, for the command line.

=====================================  ====================================================
`stdout:`                              standard output
`file:PATH`                            a file, appended to
`kafka://HOST[:PORT][,…][/TOPIC]`      Kafka; `kafkas://` with TLS; port 9092 unless given
`mqtt://[USER@]HOST[:PORT][/TOPIC]`    MQTT; `mqtts://` with TLS; port 1883 or 8883
=====================================  ====================================================

`?key=value&…` sets the sink's other settings, those of its tables as `tls.ca_file=…`. `%XX`
stands for a byte, as in any URL. A message never repeats what may be a password.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any
from urllib.parse import unquote

import msgspec

from streamer.config.messages import mistakes, quoted
from streamer.config.rules import HOST_PORT, sink_problems, split_host_port, unprintable
from streamer.config.settings import AnySink
from streamer.errors import ConfigError

FORMS = (
    "stdout:, file:PATH, kafka://HOST:PORT/TOPIC, kafkas://…, mqtt://[USER@]HOST:PORT/TOPIC, "
    "mqtts://…"
)
NO_PASSWORD = "a password does not belong into a URL, use password_env or password_file"
NOTHING: Mapping[str, str] = {}

_LOCAL = frozenset({"stdout", "file"})
_SCHEMES = _LOCAL | {"kafka", "kafkas", "mqtt", "mqtts"}
_SECRETS = frozenset({"password", "key_password", "passwd", "secret"})


def parse_sink(url: str, defaults: Mapping[str, str] = NOTHING) -> AnySink:
    """The sink that `url` describes; `defaults` are queries that the URL's own override.

    Raises:
        ConfigError: a URL of another form, an unknown key or a value that is not allowed.
    """
    scheme, colon, rest = url.partition(":")
    if any("\ud800" <= char <= "\udfff" for char in url):  # bytes of the command line, smuggled in
        raise ConfigError(f"--sink: found {_shown(url)}, allowed: UTF-8")
    if scheme not in _SCHEMES or not colon:
        raise ConfigError(f"--sink: found {_shown(url)}, allowed: {FORMS}")
    if scheme not in _LOCAL:
        _refuse_password(scheme, rest)
    place, _, query = rest.partition("?")
    try:
        return _sink(_data(scheme, place), dict(defaults) | _queries(query))
    except ConfigError as error:
        raise ConfigError(f"--sink {quoted(f'{scheme}:{place}')[1:-1]}: {error}") from None


def _sink(data: dict[str, Any], queries: Mapping[str, str]) -> AnySink:
    for key, value in queries.items():
        table, dot, name = key.rpartition(".")
        if table == "tls" and "tls" not in data:
            raise ConfigError(f"{quoted(key)} without TLS, allowed: kafkas:// or mqtts://")
        place = data.setdefault(table, {}) if dot else data
        if not isinstance(place, dict) or name in place:
            raise ConfigError(f"{quoted(key)} is there twice, allowed: once")
        place[name] = value
    try:
        # Values of a query are strings: not strict, so that "5" is a number.
        sink: AnySink = msgspec.convert(data, AnySink, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(next(mistakes(data, AnySink, strict=False))) from None
    for problem in chain(unprintable(data), sink_problems(sink)):
        raise ConfigError(problem)
    return sink


def _refuse_password(scheme: str, rest: str) -> None:
    """Refuse everything that may be a password, before any part of the URL is repeated.

    A password may hold `/` or `?`, so the last `@` of all decides; elsewhere `@` is `%40`.
    """
    before, at, _ = rest.rpartition("@")
    user = before.removeprefix("//")
    if at and (scheme.startswith("kafka") or ":" in user):
        raise ConfigError(f"--sink {scheme}://…: {NO_PASSWORD}")
    if at and (not user or any(mark in user for mark in "@/?&")):
        raise ConfigError(f"--sink {scheme}://…: an @ that does not end USER is written %40")


def _shown(url: str) -> str:
    return quoted(f"{url.partition(':')[0]}:…") if "@" in url else quoted(url)


def _data(scheme: str, place: str) -> dict[str, Any]:
    """What the part of a URL before the query sets."""
    kind = scheme if scheme in _LOCAL else scheme.removesuffix("s")
    if kind == "file":
        path = "/" + place.lstrip("/") if place.startswith("//") else place
        if not path.strip("/"):
            raise ConfigError("no path, allowed: file:PATH")
        return {"type": kind, "path": unquote(path)}
    if kind in _LOCAL:
        if place:
            raise ConfigError(f"found {quoted(place)} after the colon, allowed: nothing")
        return {"type": kind}
    if not place.startswith("//"):
        raise ConfigError(f"no // after the colon, allowed: {FORMS}")
    authority, _, topic = place[2:].partition("/")
    data = {"type": kind} | ({"topic": unquote(topic)} if topic else {})
    return data | ({} if kind == scheme else {"tls": {}}) | _brokers(scheme, authority)


def _brokers(scheme: str, authority: str) -> dict[str, Any]:
    if scheme.startswith("kafka"):
        brokers = [_address(one, 9092) for one in authority.split(",")]
        return {"bootstrap": [f"[{h}]:{p}" if ":" in h else f"{h}:{p}" for h, p in brokers]}
    user, at, address = authority.rpartition("@")
    host, port = _address(address, 8883 if scheme == "mqtts" else 1883)
    return {"host": host, "port": port} | ({"username": unquote(user)} if at else {})


def _address(text: str, default_port: int) -> tuple[str, int]:
    address = split_host_port(text, default_port)
    if address is None:
        raise ConfigError(f"found {quoted(text)}, allowed: {HOST_PORT}")
    return address


def _queries(query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, value = map(unquote, part.partition("=")[::2])
        if key.rpartition(".")[2] in _SECRETS:
            raise ConfigError(NO_PASSWORD)
        if key in found:
            raise ConfigError(f"{quoted(key)} is there twice, allowed: once")
        found[key] = value
    return found
