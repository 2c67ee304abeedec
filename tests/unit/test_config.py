"""The configuration: every mistake is one exact line, and the command line wins over the file."""

from __future__ import annotations

import json
import mmap
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from msgspec import inspect

from streamer.config import messages, reference
from streamer.config.loading import Overrides, load
from streamer.config.rules import host_problems
from streamer.config.selection import DEFAULT_EVENTS, select
from streamer.config.settings import (
    FileSink,
    Filters,
    KafkaSink,
    MqttSink,
    Rings,
    Sasl,
    Settings,
    StdoutSink,
    Tls,
    with_budgets,
)
from streamer.config.sink_url import parse_sink
from streamer.errors import ConfigError
from streamer.events import kinds as events

KINDS = ("process.exec", "process.fork", "process.exit", "file.open", "net.connect", "net.close")
BULK = sorted(kind for kind, info in events.KINDS.items() if info.ring == "bulk")
ROOT_KEYS = (
    "btf, control, events, filters, grace_seconds, heartbeat_seconds, host, kernel, "
    "log_level, metrics, nice, oom_score_adj, rfc3339_time, rings, shedding, sinks, spool, "
    "state_file, summary_seconds, timing, user, workers"
)
SINKS = '"stdout", "file", "kafka", "mqtt"'
PAGE = mmap.PAGESIZE
KAFKA = '[[sinks]]\ntype = "kafka"\nbootstrap = ["b:9092"]\n'
MQTT = '[[sinks]]\ntype = "mqtt"\nhost = "b"\n'

