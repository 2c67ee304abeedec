"""Values that have the right type and are impossible all the same.

Each rule yields its mistakes as lines without the source: `key: found …, allowed: …`.
"""

from __future__ import annotations

import ipaddress
import mmap
import os
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
    MetricsSection,
    MqttSink,
    Sasl,
    Settings,
    SheddingSection,
    StdoutSink,
    Tls,
)
from streamer.events.calls import ALL, NEVER_RETURN, NUMBERS
from streamer.events.kinds import KINDS

KAFKA_TOPIC = "letters, digits, '.', '_', '-' and the placeholder {category}"
MQTT_TOPIC = "a topic without '+', '#' and a leading '$'; placeholders: {category}, {host}"
HOST_PORT = 'HOST:PORT, such as "127.0.0.1:9092" or "[::1]:9092"'

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9.])?")
_LEVEL = re.compile(r"[A-Za-z0-9._-]+")  # as the setting `host`
_BRACES = re.compile(r"\{[^{}]*\}|[{}]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
# Names of tasks and files may hold anything but NUL, and so may their filters.
_OF_TASKS_AND_FILES = re.compile("comms|exes|path_prefixes")
_UNMATCHABLE = re.compile(r"[\x00\ud800-\udfff]")
_MIN_CRITICAL_BYTES = 1 << 16
_MAX_RING_BYTES = 1 << 30
_MOST_BYTES = {"comms": 15, "exes": 4095, "path_prefixes": 255}


def problems(settings: Settings) -> Iterator[str]:
    """Everything impossible in `settings`, in the order of the settings."""
    page = mmap.PAGESIZE
    for name, least in (("critical_bytes", _MIN_CRITICAL_BYTES), ("bulk_bytes", page)):
        size = getattr(settings.rings, name)
        if size & (size - 1) or size % page:
            wanted = f"a power of two from {max(least, page)} to {_MAX_RING_BYTES}"
            yield mistake(f"rings.{name}", size, wanted)
    for kind in settings.kernel.sample:
        if kind not in KINDS:
            yield mistake("kernel.sample", kind, ", ".join(sorted(KINDS)))
    yield from _shedding(settings.shedding)
    yield from _syscalls(settings.kernel.syscalls)
    yield from _filters(settings.filters)
    yield from _metrics(settings.metrics)
    for index, sink in enumerate(settings.sinks):
        yield from (f"sinks[{index}].{problem}" for problem in sink_problems(sink))
    yield from _same_destination(settings.sinks)
    if settings.workers > 1:
        yield from _workers(settings.sinks)


def _workers(sinks: tuple[AnySink, ...]) -> Iterator[str]:
    """What several processes cannot write to at once."""
    for index, sink in enumerate(sinks):
        if isinstance(sink, FileSink | StdoutSink):
            named = "file" if isinstance(sink, FileSink) else "stdout"
            yield mistake(f"sinks[{index}].type", named, '"kafka", "mqtt", with several workers')
        elif sink.spool != "off":
            yield mistake(f"sinks[{index}].spool", sink.spool, '"off", where workers is above 1')


def host_problems(settings: Settings, host: str) -> Iterator[str]:
    """What `settings` cannot do on a host of this name, which the kernel lets be anything."""
    for index, sink in enumerate(settings.sinks):
        if isinstance(sink, MqttSink) and "{host}" in sink.topic and not _LEVEL.fullmatch(host):
            found = f"found {{host}}, and this host is {quoted(host)}"
            yield f"sinks[{index}].topic: {found}, allowed: the setting host, or another topic"


def unprintable(value: Any, key: str = "") -> Iterator[str]:
    """Strings with control characters, or of bytes that are not UTF-8, anywhere in plain data."""
    if isinstance(value, str):
        forbidden = _UNMATCHABLE if _OF_TASKS_AND_FILES.search(key) else _CONTROL
        if forbidden.search(value):
            yield mistake(key, value, "UTF-8 without control characters")
        return
    array = isinstance(value, list | tuple)
    inner = enumerate(value) if array else value.items() if isinstance(value, Mapping) else ()
    for step, part in inner:
        yield from unprintable(part, join(key, step))


def sink_problems(sink: AnySink) -> Iterator[str]:
    """Everything impossible in one sink; keys are those of the sink."""
    if isinstance(sink, KafkaSink):
        yield from _kafka(sink)
    if isinstance(sink, MqttSink):
        yield from _mqtt(sink)
    if isinstance(sink, KafkaSink | MqttSink) and sink.tls is not None:
        yield from (f"tls.{problem}" for problem in _tls(sink.tls))


def split_host_port(text: str, default: int | None = None) -> tuple[str, int] | None:
    """`host:port` or `[v6]:port` as (host, port), the port optional where there is a default.

    None when `text` is neither.
    """
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]{1,5}))?", text)
    if match is None:
        return None
    host, port = match[1].strip("[]"), int(match[2] or default or 0)
    valid = is_host(host) and (":" in host) == match[1].startswith("[")
    return (host, port) if valid and 0 < port < 65536 else None


