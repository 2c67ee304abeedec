"""Values that have the right type and are impossible all the same.

Each rule yields its mistakes as lines without the source: `key: found …, allowed: …`.
"""

from __future__ import annotations

import ipaddress
import mmap
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from streamer.config.messages import join, mistake, quoted
from streamer.config.settings import (
    AnySink,
    FileSink,
    Filters,
    KafkaSink,
    Kernel,
    MqttSink,
    Rings,
    Sasl,
    Settings,
    StdoutSink,
    Tls,
)
from streamer.events.kinds import KINDS

LONGEST_CATEGORY = "process"
"""What `{category}` takes most room with."""

KAFKA_TOPIC = "letters, digits, '.', '_', '-' and the placeholder {category}"
MQTT_TOPIC = "a topic without '+', '#' and a leading '$'; placeholders: {category}, {host}"
HOST_PORT = 'HOST:PORT, such as "127.0.0.1:9092" or "[::1]:9092"'

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9.])?")
_KAFKA_TOPIC = re.compile(r"[A-Za-z0-9._-]*")
_BRACES = re.compile(r"\{[^{}]*\}|[{}]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_UNMATCHABLE = re.compile(r"[\x00\ud800-\udfff]")
_MAX_RING_BYTES = 1 << 30


def problems(settings: Settings) -> Iterator[str]:
    """Everything impossible in `settings`, in the order of the settings."""
    yield from _control_characters("", msgspec.to_builtins(settings))
    yield from _rings(settings.rings)
    yield from _kernel(settings.kernel)
    yield from _filters(settings.filters)
    for index, sink in enumerate(settings.sinks):
        yield from sink_problems(sink, join("sinks", index) + ".")
    yield from _same_destination(settings.sinks)


def sink_problems(sink: AnySink, prefix: str = "") -> Iterator[str]:
    """Everything impossible in one sink; `prefix` begins its keys, such as `sinks[0].`."""
    yield from _control_characters(prefix, msgspec.to_builtins(sink))
    if isinstance(sink, KafkaSink):
        yield from _kafka(sink, prefix)
    if isinstance(sink, MqttSink):
        yield from _mqtt(sink, prefix)
    if isinstance(sink, KafkaSink | MqttSink) and sink.tls is not None:
        yield from _tls(sink.tls, prefix + "tls.")


def split_host_port(text: str, default: int | None = None) -> tuple[str, int] | None:
    """`host:port` or `[v6]:port` as (host, port), the port optional where there is a default.

    None when `text` is neither.
    """
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]{1,5}))?", text)
    if match is None or (match[2] is None and default is None):
        return None
    host, port = match[1], int(match[2]) if match[2] is not None else default or 0
    bracketed = host.startswith("[")
    valid = is_host(host.strip("[]")) and (":" in host) == bracketed
    return (host.strip("[]"), port) if valid and 0 < port < 65536 else None


def is_host(text: str) -> bool:
    """Whether `text` is a host name, or an address without brackets."""
    if ":" not in text:
        return _HOST.fullmatch(text) is not None
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


_NAMES_OF_TASKS_AND_FILES = ("comms", "exes", "path_prefixes")


