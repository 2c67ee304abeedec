"""Files that the configuration names: which they are, how they are opened, secrets and TLS."""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import inspect

from streamer.config.settings import FileSink, KafkaSink, MqttSink, Sasl, Settings, StdoutSink, Tls
from streamer.errors import ConfigError
from streamer.privilege.drop import account_of
from streamer.privilege.files import (
    DIRECT,
    READ_MOST,
    AppendTarget,
    in_memory,
    own_descriptor,
    read_all,
)
from streamer.privilege.named import named_files
from streamer.sinks.credentials import read_secret, ssl_context

# ---------------------------------------------------------------- which they are


def file_settings(node: inspect.Type, name: str = "") -> Iterator[str]:
    """The names of all settings that name a file."""
    match node:
        case inspect.Metadata():
            yield from file_settings(node.type, name)
        case inspect.UnionType():
            for part in node.types:
                yield from file_settings(part, name)
        case inspect.VarTupleType():
            yield from file_settings(node.item_type, name)
        case inspect.StructType():
            for field in node.fields:
                yield from file_settings(field.type, field.name)
        case inspect.StrType() if name == "btf" or name == "path" or name.endswith("_file"):
            yield name


def test_every_file_of_a_configuration_is_named() -> None:
    """And nothing but these: a setting that names a file has to be added here, and to it."""
    tls = Tls(ca_file="/t/ca", cert_file="/t/cert", key_file="key", key_password_file="/t/pass")
    sasl = Sasl(username="u", password_file="/t/sasl")
    settings = Settings(
        btf="/t/btf",
        sinks=(
            StdoutSink(),
            FileSink(path="out/events", mode="0604"),
            FileSink(path="/dev/fd/3"),
            KafkaSink(bootstrap=("b:1",), tls=tls, sasl=sasl),
            MqttSink(host="h", username="u", password_file="/t/mqtt", tls=Tls(ca_file="/t/ca")),
        ),
    )
    named = named_files(settings)
    here = os.getcwd()
    assert {(file.path, file.use, file.bits) for file in named} == {
        ("/t/btf", "read", 0),
        (f"{here}/out/events", "append", 0o604),
        ("/t/ca", "read", 0),
        ("/t/cert", "read", 0),
        (f"{here}/key", "read", 0),
        ("/t/pass", "read", 0),
        ("/t/sasl", "read", 0),
        ("/t/mqtt", "read", 0),
    }
    assert len(set(named)) == len(named)
    # Opened before the split, and kept open.
    assert set(file_settings(inspect.type_info(Settings))) - {"state_file"} == {
        "btf",
        "ca_file",
        "cert_file",
        "key_file",
        "key_password_file",
        "password_file",
        "path",
    }


@pytest.mark.parametrize(
    ("path", "fd"),
    [
        ("/dev/fd/63", 63),
        ("/proc/self/fd/3", 3),
        ("/dev/stdout", 1),
        ("/dev/fd/3/x", None),
        ("/dev/null", None),
    ],
)
def test_paths_that_mean_a_descriptor(path: str, fd: int | None) -> None:
    assert own_descriptor(path) == fd


def test_a_descriptor_by_its_path() -> None:
    """As a shell's process substitution makes them: no other process could open it."""
    reading, writing = os.pipe()
    try:
        os.write(DIRECT.append(f"/dev/fd/{writing}", 0).fd, b"secret")
        os.close(writing)
        assert os.read(DIRECT.open(f"/dev/fd/{reading}"), 100) == b"secret"
    finally:
        os.close(reading)


# ---------------------------------------------------------------- opening


def test_a_link_is_followed_once(tmp_path: Path) -> None:
    """Who can write to the directory later cannot have another file written to."""
    real, link, victim = tmp_path / "real", tmp_path / "link", tmp_path / "victim"
    link.symlink_to(real)
    target = AppendTarget(str(link))
    os.write(target.open(0o600).fd, b"one\n")
    real.unlink()
    real.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        target.open(0o600)
    assert not victim.exists()
    target.close()


