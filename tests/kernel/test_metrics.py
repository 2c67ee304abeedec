"""Metrics of a running agent, as a real Prometheus reads them; and who asks without end."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import free_port
from tests.conftest import SET_UP, Require
from tests.kernel.agent import Agent
from tests.kernel.pace import repetitions, seconds
from tests.kernel.scope import Scope
from tests.kernel.system import many_descriptors
from tests.prometheus import Prometheus

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "streamer.rules.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "streamer.json"
EXECS = 150


def run_programs(count: int) -> None:
    for _ in range(count):
        subprocess.run(["/bin/true"], check=True)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def have_prometheus(require: Require) -> None:
    found = shutil.which("prometheus") and shutil.which("promtool")
    require(found, f"no prometheus: {SET_UP}")


def metrics_at(port: int, more: str = "") -> str:
    return (
        f'heartbeat_seconds = 1\ngrace_seconds = 8\n[metrics]\nlisten = "127.0.0.1:{port}"\n{more}'
    )


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression of the alert rules and the dashboard, with where it is from."""
    text = RULES.read_text()
    yield from re.findall(r"- alert: (\w+)\n +expr: (.+)", text)
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def as_grafana_asks(expression: str) -> str:
    return expression.replace("$__rate_interval", "30s").replace("$instance", ".*")


@pytest.mark.usefixtures("have_prometheus")
def test_promtool_takes_the_rules() -> None:
    assert len(list(expressions())) > 30
    for what, file in (("rules", RULES), ("config", RULES.with_name("scrape.yml"))):
        subprocess.run(["promtool", "check", what, str(file)], check=True, capture_output=True)


RISES = "0+5x60"
BAD = {
    "StreamerDown": {"up": "0x60"},
    "StreamerRestarts": {"streamer_uptime_seconds": "9 1 " * 8 + "1x44"},
    "StreamerNotReady": {"streamer_ready": "0x60"},
    "StreamerLosesCriticalEvents": {
        'streamer_lost_events_total{stage="sink",sink="a",kind="process.exec"': RISES
    },
    "StreamerLosesEvents": {
        'streamer_lost_events_total{stage="sink",sink="a",kind="file.open"': RISES
    },
    "StreamerRingFills": {'streamer_ring_used_bytes{ring="bulk"': "1000000000x60"},
    "StreamerSinkDown": {'streamer_sink_status{sink="SINK",status="up"': "0x60"},
    "StreamerSinkFull": {'streamer_sink_held_bytes{sink="SINK"': "1000000000x60"},
    "StreamerSpoolFills": {'streamer_sink_spool_filled_ratio{sink="SINK"': "0.9x60"},
    "StreamerSinkLags": {'streamer_sink_lag_seconds{sink="SINK"': "31x60"},
    "StreamerSheds": {"streamer_pressure_level": "1x60"},
    "StreamerKindMissing": {'streamer_coverage{kind="process.exec",status="missing"': "1x60"},
    "StreamerSkipsRuns": {'streamer_skipped_runs_total{program="on_exec"': RISES},
    "StreamerTableFills": {'streamer_table_used{table="flows"': "1000000000x60"},
    "StreamerFaults": {'streamer_faults_total{fault="unreadable"': RISES},
    "StreamerAccountBroken": {
        'streamer_events_total{kind="process.exec",outcome="read"': "1000000000x60"
    },
}
"""What makes each alert fire, in the place of what the agent said: a series, and its values."""
NEW = ("streamer_lost_events_total", "streamer_skipped_runs_total", "streamer_faults_total")
"""Series that a healthy agent may not have."""
FORGED = {
    f'streamer_faults_total{{fault="{fault}"': RISES
    for fault in ("dns_malformed", "packet_malformed")
}
"""What anybody makes with a packet."""