MISTAKES = [
    # wrong type
    (
        'rings.bulk_bytes = "big"',
        'rings.bulk_bytes: found "big" (string), allowed: an integer from 4096 to 1073741824',
    ),
    (
        "rings.bulk_bytes = 4096.0",
        "rings.bulk_bytes: found 4096.0 (float), allowed: an integer from 4096 to 1073741824",
    ),
    (
        "rings.drain_records = true",
        "rings.drain_records: found true (boolean), allowed: an integer from 1 to 65536",
    ),
    ("rings = 3", "rings: found 3 (integer), allowed: a table"),
    (
        MQTT + "tls.verify_hostname = 1",
        "sinks[0].tls.verify_hostname: found 1 (integer), allowed: true or false",
    ),
    ('events = "x"', 'events: found "x" (string), allowed: an array (each: a non-empty string)'),
    ("btf = []", "btf: found an empty array, allowed: a non-empty string"),
    (
        "host = 2020-01-01",
        "host: found 2020-01-01 (date or time), "
        "allowed: a name of letters, digits, '.', '_' and '-'",
    ),
    ("sinks = [3]", f"sinks[0]: found 3 (integer), allowed: a table with type = {SINKS}"),
    (
        "sinks = {}",
        f"sinks: found a table, allowed: an array (each: a table with type = {SINKS})",
    ),
    (MQTT + "tls = 1", "sinks[0].tls: found 1 (integer), allowed: a table"),
    # unknown and missing keys
    (
        "rings.bulk_byte = 1",
        "rings.bulk_byte: unknown key (did you mean bulk_bytes?), "
        "allowed: bulk_bytes, bulk_rings, critical_bytes, drain_records, poll_interval_ms, "
        "transport",
    ),
    ("zzz = 1", f"zzz: unknown key, allowed: {ROOT_KEYS}"),
    (f"{'k' * 100_000} = 1", f'"{"k" * 57}...": unknown key, allowed: {ROOT_KEYS}'),
    ('"a\\nb" = 1', f'"a\\nb": unknown key, allowed: {ROOT_KEYS}'),
    ("[[sinks]]\ncolor = 1", f"sinks[0].type: missing, allowed: {SINKS}"),
    ('[[sinks]]\ntype = "file"', "sinks[0].path: missing, allowed: a non-empty string"),
    (
        '[[sinks]]\ntype = "stdout"\nhost = "h"',
        "sinks[0].host: unknown key, allowed: budget_bytes, color, encoding, on_full, type",
    ),
    (
        MQTT + "tls.ca_fil = 1",
        "sinks[0].tls.ca_fil: unknown key (did you mean ca_file?), allowed: "
        "ca_file, cert_file, key_file, key_password_env, key_password_file, verify_hostname",
    ),
    # out of range, or of another form
    (
        "filters.pids = [1, 0]",
        "filters.pids[1]: found 0 (integer), allowed: an integer from 1 to 4194304",
    ),
    (
        "filters.ports = [65536]",
        "filters.ports[0]: found 65536 (integer), allowed: an integer from 1 to 65535",
    ),
    (
        'filters.comms = ["sixteen-letters!"]',
        'filters.comms[0]: found "sixteen-letters!" (string), '
        "allowed: a string of 1 to 15 characters",
    ),
    (
        'filters.comms = ["éééééééé"]',
        'filters.comms[0]: found "éééééééé" (string), allowed: a string of at most 15 bytes',
    ),
    (
        'filters.path_prefixes = ["etc"]',
        'filters.path_prefixes[0]: found "etc" (string), '
        "allowed: an absolute path of at most 255 bytes",
    ),
    (
        "heartbeat_seconds = 0",
        "heartbeat_seconds: found 0 (integer), allowed: a number from 1 to 3600",
    ),
    (
        "heartbeat_seconds = nan",
        "heartbeat_seconds: found nan (float), allowed: a number from 1 to 3600",
    ),
    (
        f"rings.bulk_bytes = 0x{'f' * 5000}",
        "rings.bulk_bytes: found a huge integer, allowed: an integer from 4096 to 1073741824",
    ),
    (
        'log_level = "loud"',
        'log_level: found "loud" (string), allowed: "debug", "error", "info", "warning"',
    ),
    ('format = "native"', f"format: unknown key, allowed: {ROOT_KEYS}"),
    (
        '[[sinks]]\ntype = "stdout"\nencoding = "xml"',
        'sinks[0].encoding: found "xml" (string), allowed: "json", "msgpack", "auto"',
    ),
    ('[[sinks]]\ntype = "kafak"', f'sinks[0].type: found "kafak" (string), allowed: {SINKS}'),
    ('[[sinks]]\ntype = ["file"]', f"sinks[0].type: found an array, allowed: {SINKS}"),
    ("[[sinks]]\ntype = 3", f"sinks[0].type: found 3 (integer), allowed: {SINKS}"),
    (
        '[[sinks]]\ntype = "kafka"\nbootstrap = []',
        "sinks[0].bootstrap: found an empty array, "
        "allowed: a non-empty array (each: a non-empty string)",
    ),
    (
        '[[sinks]]\ntype = "file"\npath = "x"\nmode = "640"',
        'sinks[0].mode: found "640" (string), allowed: an octal mode such as "0640"',
    ),
    (
        '[[sinks]]\ntype = "file"\npath = "x"\nmode = "0640\\n"',
        'sinks[0].mode: found "0640\\n" (string), allowed: UTF-8 without control characters',
    ),
    (
        f'host = "{"x" * 300}"',
        f'host: found "{"x" * 57}..." (string), '
        "allowed: a name of letters, digits, '.', '_' and '-'",
    ),
    (
        "kernel.connections = 1000",
        "kernel.connections: found 1000 (integer), allowed: an integer from 1024 to 4194304",
    ),
    (
        'shedding.rates = {"process.exec" = [2, 4, 8]}',
        f'shedding.rates: found "process.exec" (string), allowed: {", ".join(BULK)}',
    ),
    (
        'shedding.rates = {"file.open" = [4, 2, 8]}',
        'shedding.rates."file.open": found an array, allowed: numbers that do not fall',
    ),
    (
        'shedding.rates = {"file.open" = [4, 8]}',
        'shedding.rates."file.open": found an array, allowed: three integers from 1 to 1048576',
    ),
    (
        "shedding.budget = [0.5, 0.5, 0.9]",
        "shedding.budget: found an array, allowed: three numbers that rise",
    ),
    (
        "shedding.ring = [0.5, 0.7, 1.5]",
        "shedding.ring[2]: found 1.5 (float), allowed: a number above 0 and at most 1",
    ),
    (
        "kernel.sample = 10",
        "kernel.sample: found 10 (integer), allowed: a table (each: an integer from 1 to 1048576)",
    ),
    (
        'kernel.sample = {"net.close" = 5, "net.accept" = true}',
        'kernel.sample."net.accept": found true (boolean), allowed: an integer from 1 to 1048576',
    ),
    (
        'kernel.syscalls = ["fsync", "fsynk"]',
        'kernel.syscalls[1]: found "fsynk" (string), allowed: the name of a system call, or "*" '
        "for all",
    ),
    (
        'kernel.syscalls = ["exit_group"]',
        'kernel.syscalls[0]: found "exit_group" (string), allowed: a system call that returns',
    ),
    (
        'kernel.syscalls = ["Read"]',
        'kernel.syscalls[0]: found "Read" (string), allowed: the name of a system call, or "*" '
        "for all",
    ),
    (
        'kernel.sample = {"file.open" = 0}',
        'kernel.sample."file.open": found 0 (integer), allowed: an integer from 1 to 1048576',
    ),
    # impossible
    (
        'kernel.sample = {"file.opne" = 10}',
        f'kernel.sample: found "file.opne" (string), allowed: {", ".join(sorted(events.KINDS))}',
    ),
    (
        f"rings.bulk_bytes = {PAGE * 3}",
        f"rings.bulk_bytes: found {PAGE * 3} (integer), "
        f"allowed: a power of two from {PAGE} to 1073741824",
    ),
    (
        "rings.bulk_bytes = 5000",
        f"rings.bulk_bytes: found 5000 (integer), "
        f"allowed: a power of two from {PAGE} to 1073741824",
    ),
    (
        "rings.critical_bytes = 5000000",
        "rings.critical_bytes: found 5000000 (integer), "
        f"allowed: a power of two from {max(65536, PAGE)} to 1073741824",
    ),
    (
        "filters = {pids = [1, 2], exclude_pids = [2]}",
        "filters.pids[1]: found 2 (integer), "
        "allowed: a value that filters.exclude_pids does not have too",
    ),
    (
        KAFKA + 'topic = "a b"',
        'sinks[0].topic: found "a b" (string), '
        "allowed: letters, digits, '.', '_', '-' and the placeholder {category}",
    ),
    (
        KAFKA + 'topic = ".."',
        'sinks[0].topic: found ".." (string), '
        'allowed: at most 249 characters, and neither "." nor ".."',
    ),
    (
        KAFKA + f'topic = "{"t" * 240}{{category}}{{category}}"',
        'sinks[0].topic: found "' + "t" * 240 + '{category}{category}" (string), '
        "allowed: a string of 1 to 249 characters",
    ),
    (
        KAFKA + 'topic = "{host}"',
        'sinks[0].topic: found "{host}", allowed: the placeholders {category}',
    ),
    (
        MQTT + 'topic = "a/{hots}"',
        'sinks[0].topic: found "{hots}", allowed: the placeholders {category}, {host}',
    ),
    (
        MQTT + 'topic = "a/{host"',
        'sinks[0].topic: found "{", allowed: the placeholders {category}, {host}',
    ),
    *(
        (
            MQTT + f'topic = "{topic}"',
            f'sinks[0].topic: found "{topic}" (string), allowed: '
            "a topic without '+', '#' and a leading '$'; placeholders: {category}, {host}",
        )
        for topic in ("a/#", "a/+/b", "$SYS/x")
    ),
    *(
        (
            f'[[sinks]]\ntype = "kafka"\nbootstrap = ["b:1", "{address}"]',
            f'sinks[0].bootstrap[1]: found "{address}" (string), '
            'allowed: HOST:PORT, such as "127.0.0.1:9092" or "[::1]:9092"',
        )
        for address in ("b", "b:0", "b:65536", "::1:9092", "[b]:1", "kafka://b:1", ":1", "b:1/t")
    ),
    (
        '[[sinks]]\ntype = "mqtt"\nhost = "b:1883"',
        'sinks[0].host: found "b:1883" (string), allowed: a host name or address, without a port',
    ),
    (
        '[[sinks]]\ntype = "stdout"\n[[sinks]]\ntype = "stdout"',
        "sinks[1]: found standard output again, allowed: once (it is sinks[0])",
    ),
    (
        '[[sinks]]\ntype = "file"\npath = "p"\n[[sinks]]\ntype = "file"\npath = "./a/../p"',
        'sinks[1]: found file "./a/../p" again, allowed: once (it is sinks[0])',
    ),
    (
        '[[sinks]]\ntype = "file"\npath = "p"\n[[sinks]]\ntype = "file"\npath = "p"',
        'sinks[1]: found file "p" again, allowed: once (it is sinks[0])',
    ),
    (
        '[[sinks]]\ntype = "file"\npath = "p"\n[[sinks]]\ntype = "file"\npath = "./a/../p"',
        'sinks[1]: found file "./a/../p" again, allowed: once (it is sinks[0])',
    ),
    (
        '[[sinks]]\ntype = "kafka"\nbootstrap = ["b:1"]\ntopic = "t"\nspool = "wal"\n'
        '[[sinks]]\ntype = "kafka"\nbootstrap = ["b:1"]\ntopic = "t"\nspool = "spill"',
        "sinks[1]: found kafka://b:1/t with a spool again, allowed: once (it is sinks[0])",
    ),
    (
        '[[sinks]]\ntype = "mqtt"\nhost = "b"\ntopic = "t"\nspool = "wal"\n'
        '[[sinks]]\ntype = "mqtt"\nhost = "b"\ntopic = "t"\nspool = "wal"',
        "sinks[1]: found mqtt://b:1883/t with a spool again, allowed: once (it is sinks[0])",
    ),
    # several workers
    (
        'workers = 2\n[[sinks]]\ntype = "file"\npath = "a"',
        'sinks[0].type: found "file" (string), allowed: "kafka", "mqtt", with several workers',
    ),
    (
        "workers = 2",
        'sinks[0].type: found "stdout" (string), allowed: "kafka", "mqtt", with several workers',
    ),
    (
        "workers = 2\n" + KAFKA + 'spool = "wal"',
        'sinks[0].spool: found "wal" (string), allowed: "off", where workers is above 1',
    ),
    ("workers = 17", "workers: found 17 (integer), allowed: an integer from 1 to 16"),
    # secrets
    (
        KAFKA + 'sasl = {mechanism = "PLAIN", username = "u", password_env = "A"}',
        'sinks[0].sasl.mechanism: found "PLAIN" (string), allowed: PLAIN with TLS, SCRAM-SHA-512, '
        "or allow_cleartext = true",
    ),
    (
        KAFKA + 'sasl = {username = "u"}',
        "sinks[0].sasl.password_env: missing, allowed: it or password_file",
    ),
    (
        KAFKA + 'sasl = {username = "u", password_env = "A", password_file = "b"}',
        "sinks[0].sasl.password_env: found together with password_file, allowed: one of them",
    ),
    (
        MQTT + 'username = "u"\npassword_env = "A"\npassword_file = "b"',
        "sinks[0].password_env: found together with password_file, allowed: one of them",
    ),
    (
        MQTT + 'password_env = "A"',
        "sinks[0].username: missing, allowed: a string, as there is a password",
    ),
    (
        MQTT + 'tls = {cert_file = "c", key_password_env = "A", key_password_file = "b"}',
        "sinks[0].tls.key_password_env: found together with key_password_file, "
        "allowed: one of them",
    ),
    (
        MQTT + 'tls = {key_file = "k"}',
        "sinks[0].tls.cert_file: missing, allowed: a file, as there is key_file",
    ),
    *(
        (
            KAFKA + f'tls = {{{name} = "A"}}',
            f"sinks[0].tls.cert_file: missing, allowed: a file, as there is {name}",
        )
        for name in ("key_file", "key_password_env", "key_password_file")
    ),
    (
        MQTT + 'password_env = "hunter2 is my password"',
        "sinks[0].password_env: found a value (not shown), "
        "allowed: the name of an environment variable",
    ),
    # no TOML
    ("a = 1\nb = = 2", "line 2, column 5: invalid value"),
    ("a = 1\nb", "line 2, column 2: expected '=' after a key in a key/value pair"),
    ('a = """', "line 1, column 8: unterminated string"),
    ("a = 1\na = 2", "line 2, column 6: cannot overwrite a value"),
    (f"a = {'[' * 5000}", "nested too deeply"),
    (f"a = {'9' * 5000}", "an integer of too many digits"),
]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("streamer.toml")


