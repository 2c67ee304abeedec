"""`make brokers`: what is said when its ports are somebody else's."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.kafka, pytest.mark.mqtt]

ROOT = Path(__file__).resolve().parents[2]
KAFKA_PORT = 19092


def brokers(cache: Path, what: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "tools" / "brokers.sh", what],
        env={**os.environ, "STREAMER_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_port_that_is_taken_is_named_and_nothing_is_started(tmp_path: Path) -> None:
    (tmp_path / "kafka").mkdir()
    shutil.copy(ROOT / "tools" / "kafka-pom.xml", tmp_path / "kafka" / "pom.xml")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # or by brokers that are there already
            other.bind(("127.0.0.1", KAFKA_PORT))
            other.listen()
        ran = brokers(tmp_path, "start")
    assert ran.returncode == 1
    assert ran.stderr == (
        f"brokers: Kafka cannot be started: another program has port {KAFKA_PORT} of 127.0.0.1\n"
    )
    assert not list((tmp_path / "brokers").glob("*.pid"))


def test_brokers_that_died_are_said_to_and_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "brokers").mkdir()
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    for name in ("kafka", "mosquitto"):
        (tmp_path / "brokers" / f"{name}.pid").write_text(f"{gone.pid}\n")
    status = brokers(tmp_path, "status")
    assert (status.returncode, status.stderr) == (1, "")
    assert status.stdout == "brokers: kafka does not run\nbrokers: mosquitto does not run\n"
    stopped = brokers(tmp_path, "stop")
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (0, "", "")
