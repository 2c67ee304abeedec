"""Certificates, keys and passwords that only root can read, with real brokers that ask for them."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.brokers import KafkaBroker, MosquittoBroker, free_port, subscribed
from tests.kernel.agent import Agent
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.system import open_missing

pytestmark = [pytest.mark.kernel, pytest.mark.kafka, pytest.mark.mqtt]

TOPIC = "kernel-events"
USER, PASSWORD, KEY_PASSWORD = "writer", "correct-horse-battery", "staple"
OPENS = 50


def open_some(prefix: str) -> None:
    open_missing(prefix, OPENS)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of root's: certificates and keys, and passwords, one of the client's key."""
    directory = tmp_path_factory.mktemp("secrets")

    def openssl(*arguments: str) -> None:
        subprocess.run(("openssl", *arguments), cwd=directory, check=True, capture_output=True)

    ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    ca = ["-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem"]
    openssl("req", "-x509", "-nodes", "-days", "2", *ca, *ec)
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1")
    for name, protect in (("server", ["-nodes"]), ("client", ["-passout", f"pass:{KEY_PASSWORD}"])):
        request = f"req -subj /CN={name} -keyout {name}.key -out {name}.csr".split()
        openssl(*request, *ec, *protect)
        sign = f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
        openssl(*sign.split(), *f"-extfile names -out {name}.crt".split())
    parts = [(directory / f"server.{end}").read_text() for end in ("key", "crt")]
    (directory / "server.pem").write_text("".join(parts))
    (directory / "password").write_text(PASSWORD + "\n")
    (directory / "key-password").write_text(KEY_PASSWORD + "\n")
    for path in directory.iterdir():
        path.chmod(0o600)
    directory.chmod(0o700)
    return directory


def kafka(directory: Path, secrets: Path) -> KafkaBroker:
    """One that asks for a certificate and a password."""
    lines = (
        "ssl.keystore.type=PEM",
        f"ssl.keystore.location={secrets}/server.pem",
        "ssl.truststore.type=PEM",
        f"ssl.truststore.location={secrets}/ca.pem",
        "listener.name.safe.ssl.client.auth=required",
        "sasl.enabled.mechanisms=SCRAM-SHA-512",
        "listener.name.safe.scram-sha-512.sasl.jaas.config="
        "org.apache.kafka.common.security.scram.ScramLoginModule required;",
    )
    return KafkaBroker(directory, lines, {"SAFE": "SASL_SSL"}, scram_users={USER: PASSWORD})


def mosquitto(directory: Path, secrets: Path) -> tuple[MosquittoBroker, int]:
    """The same, and its port with TLS."""
    port, passwords = free_port(), directory / "passwords"
    directory.mkdir()
    command = ["mosquitto_passwd", "-b", "-c", str(passwords), USER, PASSWORD]
    subprocess.run(command, check=True, capture_output=True)
    lines = (
        f"listener {port} 127.0.0.1",
        f"cafile {secrets}/ca.pem",
        f"certfile {secrets}/server.crt",
        f"keyfile {secrets}/server.key",
        "require_certificate true",
        f"password_file {passwords}",
    )
    return MosquittoBroker(directory, lines, anonymous=False), port


def configuration(secrets: Path, kafka_address: str, mqtt_port: int, output: Path) -> str:
    tls = (
        f'ca_file = "{secrets}/ca.pem", cert_file = "{secrets}/client.crt", '
        f'key_file = "{secrets}/client.key", key_password_file = "{secrets}/key-password"'
    )
    return f"""
[[sinks]]
type = "kafka"
bootstrap = ["{kafka_address}"]
topic = "{TOPIC}"
tls = {{ {tls} }}
sasl = {{ username = "{USER}", password_file = "{secrets}/password" }}

[[sinks]]
type = "mqtt"
host = "127.0.0.1"
port = {mqtt_port}
topic = "{TOPIC}"
username = "{USER}"
password_file = "{secrets}/password"
tls = {{ {tls} }}

[[sinks]]
type = "file"
path = "{output}"
"""


def in_kafka(broker: KafkaBroker) -> list[bytes]:
    command = ["kcat", "-C", "-b", broker.address, "-t", TOPIC, "-o", "beginning", "-e", "-q"]
    return subprocess.run(command, capture_output=True, check=True).stdout.splitlines()


def await_lines(output: Path, count: int) -> None:
    deadline = time.monotonic() + seconds(60)
    while output.read_bytes().count(b'"event":"file.open"') < count:
        assert time.monotonic() < deadline, output.read_bytes()[-2000:]
        time.sleep(0.05)


def test_brokers_that_ask_for_secrets(
    scope: Scope, tmp_path: Path, secrets: Path, private_copy: tuple[str, ...]
) -> None:
    """By an agent whose code, too, only root can read; also when MQTT has to connect again."""
    broker, port = mosquitto(tmp_path / "mqtt", secrets)
    read_back = tmp_path / "mqtt.out"
    with kafka(tmp_path / "kafka", secrets) as stored, broker:
        output = tmp_path / "events.ndjson"
        config = configuration(secrets, stored.addresses["SAFE"], port, output)
        with Agent(
            tmp_path,
            *scope.options,
            config=config,
            events="file.open",
            sinks=None,
            output=output,
            program=private_copy,
        ) as agent:
            with subscribed(broker, TOPIC, read_back, "-u", USER, "-P", PASSWORD):
                scope.act(open_some, "/no/first-")
                await_lines(read_back, OPENS)
            broker.stop()
            scope.act(open_some, "/no/second-")
            broker.start()
            with subscribed(broker, TOPIC, read_back, "-u", USER, "-P", PASSWORD):
                scope.act(open_some, "/no/third-")
                await_lines(read_back, OPENS)
            recording = agent.stop(check=False)
        values = in_kafka(stored)
    assert values == agent.output.read_bytes().splitlines()
    assert len(recording.events) == 3 * OPENS
    for sink in recording.heartbeat.sink_counts.values():
        assert sink.dropped == 0
    assert "Traceback" not in recording.stderr
    assert "late import" not in recording.stderr