def _fixed(expected: str) -> str:
    """Long values are cut: what a message repeats has at most 60 characters."""
    head, quote, rest = expected.partition('found "')
    value, end, tail = rest.partition('" (string)')
    if not end or len(value) <= 60:
        return expected
    return head + quote + value[:57] + "..." + end + tail


@pytest.mark.parametrize(("text", "expected"), MISTAKES)
def test_a_mistake_is_one_line_with_file_key_found_and_allowed(
    file: Path, text: str, expected: str
) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value) == f"streamer.toml: {_fixed(expected)}"
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_what_is_possible_is_not_refused(file: Path) -> None:
    """Several brokers of one kind; a password in the clear, for who says so; topics by category."""
    sasl = 'sasl = {mechanism = "PLAIN", username = "u", password_env = "A"'
    topic = f'topic = "{"t" * 239}{{category}}"\n'
    file.write_text(KAFKA + f"{sasl}, allow_cleartext = true}}\n" + KAFKA + topic + MQTT + MQTT)
    plain, long, *others = load(file).sinks
    assert isinstance(plain, KafkaSink)
    assert plain.sasl == Sasl(
        mechanism="PLAIN", username="u", password_env="A", allow_cleartext=True
    )
    assert isinstance(long, KafkaSink)
    assert len(long.topic) == 249
    categories = {kind.partition(".")[0] for kind in events.KINDS}
    assert all(len(category) <= len("{category}") for category in categories)
    assert others == [MqttSink(host="b")] * 2
    file.write_text(KAFKA + f"tls = {{}}\n{sasl}}}\n")
    assert load(file).sinks


