"""Secrets and TLS for the sinks. A secret is read from the environment or a file, when used."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from streamer.errors import ConfigError
from streamer.settings import Tls


def read_secret(what: str, env: str | None, file: str | None) -> str | None:
    """The secret named by an environment variable or held in a file; None when neither is set.

    `what` names the setting in messages, such as `sasl.password`. Line ends after the secret
    in a file are not part of it.

    Raises:
        ConfigError: both are set, the variable is unset or the file cannot be read. The
            message never contains the secret.
    """
    if env and file:
        raise ConfigError(f"{what}: set {what}_env or {what}_file, not both")
    if env:
        value = os.environ.get(env)
        if value is None:
            raise ConfigError(f"{what}_env: the environment variable {env} is not set")
        return value
    if file:
        try:
            return Path(file).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{what}_file: cannot read {file}: {_reason(error)}") from None
    return None


def ssl_context(tls: Tls) -> ssl.SSLContext:
    """A client context for `tls`: at least TLS 1.2, the peer's certificate always required.

    Raises:
        ConfigError: a file that cannot be read or is no certificate or key.
    """
    password = read_secret("tls.key_password", tls.key_password_env, tls.key_password_file)
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls.ca_file: cannot use {tls.ca_file}: {_reason(error)}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = tls.verify_hostname
    if tls.cert_file is not None:
        try:
            # Without a password OpenSSL would ask on the terminal: an empty one fails instead.
            context.load_cert_chain(tls.cert_file, tls.key_file, password=password or "")
        except (OSError, ssl.SSLError) as error:
            where = f"{tls.cert_file} with key {tls.key_file or tls.cert_file}"
            raise ConfigError(f"tls.cert_file: cannot use {where}: {_reason(error)}") from None
    return context


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