@pytest.mark.usefixtures("have_prometheus")
def test_each_alert_has_what_makes_it_fire(scope: Scope, tmp_path: Path, port: int) -> None:
    """With the series of a real agent, which alone let none of them fire, nor do forged packets."""
    config = metrics_at(port, "\n[kernel]\nflows = 1000\n")
    options = (*scope.options, "--interface", "lo")
    with Agent(tmp_path, *options, events="process.*,net.flow", config=config) as agent:
        scope.act(run_programs, 3)
        agent.wait_for(b'{"event":"process.exit"', 3)
        page = get(port, "/metrics")[1]
        agent.stop(check=False)
    base = {"up": "1x60"} | {
        series.rstrip("}"): f"{value}x60"
        for series, value in re.findall(r"^(streamer_\S+|streamer_\S+\{.*\}) (\S+)$", page, re.M)
    }
    assert set(BAD) == {what for what, _ in expressions() if what.startswith("Streamer")}
    tests = [alert_test(base, ""), alert_test(base | FORGED, "")]
    for alert, bad in BAD.items():
        found = {series.replace("SINK", f"file:{agent.output}"): bad[series] for series in bad}
        for series in found:
            assert series in base or series.startswith(NEW), series
        tests.append(alert_test(base | found, alert))
    written = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "alerts.json").write_text(json.dumps(written))
    command = ["promtool", "test", "rules", str(tmp_path / "alerts.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def alert_test(series: dict[str, str], fires: str) -> dict[str, Any]:
    """Whether that alert fires half an hour later, and no other."""
    more = 'instance="here",job="streamer"}'
    fire = {
        "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": "30m",
        "exp_samples": [{"labels": f'{{alertname="{fires}"}}', "value": 1}] if fires else [],
    }
    return {
        "interval": "1m",
        "name": fires or "none",
        "input_series": [
            {"series": f"{name},{more}" if "{" in name else f"{name}{{{more}", "values": values}
            for name, values in series.items()
        ],
        "promql_expr_test": [fire],
    }


@pytest.mark.usefixtures("have_prometheus")
def test_prometheus_has_the_final_account(scope: Scope, tmp_path: Path, port: int) -> None:
    """One sink is dead, so that the grace period, in which all counts are final, is waited for.

    Every number that Prometheus has last is that of the last heartbeat; every expression that is
    delivered with the agent finds what it asks for.
    """
    dead = f"kafka://127.0.0.1:{free_port()}/kernel-events"
    config = metrics_at(port, "\n[kernel]\nflows = 1000\n")
    config = config.replace("grace_seconds = 8", "grace_seconds = 16")
    options = (*scope.options, "--interface", "lo")
    with ExitStack() as stack:
        agent = Agent(tmp_path, *options, events="process.*,net.flow", config=config, sinks=(dead,))
        stack.enter_context(agent)
        prometheus = Prometheus(tmp_path / "prometheus", f"127.0.0.1:{port}", RULES)
        stack.enter_context(prometheus)
        scope.act(run_programs, EXECS)
        prometheus.wait_for(
            f'streamer_events_total{{kind="process.exec",outcome="read"}} >= {EXECS}'
        )
        check_expressions(prometheus)
        code, why = get(port, "/readyz")
        assert code == 503
        assert re.fullmatch(f"{re.escape(dead)} is (starting|down: .*refused)\n", why)
        assert get(port, "/healthz") == (200, "ok\n")
        recording = agent.stop(check=False, code=5)
        values = Values(prometheus)
    last = recording.heartbeat
    assert last.counts["process.exec"].read == EXECS
    for kind, counts in last.counts.items():
        assert values["produced_events", kind] == counts.produced
        for outcome in ("filtered", "shed", "lost", "read"):
            assert values["events", kind, outcome] == getattr(counts, outcome), (kind, outcome)
    for mark in last.marks:
        assert values["ring_sequence", str(mark.cpu), mark.ring] == mark.seq
        assert values["ring_sequence_read", str(mark.cpu), mark.ring] == mark.read
    assert values.of("faults") == {(k,): n for k, n in last.faults.items()}
    assert values.of("skipped_runs") == {(k,): n for k, n in last.missed.items()}
    read = {kind: one.read for kind, one in last.counts.items() if one.read}
    written, given_up = f"file:{agent.output}", dead
    assert last.sink_counts.keys() == {written, given_up}
    assert without_own(values.of_sink("delivered", written)) == read
    assert without_own(values.of_sink("dropped", given_up)) == read
    assert not any(values.of_sink("dropped", written).values())
    for sink in (written, given_up):
        assert without_own(values.of_sink("received", sink)) == read
    assert +values.lost("sink", given_up) == read
    assert not +values.lost("sink", written)
    assert sum(values.of_sink("delivered", written).values()) == len(recording.all)
    assert values["sink_delivered_bytes", written] == agent.output.stat().st_size


def without_own(kinds: dict[str, float]) -> dict[str, float]:
    """Without the records of the stream itself."""
    return {kind: n for kind, n in kinds.items() if not kind.startswith("stream.") and n}


class Values:
    """What Prometheus scraped last: by name and the values of the labels, in the order of these."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._found: dict[str, dict[tuple[str, ...], float]] = {}
        self._lost = prometheus.last("streamer_lost_events_total")
        for name in (
            *("produced_events", "events", "ring_sequence", "ring_sequence_read"),
            *("faults", "skipped_runs", "sink_received_events", "sink_delivered_events"),
            *("sink_dropped_events", "sink_delivered_bytes"),
        ):
            self._found[name] = {
                tuple(labels[key] for key in sorted(labels)): value
                for labels, value in prometheus.last(f"streamer_{name}_total")
            }

    def of(self, name: str) -> dict[tuple[str, ...], float]:
        return self._found[name]

    def of_sink(self, what: str, sink: str) -> dict[str, float]:
        """By kind."""
        found = self._found[f"sink_{what}_events"].items()
        return {kind: value for (kind, name), value in found if name == sink}

    def lost(self, stage: str, sink: str) -> Counter[str]:
        """By kind. Prometheus has no empty labels."""
        found = Counter[str]()
        for labels, value in self._lost:
            if (labels["stage"], labels.get("sink", "")) == (stage, sink):
                found[labels.get("kind", "")] = int(value)
        return found

    def __getitem__(self, place: tuple[str, ...]) -> float:
        name, *labels = place
        return self._found[name][tuple(labels)]


def check_expressions(prometheus: Prometheus) -> None:
    """Prometheus takes every expression, and has every metric that one names."""
    have = set(prometheus.names())
    for where, expression in expressions():
        asked = as_grafana_asks(expression)
        prometheus.query(asked)
        for name in re.findall(r"\b((?:streamer|process)_\w+)\b", asked):
            assert name in have | {"streamer_faults_total", "streamer_skipped_runs_total"}, where
        if where in ("Ready", "Read", "Fullest ring", "Events by kind", "Sink latency", "Tables"):
            assert prometheus.wait_for(asked), where
    # The dead sink is what the alerts see.
    found = prometheus.wait_for(dict(expressions())["StreamerSinkDown"])
    assert [labels["sink"].partition(":")[0] for labels, _ in found] == ["kafka"]
    assert prometheus.query(dict(expressions())["StreamerNotReady"])
    assert not prometheus.query(dict(expressions())["StreamerAccountBroken"])
    health = prometheus.rules()
    assert set(health) == {name for name, _ in expressions() if name in health}
    assert len(health) >= 14
    deadline = time.monotonic() + 10
    while set(prometheus.rules().values()) != {"ok"}:
        assert time.monotonic() < deadline, prometheus.rules()
        time.sleep(0.2)


# ---------------------------------------------------------------- who asks without end


def allocated(pid: int) -> int:
    """Bytes, without files and rings: what of those was touched is no client's doing."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)[0]) << 10


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def connect(port: int) -> socket.socket:
    made = socket.socket()
    made.setblocking(False)
    with suppress(BlockingIOError):
        made.connect(("127.0.0.1", port))
    return made


HOSTILE = (b"G", b"GET /metrics HTTP/1.1\r\nX: ", b"A" * 65536)


def let_go(peer: socket.socket) -> bool:
    """Whether the agent has answered or ended the connection; else it waits, or is open."""
    try:
        peer.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def scrape_until(port: int, end: float) -> int:
    """How often it was answered."""
    answered = 0
    while time.monotonic() < end:
        with suppress(OSError):
            answered += get(port, "/metrics")[0] == 200
        time.sleep(0.1)
    return answered


def test_hostile_clients_cost_a_bounded_part(scope: Scope, tmp_path: Path, port: int) -> None:
    """Thousands of connections that send nothing, dribble, or send without end.

    Every event is delivered meanwhile, and who asks in order is answered.
    """
    with Agent(tmp_path, *scope.options, events="process.*", config=metrics_at(port)) as agent:
        get(port, "/metrics")
        memory, open_before = allocated(agent.pid), descriptors(agent.pid)
        begun = time.monotonic()
        peers: list[socket.socket] = []
        most_open = 0
        end = begun + seconds(5)
        with many_descriptors():
            with ThreadPoolExecutor(1) as scraper, scope.start(run_programs, EXECS):
                answered = scraper.submit(scrape_until, port, end)
                while time.monotonic() < end:
                    peers += [connect(port) for _ in range(repetitions(40, 4))]
                    for number, peer in enumerate(peers[-400:]):
                        with suppress(OSError):
                            peer.send(HOSTILE[number % len(HOSTILE)])
                    most_open = max(most_open, descriptors(agent.pid))
                    time.sleep(0.05)
            taken = sum(map(let_go, peers))
            elapsed = time.monotonic() - begun
            for peer in peers:
                peer.close()
        assert len(peers) > 1000
        assert 0 < taken <= 400 * elapsed + 8  # a second, in bursts of 8
        # One more has just been taken when the oldest is closed for it.
        assert most_open - open_before <= 16 + 1
        assert allocated(agent.pid) - memory < 4 << 20
        assert answered.result()
        time.sleep(0.2)
        assert get(port, "/healthz") == (200, "ok\n")
        recording = agent.stop()
    assert len(recording.of("process.exec")) == EXECS


def test_an_address_of_others_is_refused_or_warned_about(tmp_path: Path, port: int) -> None:
    config = f'state_file = ""\n[metrics]\nlisten = "0.0.0.0:{port}"\n'
    (tmp_path / "x.toml").write_text(config)
    command = ["streamer", "run", "-c", str(tmp_path / "x.toml"), "--duration", "1s"]
    command += ["--sink", f"file:{tmp_path}/out", "--events", "process.exec"]
    refused = run(command)
    assert refused.returncode == 2
    assert "allowed: an address of this host alone, or allow_remote = true" in refused.stderr
    (tmp_path / "x.toml").write_text(config + "allow_remote = true\n")
    warned = run(command)
    assert warned.returncode == 0
    assert f"metrics are at 0.0.0.0:{port}, where other hosts can read them" in warned.stderr


def test_an_address_that_is_taken_ends_the_start(tmp_path: Path, port: int) -> None:
    (tmp_path / "x.toml").write_text(metrics_at(port))
    with socket.create_server(("127.0.0.1", port)):
        found = run(["streamer", "run", "-c", str(tmp_path / "x.toml"), "--duration", "1s"])
    assert found.returncode == 2
    assert f"metrics.listen: 127.0.0.1:{port} cannot be had: Address already in use" in found.stderr


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
        timeout=60,
        **options,
    )
