"""Passwords that anybody on the way to a broker could read are said, and no others."""

from __future__ import annotations

import pytest

from streamer.config.cleartext import cleartext_passwords
from streamer.config.settings import AnySink, FileSink, KafkaSink, MqttSink, Sasl, Settings, Tls

PLAIN = Sasl(mechanism="PLAIN", username="u", password_env="P", allow_cleartext=True)
SCRAM = Sasl(username="u", password_env="P")


def mqtt(host: str) -> MqttSink:
    return MqttSink(host=host, username="u", password_env="P")


def kafka(*bootstrap: str, sasl: Sasl | None = PLAIN) -> KafkaSink:
    return KafkaSink(bootstrap=bootstrap, sasl=sasl)


@pytest.mark.parametrize(
    ("sink", "where"),
    [
        (mqtt("broker.example"), "broker.example:1883"),
        (MqttSink(host="192.0.2.7", username="u", password_file="/p"), "192.0.2.7:1883"),
        (mqtt("2001:db8::7"), "[2001:db8::7]:1883"),
        (mqtt("localhost.example"), "localhost.example:1883"),
        (mqtt("127.0.0.1.example"), "127.0.0.1.example:1883"),
        (mqtt("0.0.0.0"), "0.0.0.0:1883"),
        (kafka("k1:9092", "localhost:9092", "k2:9093"), "k1:9092, k2:9093"),
        (kafka("[2001:db8::7]:9092"), "[2001:db8::7]:9092"),
    ],
)
def test_what_can_be_read_on_the_way(sink: AnySink, where: str) -> None:
    said = f"sinks[1]: without TLS anybody on the way to {where} can read the password, and "
    found = cleartext_passwords(Settings(sinks=(FileSink(path="/f"), sink)))
    assert list(found) == [said + "every event"]


@pytest.mark.parametrize(
    "sink",
    [
        *map(mqtt, ("localhost", "LOCALHOST.", "mqtt.localhost", "127.0.0.1", "127.9.8.7", "::1")),
        mqtt("::ffff:127.0.0.1"),
        MqttSink(host="broker.example"),
        MqttSink(host="broker.example", username="u"),
        MqttSink(host="broker.example", username="u", password_env="P", tls=Tls()),
        kafka("localhost:9092", "127.0.0.1:9092", "[::1]:9092"),
        kafka("k1:9092", sasl=None),
        kafka("k1:9092", sasl=SCRAM),
        KafkaSink(bootstrap=("k1:9092",), sasl=PLAIN, tls=Tls()),
    ],
)
def test_what_cannot(sink: AnySink) -> None:
    assert list(cleartext_passwords(Settings(sinks=(sink,)))) == []