def _control_characters(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _control_characters(f"{key}{name}" if _ends(key) else join(key, name), part)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _control_characters(join(key, index), part)
    elif isinstance(value, str) and _forbidden(key).search(value):
        yield mistake(key, value, "UTF-8 without control characters")


def _forbidden(key: str) -> re.Pattern[str]:
    """Names of tasks and files may hold anything but NUL, and so may their filters."""
    return _UNMATCHABLE if any(name in key for name in _NAMES_OF_TASKS_AND_FILES) else _CONTROL


def _ends(key: str) -> bool:
    return not key or key.endswith(".")


def _rings(rings: Rings) -> Iterator[str]:
    page = mmap.PAGESIZE
    for name in ("critical_bytes", "bulk_bytes"):
        size = getattr(rings, name)
        if size & (size - 1) or size % page:
            wanted = f"a power of two from {page} to {_MAX_RING_BYTES}"
            yield mistake(f"rings.{name}", size, wanted)


def _kernel(kernel: Kernel) -> Iterator[str]:
    for kind in kernel.sample:
        if kind not in KINDS:
            yield mistake("kernel.sample", kind, ", ".join(sorted(KINDS)))


def _filters(filters: Filters) -> Iterator[str]:
    for name, values in msgspec.structs.asdict(filters).items():
        twin = f"exclude_{name}"
        excluded = getattr(filters, twin, ())
        for index, value in enumerate(values):
            key = join(f"filters.{name}", index)
            if value in excluded:
                yield mistake(key, value, f"a value that filters.{twin} does not have too")
            if isinstance(value, str) and len(value.encode()) > (limit := _bytes_of(name)):
                yield mistake(key, value, f"a string of at most {limit} bytes")


def _bytes_of(name: str) -> int:
    if name.endswith("exes"):
        return 4095
    return 15 if name.endswith("comms") else 255


def _kafka(sink: KafkaSink, prefix: str) -> Iterator[str]:
    for index, address in enumerate(sink.bootstrap):
        if split_host_port(address) is None:
            yield mistake(join(f"{prefix}bootstrap", index), address, HOST_PORT)
    yield from _kafka_topic(sink.topic, f"{prefix}topic")
    if sink.sasl is not None:
        yield from _sasl(sink.sasl, f"{prefix}sasl.")


def _kafka_topic(topic: str, key: str) -> Iterator[str]:
    yield from _placeholders(topic, key, ("{category}",))
    longest = topic.replace("{category}", LONGEST_CATEGORY)
    if not _BRACES.search(longest) and not _KAFKA_TOPIC.fullmatch(longest):
        yield mistake(key, topic, KAFKA_TOPIC)
    if longest in (".", "..") or len(longest) > 249:
        yield mistake(key, topic, 'at most 249 characters, and neither "." nor ".."')


def _mqtt(sink: MqttSink, prefix: str) -> Iterator[str]:
    if not is_host(sink.host):
        yield mistake(f"{prefix}host", sink.host, "a host name or address, without a port")
    yield from _placeholders(sink.topic, f"{prefix}topic", ("{category}", "{host}"))
    if sink.topic.startswith("$") or "+" in sink.topic or "#" in sink.topic:
        yield mistake(f"{prefix}topic", sink.topic, MQTT_TOPIC)
    secret = sink.password_env or sink.password_file
    yield from _one_secret(f"{prefix}password", sink.password_env, sink.password_file)
    if secret and sink.username is None:
        yield f"{prefix}username: missing, allowed: a string, as there is a password"


def _sasl(sasl: Sasl, prefix: str) -> Iterator[str]:
    yield from _one_secret(f"{prefix}password", sasl.password_env, sasl.password_file)
    if not (sasl.password_env or sasl.password_file):
        yield f"{prefix}password_env: missing, allowed: it or password_file"


def _tls(tls: Tls, prefix: str) -> Iterator[str]:
    yield from _one_secret(f"{prefix}key_password", tls.key_password_env, tls.key_password_file)
    key_settings = ("key_file", "key_password_env", "key_password_file")
    for name in key_settings:
        if getattr(tls, name) is not None and tls.cert_file is None:
            yield f"{prefix}cert_file: missing, allowed: a file, as there is {name}"


def _one_secret(what: str, env: str | None, file: str | None) -> Iterator[str]:
    if env and file:
        name = what.rpartition(".")[2]
        yield f"{what}_env: found together with {name}_file, allowed: one of them"


def _placeholders(topic: str, key: str, known: tuple[str, ...]) -> Iterator[str]:
    for found in _BRACES.findall(topic):
        if found not in known:
            yield f"{key}: found {quoted(found)}, allowed: the placeholders {', '.join(known)}"


def _same_destination(sinks: tuple[AnySink, ...]) -> Iterator[str]:
    """Two sinks that would write over each other."""
    seen: dict[str, int] = {}
    for index, sink in enumerate(sinks):
        if not isinstance(sink, StdoutSink | FileSink):
            continue
        target = "standard output" if isinstance(sink, StdoutSink) else f"file {quoted(sink.path)}"
        if target in seen:
            first = f"sinks[{seen[target]}]"
            yield f"sinks[{index}]: found {target} again, allowed: once (it is {first})"
        seen.setdefault(target, index)