def test_a_directory_is_held(tmp_path: Path) -> None:
    """Another one that is put in its place is not written to."""
    directory, elsewhere = tmp_path / "logs", tmp_path / "elsewhere"
    directory.mkdir()
    elsewhere.mkdir()
    target = AppendTarget(str(directory / "events"))
    directory.rename(tmp_path / "moved")
    directory.symlink_to(elsewhere)
    os.write(target.open(0o600).fd, b"one\n")
    assert (tmp_path / "moved" / "events").read_bytes() == b"one\n"
    assert not list(elsewhere.iterdir())
    target.close()


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DIRECT.append(str(tmp_path / "none" / "events"), 0o600)


def test_rotation(tmp_path: Path) -> None:
    """The oldest goes; without a file there is nothing to do."""
    path = tmp_path / "events"
    target = AppendTarget(str(path))
    target.rotate(2)
    assert not list(tmp_path.iterdir())
    for number in range(4):
        path.write_text(str(number))
        target.rotate(2)
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {
        "events.1": "3",
        "events.2": "2",
    }
    target.close()


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(READ_MOST + 1)
    with pytest.raises(OSError, match="too large"):
        read_all(DIRECT.open(str(path)))


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(IsADirectoryError):
        read_all(DIRECT.open(str(tmp_path)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_path_in_memory() -> None:
    data = os.urandom(3 << 20)
    with in_memory(data) as path:
        assert Path(path).read_bytes() == data
    assert not Path(path).exists()


# ---------------------------------------------------------------- secrets and TLS


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cert` with `key`, which `password` opens; `other` is a key of something else."""
    directory = tmp_path_factory.mktemp("certificates")
    (directory / "password").write_text("open sesame\n")
    ec = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    subject = ("-days", "2", "-subj", "/CN=client", "-keyout", "key", "-out", "cert")
    openssl(directory, "req", "-x509", *ec, "-passout", "pass:open sesame", *subject)
    openssl(directory, "genpkey", "-algorithm", "ed25519", "-out", "other")
    for path in directory.iterdir():
        path.chmod(0o600)
    return directory


def tls(directory: Path, **files: str) -> Tls:
    names = {"ca_file": "cert", "cert_file": "cert", "key_file": "key"}
    names |= {"key_password_file": "password"} | files
    return Tls(**{name: str(directory / file) for name, file in names.items() if file})  # type: ignore[arg-type]


def test_a_certificate_and_its_key(certificates: Path) -> None:
    context = ssl_context(tls(certificates))
    assert [dict(one)["subject"] for one in context.get_ca_certs()]
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert not [fd for fd in os.listdir("/proc/self/fd") if "memfd:streamer" in link(fd)]


def link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ca_file": "none"}, r"tls.ca_file: cannot use .*/none: No such file"),
        ({"ca_file": "password"}, r"tls.ca_file: cannot use .*/password: "),
        ({"cert_file": "none"}, r"tls.cert_file: cannot use .*/none with key .*/key: No such file"),
        ({"key_file": "other"}, r"tls.cert_file: cannot use .*/cert with key .*/other: "),
        ({"key_password_file": ""}, r"tls.cert_file: cannot use .*/cert with key .*/key: "),
        ({"key_password_file": "none"}, r"tls.key_password_file: cannot read .*/none: No such"),
    ],
)
def test_what_cannot_be_used(certificates: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ssl_context(tls(certificates, **files))
    assert "sesame" not in str(caught.value)


def test_a_secret_in_a_file(tmp_path: Path) -> None:
    """Without the end of its line, and as UTF-8."""
    (tmp_path / "secret").write_bytes("gehe heim ü\r\n".encode())
    assert read_secret("it", None, str(tmp_path / "secret")) == "gehe heim ü"
    (tmp_path / "secret").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match="it_file: cannot read"):
        read_secret("it", None, str(tmp_path / "secret"))


# ---------------------------------------------------------------- the worker's user


def test_the_user_to_become() -> None:
    assert account_of("nobody") == ("nobody", 65534, 65534)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("root", "user: found 'root', allowed: a user other than root"),
        ("no such user", "user: found 'no such user', allowed: a user of this system"),
    ],
)
def test_a_user_that_it_cannot_become(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        account_of(name)