def is_host(text: str) -> bool:
    """Whether `text` is a host name, or an address without brackets."""
    if ":" not in text:
        return _HOST.fullmatch(text) is not None
    try:
        return bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


def listen_address(text: str) -> tuple[str, int] | None:
    """`metrics.listen` as (address, port); None when it is neither empty nor that."""
    found = split_host_port(text)
    try:
        return found and (str(ipaddress.ip_address(found[0])), found[1])
    except ValueError:
        return None


def _shedding(shedding: SheddingSection) -> Iterator[str]:
    """What is critical is never shed, and a higher level never sheds less."""
    bulk = sorted(kind for kind, info in KINDS.items() if info.ring == "bulk")
    for kind, rates in shedding.rates.items():
        if kind not in bulk:
            yield mistake("shedding.rates", kind, ", ".join(bulk))
        if list(rates) != sorted(rates):
            yield mistake(join("shedding.rates", kind), list(rates), "numbers that do not fall")
    for name in ("budget", "spool", "lag_seconds", "ring"):
        values = list(getattr(shedding, name))
        if values != sorted(set(values)):
            yield mistake(f"shedding.{name}", values, "three numbers that rise")


def _metrics(metrics: MetricsSection) -> Iterator[str]:
    if not metrics.listen:
        return
    found = listen_address(metrics.listen)
    if found is None:
        yield mistake("metrics.listen", metrics.listen, "ADDRESS:PORT, with a port from 1 to 65535")
    elif not (metrics.allow_remote or ipaddress.ip_address(found[0]).is_loopback):
        wanted = "an address of this host alone, or allow_remote = true"
        yield mistake("metrics.listen", metrics.listen, wanted)


def _syscalls(names: tuple[str, ...]) -> Iterator[str]:
    for index, name in enumerate(names):
        if name in NEVER_RETURN:
            yield mistake(join("kernel.syscalls", index), name, "a system call that returns")
        elif name != ALL and name not in NUMBERS:
            wanted = 'the name of a system call, or "*" for all'
            yield mistake(join("kernel.syscalls", index), name, wanted)


def _filters(filters: Filters) -> Iterator[str]:
    lists = msgspec.structs.asdict(filters)
    for name, values in lists.items():
        twin, limit = f"exclude_{name}", _MOST_BYTES.get(name.removeprefix("exclude_"), 0)
        for index, value in enumerate(values):
            key = join(f"filters.{name}", index)
            if value in lists.get(twin, ()):
                yield mistake(key, value, f"a value that filters.{twin} does not have too")
            if isinstance(value, str) and len(value.encode()) > limit:
                yield mistake(key, value, f"a string of at most {limit} bytes")


