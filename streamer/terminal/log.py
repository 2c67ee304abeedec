"""The log of the agent: lines on a `Console`, in which nothing is left that a terminal obeys."""

from __future__ import annotations

import copy
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from streamer.terminal.console import Console
from streamer.terminal.lines import printable, shortened

ExceptionInfo = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)
_log = logging.getLogger("streamer")


FORMAT = "%(asctime)s %(level)s streamer: %(message)s"
"""Of a line: when, in UTC, and how severe it is."""

# syslog(3), which journald reads at the beginning of a line: see sd-daemon(3).
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7
ERROR_IN_JOURNAL = "<3>"
"""What a line of an error begins with where journald reads it."""


def is_journal(fd: int, named: str | None = None) -> bool:
    """Whether a descriptor leads to journald, which knows the time and has severities.

    `named` is `JOURNAL_STREAM`, as systemd.exec(5) has it: device and inode of its stream.
    """
    stream = os.environ.get("JOURNAL_STREAM", "") if named is None else named
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"


class LogFormatter(logging.Formatter):
    """Escapes what a terminal would act upon: messages and errors can quote a peer.

    A traceback keeps its lines, indented, so that none can be taken for a message.
    """

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Its time in UTC, to the millisecond."""
        when = datetime.fromtimestamp(record.created, UTC)
        return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`, which would take a traceback that another one has made."""
        own = copy.copy(record)
        own.exc_text = None
        own.level = record.levelname.lower()
        return super().format(own)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line, whatever is in it."""
        return printable(shortened(super().formatMessage(record)))

    def formatException(self, ei: ExceptionInfo) -> str:
        """A traceback."""
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        """The stack of a call."""
        return _indented(super().formatStack(stack_info))


def traceback_of(error: BaseException) -> str:
    """Its traceback as the log would have it."""
    return LogFormatter().formatException((type(error), error, error.__traceback__))


def _indented(text: str) -> str:
    return "\n".join(f"    {printable(line)}" for line in text.split("\n"))


class JournalFormatter(LogFormatter):
    """For journald: each line begins with its priority, `<4>`, and has no time."""

    def format(self, record: logging.LogRecord) -> str:
        """See `LogFormatter`."""
        number = next((n for level, n in _PRIORITIES if record.levelno >= level), _DEBUG)
        return "\n".join(f"<{number}>{line}" for line in super().format(record).split("\n"))


class LogHandler(logging.Handler):
    """Hands lines to a console. Never waits."""

    def __init__(self, console: Console, *, journal: bool = False) -> None:
        """`console` is where they go; `journal`: it is journald that reads them there."""
        super().__init__()
        self._console = console
        self.setFormatter(JournalFormatter("%(message)s") if journal else LogFormatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            self._console.write(f"{self.format(record)}\n".encode("utf-8", "backslashreplace"))
        except Exception:  # a defect in a message, which must not become one of the caller's
            self.handleError(record)


@contextmanager
def logging_to(console: Console, level: str) -> Iterator[None]:
    """Have all that is logged, by libraries too, and errors that nobody catches on `console`.

    `level` is the least severity of this package's own messages.
    """
    _log.setLevel(level.upper())
    handler = LogHandler(console, journal=is_journal(2))
    root = logging.getLogger()
    root.addHandler(handler)
    before = threading.excepthook, sys.unraisablehook
    threading.excepthook, sys.unraisablehook = _of_thread, _unraisable
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = before
        root.removeHandler(handler)


def _of_thread(found: threading.ExceptHookArgs) -> None:
    _log.error("a thread ended by a defect", exc_info=_info(found))


def _unraisable(found: Any) -> None:
    _log.error("%s", found.err_msg or "an error that nobody can catch", exc_info=_info(found))


def _info(found: Any) -> Any:
    return found.exc_type, found.exc_value, found.exc_traceback
