"""The log of the agent: lines on a `Console`, in which nothing is left that a terminal obeys."""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from streamer.terminal.console import Console
from streamer.terminal.lines import printable, shortened

ExceptionInfo = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)
_log = logging.getLogger("streamer")


class LogFormatter(logging.Formatter):
    """Escapes what a terminal would act upon: messages and errors can quote a peer.

    A traceback keeps its lines, indented, so that none can be taken for a message.
    """

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`, which would take a traceback that another one has made."""
        own = copy.copy(record)
        own.exc_text = None
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


class LogHandler(logging.Handler):
    """Hands lines to a console. Never waits."""

    def __init__(self, console: Console) -> None:
        """`console` is where they go."""
        super().__init__()
        self._console = console
        self.setFormatter(LogFormatter("streamer: %(message)s"))

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
    handler = LogHandler(console)
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
