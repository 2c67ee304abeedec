"""Secrets and TLS: against a real TLS server, what is refused and what is let through."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamer.config.settings import Tls
from streamer.errors import ConfigError
from streamer.sinks.credentials import read_secret, ssl_context

NAME = "broker.example"
PASSWORD = "swordfish"


class Authority:
    """A certificate authority, and what it signed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.ca = directory / "ca.pem"
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem"),
        )
        self.key, self.certificate = self._sign(NAME)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments], cwd=self._directory, check=True, capture_output=True
        )

    def _sign(self, name: str) -> tuple[Path, Path]:
        self._openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"),
            *("-keyout", "server.key", "-out", "server.csr"),
        )
        self._openssl(
            *("x509", "-req", "-in", "server.csr", "-copy_extensions", "copy", "-days", "2"),
            *("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", "server.pem"),
        )
        return self._directory / "server.key", self._directory / "server.pem"

    def encrypted_key(self) -> Path:
        """The same key under PASSWORD."""
        self._openssl(
            *("pkey", "-aes256", "-passout", f"pass:{PASSWORD}"),
            *("-in", "server.key", "-out", "encrypted.key"),
        )
        return self._directory / "encrypted.key"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


class Server:
    """A TLS server that answers one client after the other with the client's certificate."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(client, server_side=True) as served:
                    served.sendall(b"anonymous" if served.getpeercert() is None else b"known")
            except OSError:  # who refuses us goes away
                client.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def server_context(authority: Authority) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certificate, authority.key)
    context.load_verify_locations(authority.ca)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


@pytest.fixture
def server(authority: Authority) -> Iterator[Server]:
    made = Server(server_context(authority))
    yield made
    made.close()


def greeting(server: Server, tls: Tls, name: str) -> bytes:
    """What the server says to a client that believes to talk to `name`."""
    with (
        socket.create_connection(server.address, 10) as raw,
        ssl_context(tls).wrap_socket(raw, server_hostname=name) as wrapped,
    ):
        return wrapped.recv(100)


def test_a_certificate_for_this_name_is_accepted(server: Server, authority: Authority) -> None:
    assert greeting(server, Tls(ca_file=str(authority.ca)), NAME) == b"anonymous"


def test_a_certificate_for_another_name_is_refused(server: Server, authority: Authority) -> None:
    """Whoever has a certificate of the same authority could else stand for the broker."""
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        greeting(server, Tls(ca_file=str(authority.ca)), "other.example")


def test_the_name_is_not_looked_at_only_if_the_settings_say_so(
    server: Server, authority: Authority
) -> None:
    tls = Tls(ca_file=str(authority.ca), verify_hostname=False)
    assert greeting(server, tls, "other.example") == b"anonymous"


def test_without_the_name_the_authority_is_still_looked_at(server: Server) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        greeting(server, Tls(verify_hostname=False), NAME)


def test_tls_1_1_is_refused(authority: Authority) -> None:
    context = server_context(authority)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    server = Server(context)
    try:
        with pytest.raises(ssl.SSLError):
            greeting(server, Tls(ca_file=str(authority.ca)), NAME)
    finally:
        server.close()
    assert ssl_context(Tls()).minimum_version == ssl.TLSVersion.TLSv1_2


def test_the_client_shows_its_certificate(server: Server, authority: Authority) -> None:
    tls = Tls(
        ca_file=str(authority.ca),
        cert_file=str(authority.certificate),
        key_file=str(authority.key),
    )
    assert greeting(server, tls, NAME) == b"known"


def test_an_encrypted_key_is_opened_with_its_password_alone(
    server: Server, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And OpenSSL never asks for one on the terminal."""
    monkeypatch.setenv("KEY_PASSWORD", PASSWORD)
    tls = Tls(
        ca_file=str(authority.ca),
        cert_file=str(authority.certificate),
        key_file=str(authority.encrypted_key()),
        key_password_env="KEY_PASSWORD",
    )
    assert greeting(server, tls, NAME) == b"known"
    monkeypatch.setenv("KEY_PASSWORD", "wrong")
    with pytest.raises(ConfigError, match=r"tls.cert_file: cannot use .* with key") as caught:
        ssl_context(tls)
    assert "wrong" not in str(caught.value)


def test_openssl_is_given_an_empty_password_rather_than_asking(authority: Authority) -> None:
    """In a process with a terminal, as an agent that somebody starts by hand has."""
    script = f"""
import os, pty, sys
pid, terminal = pty.fork()
if pid:
    said = b""
    while True:
        try:
            part = os.read(terminal, 1000)
        except OSError:
            break
        if not part:
            break
        said += part
        if b"pass phrase" in said:
            os.write(terminal, b"\\x03")
            break
    os.waitpid(pid, 0)
    sys.stdout.buffer.write(said)
else:
    from streamer.config.settings import Tls
    from streamer.sinks.credentials import ssl_context
    try:
        ssl_context(Tls(cert_file={str(authority.certificate)!r},
                        key_file={str(authority.encrypted_key())!r}))
    except Exception as error:
        print(type(error).__name__, flush=True)
    os._exit(0)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "ConfigError", ran.stdout + ran.stderr


# ---------------------------------------------------------------- secrets


def test_a_secret_from_a_file_is_all_but_the_line_end(tmp_path: Path) -> None:
    """Spaces may be part of it."""
    (tmp_path / "secret").write_bytes(b"  sword fish\t \r\n\n")
    assert read_secret("password", None, str(tmp_path / "secret")) == "  sword fish\t "


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECRET", raising=False)
    with pytest.raises(ConfigError, match="password_env: the environment variable SECRET is not"):
        read_secret("password", "SECRET", None)


def test_an_empty_variable_is_an_empty_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "")
    assert read_secret("password", "SECRET", None) == ""


def test_without_a_source_there_is_no_secret() -> None:
    assert read_secret("password", None, None) is None


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"password_file: cannot read .*secret: No such file"):
        read_secret("password", None, os.fspath(tmp_path / "secret"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"password_file: cannot read .*binary: "):
        read_secret("password", None, os.fspath(tmp_path / "binary"))