def _kafka(sink: KafkaSink) -> Iterator[str]:
    for index, address in enumerate(sink.bootstrap):
        if split_host_port(address) is None:
            yield mistake(join("bootstrap", index), address, HOST_PORT)
    yield from _kafka_topic(sink.topic)
    if sink.sasl is not None:
        yield from _sasl(sink.sasl)
        if sink.sasl.mechanism == "PLAIN" and sink.tls is None and not sink.sasl.allow_cleartext:
            wanted = "PLAIN with TLS, SCRAM-SHA-512, or allow_cleartext = true"
            yield mistake("sasl.mechanism", "PLAIN", wanted)


def _sasl(sasl: Sasl) -> Iterator[str]:
    yield from _one_secret("sasl.password", sasl.password_env, sasl.password_file)
    if not (sasl.password_env or sasl.password_file):
        yield "sasl.password_env: missing, allowed: it or password_file"


def _kafka_topic(topic: str) -> Iterator[str]:
    yield from _placeholders(topic, ("{category}",))
    rest = topic.replace("{category}", "c")  # no category is longer than its placeholder
    if not re.fullmatch("[A-Za-z0-9._-]*", rest):
        yield mistake("topic", topic, KAFKA_TOPIC)
    if rest in (".", ".."):
        yield mistake("topic", topic, 'at most 249 characters, and neither "." nor ".."')


def _mqtt(sink: MqttSink) -> Iterator[str]:
    if not is_host(sink.host):
        yield mistake("host", sink.host, "a host name or address, without a port")
    yield from _placeholders(sink.topic, ("{category}", "{host}"))
    if sink.topic.startswith("$") or "+" in sink.topic or "#" in sink.topic:
        yield mistake("topic", sink.topic, MQTT_TOPIC)
    yield from _one_secret("password", sink.password_env, sink.password_file)
    if (sink.password_env or sink.password_file) and sink.username is None:
        yield "username: missing, allowed: a string, as there is a password"


def _tls(tls: Tls) -> Iterator[str]:
    yield from _one_secret("key_password", tls.key_password_env, tls.key_password_file)
    for name in ("key_file", "key_password_env", "key_password_file"):
        if getattr(tls, name) is not None and tls.cert_file is None:
            yield f"cert_file: missing, allowed: a file, as there is {name}"


def _one_secret(what: str, env: str | None, file: str | None) -> Iterator[str]:
    if env and file:
        name = what.rpartition(".")[2]
        yield f"{what}_env: found together with {name}_file, allowed: one of them"


def _placeholders(topic: str, known: tuple[str, ...]) -> Iterator[str]:
    for found in _BRACES.findall(topic):
        if found not in known:
            yield f"topic: found {quoted(found)}, allowed: the placeholders {', '.join(known)}"


def _same_destination(sinks: tuple[AnySink, ...]) -> Iterator[str]:
    """Two sinks that would write over each other."""
    seen: dict[str, int] = {}
    for index, sink in enumerate(sinks):
        target = _target(sink)
        if target and (first := seen.setdefault(target, index)) != index:
            again = f"file {quoted(sink.path)}" if isinstance(sink, FileSink) else target
            yield f"sinks[{index}]: found {again} again, allowed: once (it is sinks[{first}])"


def _target(sink: AnySink) -> str:
    if isinstance(sink, FileSink):
        return os.path.abspath(sink.path)
    return "standard output" if isinstance(sink, StdoutSink) else _target_with_spool(sink)


def _target_with_spool(sink: KafkaSink | MqttSink) -> str:
    """What rows in the spool go by: with two such sinks one would take what is the other's."""
    if sink.spool == "off":
        return ""
    where = sink.bootstrap if isinstance(sink, KafkaSink) else (f"{sink.host}:{sink.port}",)
    kind, tls = ("kafka", "mqtt")[isinstance(sink, MqttSink)], "s" if sink.tls else ""
    return f"{kind}{tls}://{','.join(where)}/{sink.topic} with a spool"