@pytest.mark.parametrize("host", ["a+b", "a#", "a/b", "$x", ""])
def test_a_host_that_is_no_level_of_a_topic_is_refused_where_the_topic_has_it(host: str) -> None:
    with_host, without = MqttSink(host="h", topic="k/{host}"), MqttSink(host="h", topic="k")
    (problem,) = host_problems(Settings(sinks=(without, with_host)), host)
    assert problem == (
        f'sinks[1].topic: found {{host}}, and this host is "{host}", '
        "allowed: the setting host, or another topic"
    )
    assert not list(host_problems(Settings(sinks=(with_host,)), "web-1.example"))


def test_the_password_itself_in_the_file_is_refused_and_not_repeated(file: Path) -> None:
    file.write_text(MQTT + 'password = "hunter2"')
    with pytest.raises(ConfigError, match=r"password: unknown key \(did you mean pas") as caught:
        load(file)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_file_that_cannot_be_read_says_why(file: Path, name: str) -> None:
    reasons = {"absent.toml": "No such file or directory", ".": "Is a directory"}
    with pytest.raises(ConfigError) as caught:
        load(Path(name))
    assert str(caught.value) == f"{name}: cannot be read: {reasons[name]}"


def test_a_file_that_is_not_utf8_says_where(file: Path) -> None:
    file.write_bytes(b'host = "\xff"')
    with pytest.raises(ConfigError, match=r"^streamer\.toml: byte 9: not UTF-8$"):
        load(file)


