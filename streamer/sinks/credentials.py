"""Secrets and TLS for the sinks. A secret is read from the environment or a file, when used."""

from __future__ import annotations

import os
import ssl
from contextlib import nullcontext

from streamer.config.settings import AnySink, KafkaSink, MqttSink, Tls
from streamer.errors import ConfigError, HelperGone
from streamer.privilege.files import DIRECT, Opener, in_memory, read_all


def read_secret(
    what: str, env: str | None, file: str | None, opener: Opener = DIRECT
) -> str | None:
    """The secret named by an environment variable or held in a file; None when neither is set.

    `what` names the setting in messages, such as `sasl.password`. Line ends after the secret
    in a file are not part of it.

    Raises:
        ConfigError: the variable is unset or the file cannot be read. The message never
            contains the secret.
    """
    if env:
        value = os.environ.get(env)
        if value is None:
            raise ConfigError(f"{what}_env: the environment variable {env} is not set")
        return value
    if file:
        try:
            return read_all(opener.open(file)).decode().rstrip("\r\n")
        except (OSError, UnicodeDecodeError, HelperGone) as error:
            raise ConfigError(f"{what}_file: cannot read {file}: {_reason(error)}") from None
    return None


def check_credentials(sink: AnySink) -> None:
    """Read all secrets and certificates of a sink once.

    Raises:
        ConfigError: one of them cannot be used.
    """
    if isinstance(sink, KafkaSink | MqttSink) and sink.tls is not None:
        ssl_context(sink.tls)
    if isinstance(sink, KafkaSink) and sink.sasl is not None:
        read_secret("sasl.password", sink.sasl.password_env, sink.sasl.password_file)
    if isinstance(sink, MqttSink):
        read_secret("mqtt.password", sink.password_env, sink.password_file)


def ssl_context(tls: Tls, opener: Opener = DIRECT) -> ssl.SSLContext:
    """A client context for `tls`: at least TLS 1.2, the peer's certificate always required.

    Raises:
        ConfigError: a file that cannot be read or is no certificate or key.
    """
    password = read_secret("tls.key_password", tls.key_password_env, tls.key_password_file, opener)
    context = _trusting(tls.ca_file, opener)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = tls.verify_hostname
    if tls.cert_file is not None:
        # Without a password OpenSSL would ask on the terminal: an empty one fails instead.
        _present(context, tls.cert_file, tls.key_file, password or "", opener)
    return context


def _trusting(ca_file: str | None, opener: Opener) -> ssl.SSLContext:
    if ca_file is None:
        return ssl.create_default_context()
    try:
        with in_memory(read_all(opener.open(ca_file))) as path:
            return ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError, HelperGone) as error:
        raise ConfigError(f"tls.ca_file: cannot use {ca_file}: {_reason(error)}") from None


def _present(
    context: ssl.SSLContext, cert_file: str, key_file: str | None, password: str, opener: Opener
) -> None:
    try:
        with (
            in_memory(read_all(opener.open(cert_file))) as cert,
            in_memory(read_all(opener.open(key_file))) if key_file else nullcontext() as key,
        ):
            context.load_cert_chain(cert, key, password=password)
    except (OSError, ssl.SSLError, HelperGone) as error:
        where = f"{cert_file} with key {key_file or cert_file}"
        raise ConfigError(f"tls.cert_file: cannot use {where}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
