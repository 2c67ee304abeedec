"""Splits the process: starts the helper, and prepares the worker for life without privileges."""

from __future__ import annotations

import codecs
import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from streamer.config.settings import Settings
from streamer.errors import PrivilegeError
from streamer.kernel.loader import Targets
from streamer.kernel.targets import targets_of
from streamer.privilege import drop, endure
from streamer.privilege.channel import MESSAGE_BYTES, MOST_DESCRIPTORS, Channel
from streamer.privilege.client import HelperClient, RemoteLoader, RemoteOpener
from streamer.privilege.files import NamedFile
from streamer.privilege.named import named_files

HELPER = os.path.join(os.path.dirname(__file__), "__main__.py")
"""The program that the helper runs."""

_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH")
# File names in UTF-8 there if they are in UTF-8 here.
_OPTIONS = ("-I", "-S", "-X", f"utf8={sys.flags.utf8_mode}")
_MODULES = ("encodings.idna", "ssl", "traceback", "linecache", "tokenize")
_CODECS = ("ascii", "idna", "latin-1", "utf-8", "utf-16-be", "unicode_escape")

_log = logging.getLogger("streamer")


class Helped(NamedTuple):
    """A helper, and what it does for this process."""

    client: HelperClient
    loader: RemoteLoader
    opener: RemoteOpener
    files: tuple[NamedFile, ...]
    targets: Mapping[str, Targets]
    """What the helper was told."""


class Split:
    """The worker's side of a split that has begun: the helper runs, and `drop` ends it."""

    def __init__(
        self, settings: Settings, kinds: Set[str], config: str | None = None, further: int = 0
    ) -> None:
        """Import what the worker will need, and start the helper, see `with_helper`.

        For so many `further` workers, `ends` has what each asks the helper with.

        Raises:
            ConfigError: there is no such user as the settings name.
            StreamerError: the helper does not start.
        """
        self._account = drop.account_of(settings.user) if drop.can_change_user() else None
        preload(settings)
        for said in endure.endure(settings.oom_score_adj, settings.nice):
            _log.warning("%s", said)
        self.directory = os.getcwd()  # it is another one when privileges are given up
        pairs = [socketpair() for _ in range(further)]
        self.ends = [own for own, _ in pairs]
        helped = with_helper(settings, kinds, config, [other for _, other in pairs])
        self.client, self.loader, self.opener, self.files, self.targets = helped

    def drop(self, *, answers: bool = False) -> None:
        """Give up every privilege of this process, see `drop_privileges`. Raises PrivilegeError."""
        if self._account is None and os.geteuid() == 0:
            _log.warning("without CAP_SETUID and CAP_SETGID the worker remains root's process")
        drop.drop_privileges(self._account, answers=answers)

    def drop_further(self, end: socket.socket) -> RemoteOpener:
        """In the process of a further worker: give up every privilege. What it opens files with.

        `end` is one of `ends`. Raises PrivilegeError.
        """
        client = self.client.for_further(end)
        for one in self.ends:
            if one is not end:
                one.close()
        opener = RemoteOpener(client, tuple(self.files), self.directory)
        drop.drop_privileges(self._account)
        return opener

    def close(self) -> None:
        """End the helper. Harmless when it has ended."""
        self.client.close()


def with_helper(
    settings: Settings,
    kinds: Set[str],
    config: str | None = None,
    further: Sequence[socket.socket] = (),
) -> Helped:
    """Start a helper for a configuration, whose files it is told, and what `kinds` attach to.

    `config` is the configuration's own file, if that may be read again. `further` are the ends
    that the helper is given, of pairs whose others are for further workers; they are closed here.

    Raises:
        StreamerError: it does not start.
    """
    files = named_files(settings, config)
    targets = targets_of(settings.kernel, kinds)
    client = start_helper(further=further)
    try:
        client.set_up(files, targets, headers_of(settings), len(further))
    except BaseException:
        client.close()
        raise
    loader, opener = RemoteLoader(client, files), RemoteOpener(client, files)
    return Helped(client, loader, opener, files, targets)


def headers_of(settings: Settings) -> str:
    """Where headers are looked for: not where a BTF file is named."""
    return "off" if settings.btf is not None else settings.kernel.headers


def socketpair() -> tuple[socket.socket, socket.socket]:
    """Both ends of what a `Channel` is made of, with room for its largest message."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE_BYTES)
    return pair


def start_helper(program: str = HELPER, further: Sequence[socket.socket] = ()) -> HelperClient:
    """Run `program` with one end of a socketpair, those of `further`, and nothing else open here.

    Raises:
        PrivilegeError: it cannot be run.
    """
    own, other = socketpair()
    given = [one.fileno() for one in (other, *further)]
    # Blocked until the helper ignores them: it lives on when they are meant for the worker.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        process = subprocess.Popen(
            [sys.executable, *_OPTIONS, program, *map(str, given)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=given,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
    except OSError as error:
        own.close()
        reason = f"{sys.executable}: {error.strerror}"
        raise PrivilegeError(f"the privileged helper cannot be started: {reason}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for end in (other, *further):
            end.close()
    return HelperClient(Channel(own, MOST_DESCRIPTORS), process)


def preload(settings: Settings) -> None:
    """Import every module and codec that the worker may need.

    As another user it may not be able to read them: an installation below /root, for example.
    """
    kinds: Sequence[object] = [type(sink).__struct_config__.tag for sink in settings.sinks]
    for name in (*_MODULES, *(f"streamer.sinks.{kind}" for kind in kinds), "isal.isal_zlib"):
        importlib.import_module(name)
    for name in _CODECS:
        codecs.lookup(name)
    sys.dont_write_bytecode = True