def test_a_file_is_not_needed(file: Path) -> None:
    assert load(None) == Settings()
    file.write_text("")
    assert load(file) == Settings()


def test_a_file_sets_what_it_names_and_nothing_else(file: Path) -> None:
    file.write_text(reference.EXAMPLE)
    assert load(file) == Settings(
        events=("default", "file.open"),
        filters=Filters(exclude_comms=("node_exporter",), path_prefixes=("/etc", "/usr")),
        sinks=(
            KafkaSink(
                bootstrap=("kafka-1:9093", "kafka-2:9093"),
                topic="kernel-{category}",
                tls=Tls(ca_file="/etc/streamer/ca.pem"),
                sasl=Sasl(username="streamer", password_file="/etc/streamer/kafka-password"),
            ),
            FileSink(path="/var/log/streamer.ndjson"),
        ),
    )


def test_values_at_the_limits_are_accepted(file: Path) -> None:
    file.write_text(
        """
        heartbeat_seconds = 3600
        rings = {critical_bytes = 65536, bulk_bytes = 1073741824}
        filters = {uids = [0, 4294967295], comms = ["fifteen-letters", "a\\tb"]}
        """
        + KAFKA
        + f'topic = "{"t" * 239}{{category}}"'
    )
    settings = load(file)
    assert settings.heartbeat_seconds == 3600.0
    assert settings.rings == Rings(critical_bytes=1 << 16, bulk_bytes=1 << 30)
    assert settings.filters.comms == ("fifteen-letters", "a\tb")


# ------------------------------------------------------------------------------- sink URLs

URLS = [
    ("stdout:", StdoutSink()),
    ("stdout:?encoding=json&color=never", StdoutSink(encoding="json", color="never")),
    ("file:events.ndjson", FileSink(path="events.ndjson")),
    ("file:/a/b?mode=0600", FileSink(path="/a/b", mode="0600")),
    ("file:///a/b%20c%3F", FileSink(path="/a/b c?")),
    ("file:a@b:c", FileSink(path="a@b:c")),
    ("kafka://h", KafkaSink(bootstrap=("h:9092",))),
    ("kafka://h:1,[::1]:2,10.0.0.1/t", KafkaSink(
        bootstrap=("h:1", "[::1]:2", "10.0.0.1:9092"), topic="t")),
    ("kafka://h:1/k-{category}?linger_ms=0&encoding=msgpack&request_timeout_seconds=2.5", KafkaSink(
        bootstrap=("h:1",), topic="k-{category}", linger_ms=0, encoding="msgpack",
        request_timeout_seconds=2.5)),
    ("kafkas://h:9093/t?tls.ca_file=/ca.pem", KafkaSink(
        bootstrap=("h:9093",), topic="t", tls=Tls(ca_file="/ca.pem"))),
    ("kafka://h/t?sasl.username=u&sasl.password_env=PW", KafkaSink(
        bootstrap=("h:9092",), topic="t", sasl=Sasl(username="u", password_env="PW"))),
    ("mqtt://h", MqttSink(host="h")),
    ("mqtt://h:1/a/b/{host}", MqttSink(host="h", port=1, topic="a/b/{host}")),
    ("mqtt://u@[::1]/t", MqttSink(host="::1", topic="t", username="u")),
    ("mqtt://u%40corp@h/a%40b?password_env=PW", MqttSink(
        host="h", topic="a@b", username="u@corp", password_env="PW")),
    ("mqtts://h/t?tls.verify_hostname=false", MqttSink(
        host="h", port=8883, topic="t", tls=Tls(verify_hostname=False))),
]  # fmt: skip


