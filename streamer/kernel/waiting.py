"""Calls that somebody else may let wait for ever: each in a thread, which is given up in the end.

Whoever has a file system mounted that does not answer can hold what others ask the kernel about
him, and no signal but the one that ends a process ends such a wait.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from threading import Lock, Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class _Call(Generic[T]):
    """One call. Either its result is taken, or `late` has it when it returns after all."""

    def __init__(self, function: Callable[[], T], late: Callable[[T], object]) -> None:
        self._function = function
        self._late = late
        self._lock = Lock()
        self._results: list[T] = []
        self._error: Exception | None = None
        self._given_up = False

    def run(self) -> None:
        try:
            result = self._function()
        except Exception as error:
            self._error = error
            return
        with self._lock:
            self._results.append(result)
            given_up = self._given_up
        if given_up:
            self._late(result)

    def take(self) -> T:
        """Raises what the call has raised, or TimeoutError: it has not returned."""
        with self._lock:
            if self._error is not None:
                raise self._error
            self._given_up = not self._results
        if self._given_up:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        return self._results[0]


class BoundedCalls:
    """Makes calls one at a time, and waits for each no longer than so many seconds."""

    def __init__(self, seconds: float, most: int) -> None:
        """At `most` so many calls that do not return are there; then there are no more calls."""
        self._seconds = seconds
        self._most = most
        self._stuck: list[Thread] = []

    def call(self, function: Callable[[], T], late: Callable[[T], object] = lambda _: None) -> T:
        """The result of a function; `late` is given one that came when nobody waited any more.

        Raises:
            TimeoutError: it does not return, or too many before it have not.
            OSError: there can be no more threads.
            Exception: what the function raises.
        """
        self._stuck = [thread for thread in self._stuck if thread.is_alive()]
        if len(self._stuck) >= self._most:
            raise TimeoutError(errno.ETIMEDOUT, "others do not return")
        call = _Call(function, late)
        thread = Thread(target=call.run, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from None
        thread.join(self._seconds)
        if thread.is_alive():
            self._stuck.append(thread)
        return call.take()
