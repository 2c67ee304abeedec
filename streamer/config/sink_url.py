"""Sinks as URLs, for the command line.

=====================================  ====================================================
`stdout:`                              standard output
`file:PATH`                            a file, appended to
`kafka://HOST[:PORT][,…][/TOPIC]`      Kafka; `kafkas://` with TLS; port 9092 unless given
`mqtt://[USER@]HOST[:PORT][/TOPIC]`    MQTT; `mqtts://` with TLS; port 1883 or 8883
`memory:`                              memory, for tests
=====================================  ====================================================

`?key=value&…` sets the sink's other settings, those of its tables as `tls.ca_file=…`. `%XX`
stands for a byte, as in any URL. A message never repeats what may be a password.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

import msgspec

from streamer.config.messages import explain, quoted
from streamer.config.rules import HOST_PORT, sink_problems, split_host_port
from streamer.config.settings import AnySink
from streamer.errors import ConfigError

FORMS = (
    "stdout:, file:PATH, kafka://HOST:PORT/TOPIC, kafkas://…, mqtt://[USER@]HOST:PORT/TOPIC, "
    "mqtts://…"
)
NO_PASSWORD = "a password does not belong into a URL, use password_env or password_file"

Data = dict[str, Any]


def parse_sink(url: str, defaults: Mapping[str, str] | None = None) -> AnySink:
    """The sink that `url` describes; `defaults` are queries that the URL's own override.

    Raises:
        ConfigError: a URL of another form, an unknown key or a value that is not allowed.
    """
    if not _is_utf8(url):
        raise ConfigError(f"--sink: found {_shown(url)}, allowed: UTF-8")
    scheme, colon, rest = url.partition(":")
    build = _SCHEMES.get(scheme)
    if build is None or not colon:
        raise ConfigError(f"--sink: found {_shown(url)}, allowed: {FORMS}")
    place, _, query = rest.partition("?")
    if scheme not in _LOCAL:
        _refuse_password(scheme, rest)
    where = f"--sink {quoted(f'{scheme}:{place}')[1:-1]}"
    data = build(place, where)
    for key, value in ({**(defaults or {}), **_queries(query, where)}).items():
        _put(data, key, value, where)
    return _convert(data, where)


def _convert(data: Data, where: str) -> AnySink:
    try:
        # Values of a query are strings: not strict, so that "5" is a number.
        sink: AnySink = msgspec.convert(data, AnySink, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, data, AnySink)}") from None
    for problem in sink_problems(sink):
        raise ConfigError(f"{where}: {problem}")
    return sink


def _refuse_password(scheme: str, rest: str) -> None:
    """Refuse everything that may be a password, before any part of the URL is repeated.

    A password may hold `/` or `?`, so the last `@` of all decides; elsewhere `@` is `%40`.
    """
    before, at, _ = rest.rpartition("@")
    if not at:
        return
    user = before.removeprefix("//")
    if scheme.startswith("kafka") or ":" in user:
        raise ConfigError(f"--sink {scheme}://…: {NO_PASSWORD}")
    if not user or any(mark in user for mark in "@/?&"):
        raise ConfigError(f"--sink {scheme}://…: an @ that does not end USER is written %40")


def _is_utf8(text: str) -> bool:
    """Whether no byte of the command line had to be smuggled in as a surrogate."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _shown(url: str) -> str:
    scheme = url.partition(":")[0]
    return quoted(f"{scheme}:…") if "@" in url else quoted(url)


def _stdout(place: str, where: str) -> Data:
    _refuse_place(place, where)
    return {"type": "stdout"}


def _memory(place: str, where: str) -> Data:
    _refuse_place(place, where)
    return {"type": "memory"}


def _refuse_place(place: str, where: str) -> None:
    if place:
        raise ConfigError(f"{where}: found {quoted(place)} after the colon, allowed: nothing")


def _file(place: str, where: str) -> Data:
    path = "/" + place.lstrip("/") if place.startswith("//") else place
    if not path.strip("/"):
        raise ConfigError(f"{where}: no path, allowed: file:PATH")
    return {"type": "file", "path": unquote(path)}


def _kafka(place: str, where: str) -> Data:
    hosts, topic = _authority(place, where)
    brokers = [_address(address, 9092, where) for address in hosts.split(",")]
    bootstrap = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in brokers]
    return {"type": "kafka", "bootstrap": bootstrap} | topic


def _mqtt(place: str, where: str) -> Data:
    return _mqtt_at(1883, place, where)


def _mqtt_at(default_port: int, place: str, where: str) -> Data:
    authority, topic = _authority(place, where)
    user, at, address = authority.rpartition("@")
    host, port = _address(address, default_port, where)
    data: Data = {"type": "mqtt", "host": host, "port": port} | topic
    return data | {"username": unquote(user)} if at else data


def _kafkas(place: str, where: str) -> Data:
    return _kafka(place, where) | {"tls": {}}


def _mqtts(place: str, where: str) -> Data:
    return _mqtt_at(8883, place, where) | {"tls": {}}


def _authority(place: str, where: str) -> tuple[str, Data]:
    """`//authority/topic` as (authority, the topic's setting, if there is one)."""
    if not place.startswith("//"):
        raise ConfigError(f"{where}: no // after the colon, allowed: {FORMS}")
    authority, _, topic = place[2:].partition("/")
    return authority, {"topic": unquote(topic)} if topic else {}


def _address(text: str, default_port: int, where: str) -> tuple[str, int]:
    address = split_host_port(text, default_port)
    if address is None:
        raise ConfigError(f"{where}: found {quoted(text)}, allowed: {HOST_PORT}")
    return address


def _queries(query: str, where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        key = unquote(name)
        if key.rpartition(".")[2] in ("password", "key_password", "passwd", "secret"):
            raise ConfigError(f"{where}: {NO_PASSWORD}")
        if key in found:
            raise ConfigError(f"{where}: {quoted(key)} is there twice, allowed: once")
        found[key] = unquote(value)
    return found


def _put(data: Data, key: str, value: str, where: str) -> None:
    """Set `key`, also `tls.ca_file` inside its table, where the URL itself does not set it."""
    table, dot, name = key.rpartition(".")
    if table == "tls" and "tls" not in data:
        raise ConfigError(f"{where}: {quoted(key)} without TLS, allowed: kafkas:// or mqtts://")
    place = data.setdefault(table, {}) if dot else data
    if not isinstance(place, dict) or (name in place):
        raise ConfigError(f"{where}: {quoted(key)} is there twice, allowed: once")
    place[name] = value


_SCHEMES: Mapping[str, Callable[[str, str], Data]] = {
    "stdout": _stdout,
    "memory": _memory,
    "file": _file,
    "kafka": _kafka,
    "kafkas": _kafkas,
    "mqtt": _mqtt,
    "mqtts": _mqtts,
}
_LOCAL = frozenset({"stdout", "memory", "file"})