@pytest.mark.parametrize(("url", "sink"), URLS)
def test_a_url_is_a_sink(url: str, sink: object) -> None:
    assert parse_sink(url) == sink


FORMS = (
    "stdout:, file:PATH, kafka://HOST:PORT/TOPIC, kafkas://…, mqtt://[USER@]HOST:PORT/TOPIC, "
    "mqtts://…"
)
NO_PASSWORD = "a password does not belong into a URL, use password_env or password_file"
HOST_PORT = 'HOST:PORT, such as "127.0.0.1:9092" or "[::1]:9092"'

BAD_URLS = [
    ("", f'--sink: found "", allowed: {FORMS}'),
    ("stdout", f'--sink: found "stdout", allowed: {FORMS}'),
    ("amqp://h", f'--sink: found "amqp://h", allowed: {FORMS}'),
    ("stdout:x", '--sink stdout:x: found "x" after the colon, allowed: nothing'),
    ("file:", "--sink file:: no path, allowed: file:PATH"),
    ("kafka:h:1", f"--sink kafka:h:1: no // after the colon, allowed: {FORMS}"),
    ("kafka:///t", f'--sink kafka:///t: found "", allowed: {HOST_PORT}'),
    ("kafka://h:1,,i/t", f'--sink kafka://h:1,,i/t: found "", allowed: {HOST_PORT}'),
    ("kafka://h:99999", f'--sink kafka://h:99999: found "h:99999", allowed: {HOST_PORT}'),
    ("mqtt://a b/t", f'--sink mqtt://a b/t: found "a b", allowed: {HOST_PORT}'),
    (
        "kafka://h/a/b",
        '--sink kafka://h/a/b: topic: found "a/b" (string), '
        "allowed: letters, digits, '.', '_', '-' and the placeholder {category}",
    ),
    (
        "kafka://h/t?linger_ms=x",
        '--sink kafka://h/t: linger_ms: found "x" (string), allowed: an integer from 0 to 60000',
    ),
    (
        "kafkas://h/t?tls.verify_hostname=false&batch_bytes=4096&linger_ms=x",
        '--sink kafkas://h/t: linger_ms: found "x" (string), allowed: an integer from 0 to 60000',
    ),
    (
        "kafka://h/t?linger_ms=60001",
        '--sink kafka://h/t: linger_ms: found "60001" (string), '
        "allowed: an integer from 0 to 60000",
    ),
    (
        "stdout:?colour=never",
        "--sink stdout:: colour: unknown key (did you mean color?), "
        "allowed: budget_bytes, color, encoding, on_full, type",
    ),
    ("kafka://h/t?topic=x", '--sink kafka://h/t: "topic" is there twice, allowed: once'),
    (
        "mqtt://h?max_inflight=1&max_inflight=2",
        '--sink mqtt://h: "max_inflight" is there twice, allowed: once',
    ),
    (
        "mqtt://h/t?tls.ca_file=x",
        '--sink mqtt://h/t: "tls.ca_file" without TLS, allowed: kafkas:// or mqtts://',
    ),
    ("mqtt://u:hunter2@h/t", f"--sink mqtt://…: {NO_PASSWORD}"),
    ("mqtt://u:hun/ter2@h/t", f"--sink mqtt://…: {NO_PASSWORD}"),
    ("mqtt://u:hun?ter2@h/t", f"--sink mqtt://…: {NO_PASSWORD}"),
    ("mqtt://:hunter2@h", f"--sink mqtt://…: {NO_PASSWORD}"),
    ("kafkas://u:hunter2@h", f"--sink kafkas://…: {NO_PASSWORD}"),
    ("kafka://hunter2@h", f"--sink kafka://…: {NO_PASSWORD}"),
    ("mqtt://h?password=hunter2", f"--sink mqtt://h: {NO_PASSWORD}"),
    ("kafka://h?sasl.password=hunter2", f"--sink kafka://h: {NO_PASSWORD}"),
    ("mqtt://h/a@hunter2", "--sink mqtt://…: an @ that does not end USER is written %40"),
    ("mqtt://@h", "--sink mqtt://…: an @ that does not end USER is written %40"),
    ("http://u:hunter2@h", f'--sink: found "http:…", allowed: {FORMS}'),
    (
        "mqtt://u@h?password_env=hunter-2",
        "--sink mqtt://u@h: password_env: found a value (not shown), "
        "allowed: the name of an environment variable",
    ),
    ("mqtt://h\x1b[2J", f'--sink mqtt://h\\u001b[2J: found "h\\u001b[2J", allowed: {HOST_PORT}'),
    (
        "kafka://h/t?linger_ms=\udcff",
        '--sink: found "kafka://h/t?linger_ms=\\udcff", allowed: UTF-8',
    ),
]


