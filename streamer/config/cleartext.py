"""Passwords that a configuration has sent as they are, where others can read them on the way."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from streamer.config.rules import split_host_port
from streamer.config.settings import AnySink, KafkaSink, MqttSink, Sasl, Settings


def cleartext_passwords(settings: Settings) -> Iterator[str]:
    """Each in a sentence for people: the sink, and the broker that is not on this host.

    Passwords that are proved and not sent (SCRAM) are none of these. What the brokers of a Kafka
    call themselves is not known: those of the configuration stand for them.
    """
    for index, sink in enumerate(settings.sinks):
        away = [place for host, place in _password_goes_to(sink) if not _is_this_host(host)]
        if away:
            yield (
                f"sinks[{index}]: without TLS anybody on the way to {', '.join(away)} can read the "
                "password, and every event"
            )


def _password_goes_to(sink: AnySink) -> Iterator[tuple[str, str]]:
    """The host, and with its port, of each broker that is sent the password as it is."""
    if (
        isinstance(sink, MqttSink)
        and sink.tls is None
        and (sink.password_env or sink.password_file)
    ):
        host = f"[{sink.host}]" if ":" in sink.host else sink.host
        yield sink.host, f"{host}:{sink.port}"
    if isinstance(sink, KafkaSink) and sink.tls is None and _sends_password(sink.sasl):
        for place in sink.bootstrap:
            host, _ = split_host_port(place) or (place, 0)
            yield host, place


def _sends_password(sasl: Sasl | None) -> bool:
    return sasl is not None and sasl.mechanism == "PLAIN"


def _is_this_host(host: str) -> bool:
    """Whether it is its loopback interface, as its name or address alone says."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