@pytest.mark.parametrize(("url", "message"), BAD_URLS)
def test_a_wrong_url_is_one_line_without_a_password(url: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sink(url)
    assert str(caught.value) == message
    assert "hunter" not in str(caught.value)


# ------------------------------------------------------------------------------ precedence


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(file: Path) -> None:
    file.write_text(
        'host = "file"\nlog_level = "debug"\n[filters]\npids = [1]\ncomms = ["nginx"]\n'
    )
    merged = load(file, Overrides(settings={"host": "line"}, filters={"pids": (2, 3)}))
    assert merged.host == "line"
    assert merged.log_level == "debug"
    assert merged.filters == Filters(pids=(2, 3), comms=("nginx",))
    assert merged.grace_seconds == Settings().grace_seconds


TWO_FILES = '[[sinks]]\ntype = "file"\npath = "a"\n[[sinks]]\ntype = "file"\npath = "b"\n'


def test_sinks_of_the_command_line_replace_those_of_the_file(file: Path) -> None:
    file.write_text(TWO_FILES)
    merged = load(file, Overrides(sinks=("stdout:", "file:c")))
    assert merged.sinks == (StdoutSink(), FileSink(path="c"))


def test_without_any_sink_events_go_to_standard_output(file: Path) -> None:
    assert load(None).sinks == (StdoutSink(),)
    file.write_text("sinks = []")
    for given in (Overrides(), Overrides(settings={"host": "h"})):
        assert load(file, given).sinks == (StdoutSink(),)


def test_encoding_and_color_are_for_every_sink_that_does_not_name_its_own(file: Path) -> None:
    given = Overrides(encoding="msgpack", color="never")
    file.write_text(TWO_FILES)
    assert load(file, given).sinks == (
        FileSink(path="a", encoding="msgpack"),
        FileSink(path="b", encoding="msgpack"),
    )
    assert load(None, given).sinks == (StdoutSink(encoding="msgpack", color="never"),)
    colored = Overrides(sinks=("file:b", "stdout:"), color="never")
    assert load(None, colored).sinks == (FileSink(path="b"), StdoutSink(color="never"))
    urls = Overrides(sinks=("stdout:?encoding=json", "file:b"), encoding="msgpack")
    assert load(None, urls).sinks == (
        StdoutSink(encoding="json"),
        FileSink(path="b", encoding="msgpack"),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            Overrides(filters={"pids": (0,)}),
            "filters.pids[0]: found 0 (integer), allowed: an integer from 1 to 4194304",
        ),
        (
            Overrides(filters={"exclude_comms": ("nginx",)}),
            'filters.comms[0]: found "nginx" (string), '
            "allowed: a value that filters.exclude_comms does not have too",
        ),
        (
            Overrides(filters={"comms": ("\udcff",)}),
            'filters.comms[0]: found "\\udcff" (string), allowed: UTF-8 without control characters',
        ),
        (
            Overrides(settings={"host": "a/b"}),
            "host: found \"a/b\" (string), allowed: a name of letters, digits, '.', '_' and '-'",
        ),
        (
            Overrides(sinks=("stdout:", "stdout:")),
            "sinks[1]: found standard output again, allowed: once (it is sinks[0])",
        ),
    ],
)
def test_a_wrong_override_names_the_command_line(
    file: Path, overrides: Overrides, message: str
) -> None:
    file.write_text('filters.comms = ["nginx"]')
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    assert str(caught.value) == f"command line: {message}"


# ------------------------------------------------------------------------ choice of events

DEFAULT = {"process.exec", "process.fork", "process.exit", "net.connect", "net.close"}

SELECTIONS: list[tuple[tuple[str, ...], set[str]]] = [
    ((), DEFAULT),
    (("",), DEFAULT),
    (("default",), DEFAULT),
    (("default,file.*",), DEFAULT | {"file.open"}),
    (("default", "file.*"), DEFAULT | {"file.open"}),
    (("*",), set(KINDS)),
    (("*,-process.fork",), set(KINDS) - {"process.fork"}),
    (("*", "!default"), {"file.open"}),
    (("-process.*",), {"net.connect", "net.close"}),
    ((" net.c* , !net.close ",), {"net.connect"}),
    (("-process.*,process.exec",), {"process.exec", "net.connect", "net.close"}),
    (("process.e?e[c]",), {"process.exec"}),
]


@pytest.mark.parametrize(("patterns", "chosen"), SELECTIONS)
def test_globs_choose_kinds_in_order(patterns: tuple[str, ...], chosen: set[str]) -> None:
    assert select(patterns, (*KINDS, "stream.loss")) == chosen


KNOWN = (
    "default, or globs of file.open, net.close, net.connect, process.exec, process.exit, "
    "process.fork"
)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("foo.*", f'--events: found "foo.*", which matches no event, allowed: {KNOWN}'),
        ("*,-foo", f'--events: found "foo", which matches no event, allowed: {KNOWN}'),
        ("-", f'--events: found "", which matches no event, allowed: {KNOWN}'),
        ("NET.*", f'--events: found "NET.*", which matches no event, allowed: {KNOWN}'),
        (
            "stream.*",
            '--events: found "stream.*", but stream.* is always on and cannot be chosen',
        ),
        ("*,-*", f"--events: no kind of event is left, allowed: {KNOWN}"),
    ],
)
def test_a_glob_that_matches_nothing_lists_the_kinds(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select((pattern,), (*KINDS, "stream.loss"))
    assert str(caught.value) == message


def test_the_default_leaves_out_what_can_be_much() -> None:
    left_out = {
        kind for kind in events.KINDS if not any(fnmatchcase(kind, glob) for glob in DEFAULT_EVENTS)
    }
    assert left_out == {"file.open", "net.drop", "net.dns"}


# --------------------------------------------------------------------------- documentation


def _tables(table: inspect.StructType) -> list[inspect.StructType]:
    inner = [
        part
        for field in table.fields
        for node in (field.type, reference.item(field.type))
        if node is not None
        for part in reference.structs(node)
    ]
    return [table, *(deep for part in inner for deep in _tables(part))]


def test_every_setting_is_documented_with_its_limits_default_and_meaning() -> None:
    page = reference.documentation()
    (root,) = reference.structs(inspect.type_info(Settings))
    for table in _tables(root):
        for field in table.fields:
            assert reference.meaning(field), f"{table.cls.__name__}.{field.name} needs a doc()"
            assert f"| `{field.encode_name}` | {messages.allowed(field.type)} |" in page


def test_the_page_names_every_sink_and_section() -> None:
    page = reference.documentation()
    for title in ("rings", "filters"):
        assert f"## `[{title}]`" in page
    for sink in ("stdout", "file", "kafka", "mqtt"):
        assert f'## `[[sinks]] with type = "{sink}"`' in page
    assert "`4194304`" in page


def test_the_example_of_the_page_is_toml() -> None:
    assert f"```toml\n{reference.EXAMPLE}```" in reference.documentation()
    assert tomllib.loads(reference.EXAMPLE)["sinks"][1]["type"] == "file"


def test_the_json_schema_closes_every_table_and_carries_the_meanings() -> None:
    schema = reference.schema()
    assert json.loads(json.dumps(schema)) == schema
    tables: dict[str, Any] = schema["$defs"]
    assert {"Settings", "Rings", "Filters", "KafkaSink", "MqttSink", "Tls"} <= tables.keys()
    for name, table in tables.items():
        assert table["additionalProperties"] is False, name
    port = tables["MqttSink"]["properties"]["port"]
    assert (port["minimum"], port["maximum"], port["default"]) == (1, 65535, 1883)
    assert port["description"].startswith("Its port")


def test_several_sinks_share_a_budget() -> None:
    """So that the process has a bound, however many there are; what is configured stays."""
    urls = ("stdout:", "file:/tmp/e?budget_bytes=65536", "kafka://h:9092/t", "mqtt://h/t")
    alone = with_budgets((parse_sink(urls[0]),))
    assert [sink.budget for sink in alone] == [32 << 20]
    several = with_budgets(tuple(map(parse_sink, urls)))
    assert [sink.budget for sink in several] == [12 << 20, 65536, 12 << 20, 12 << 20]
